#!/bin/bash
# CALM-S, 201M parameters: sbatch slurm/calm_s.sh [key=value ...]
#SBATCH --job-name=calm_s
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Slurm runs a copy of this file; find the checkout that contains the submitted one.
script=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null |
  sed -n '/^ *Command=/{s/^ *Command=//;s/\.sh .*/.sh/;p;q}')
script=$(cd "${SLURM_SUBMIT_DIR:-.}" && realpath -m "${script:-$0}")
root=${CALM_DIST_ROOT:-${script%/slurm/*}}
[ -r "$root/slurm/launch.sh" ] || root=${SLURM_SUBMIT_DIR:-.}
[ -r "$root/slurm/launch.sh" ] || { echo "error: set CALM_DIST_ROOT to the checkout" >&2; exit 2; }
exec bash "$root/slurm/launch.sh" train recipes/calm_s.yaml "$@"
