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
# Slurm runs a copy of this file; the job knows where it was submitted from.
root=${CALM_DIST_ROOT:-$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null |
  sed -n '/^ *Command=/{s|^ *Command=\([^ ]*\)/slurm/[^/ ]*\.sh.*|\1|p;q}')}
exec bash "${root:-.}/slurm/launch.sh" evaluate \
  --checkpoint "${CHECKPOINT:-runs/calm_m}" --data "${TEST:-data/latents/test}" "$@"
