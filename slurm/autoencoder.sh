#!/bin/bash
# The autoencoder, 76M parameters: sbatch slurm/autoencoder.sh [key=value ...]
#SBATCH --job-name=autoencoder
#SBATCH --nodes=1
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
exec bash "${root:-.}/slurm/launch.sh" train_autoencoder recipes/autoencoder.yaml "$@"
