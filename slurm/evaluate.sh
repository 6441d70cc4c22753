#!/bin/bash
# Score a run: [CHECKPOINT=runs/calm_m TEST=data/latents/test] sbatch slurm/evaluate.sh [--option ...]
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
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
exec bash "$root/slurm/launch.sh" evaluate \
  --checkpoint "${CHECKPOINT:-runs/calm_m}" --data "${TEST:-data/latents/test}" "$@"
