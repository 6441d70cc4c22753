#!/bin/bash
# Transformer-L, 847M parameters: sbatch slurm/transformer_l.sh [key=value ...]
#SBATCH --job-name=transformer_l
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Slurm runs a copy of this file; the job knows where it was submitted from.
root=${CALM_DIST_ROOT:-$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null |
  sed -n '/^ *Command=/{s|^ *Command=\([^ ]*\)/slurm/[^/ ]*\.sh.*|\1|p;q}')}
exec bash "${root:-.}/slurm/launch.sh" train recipes/transformer_l.yaml "$@"
