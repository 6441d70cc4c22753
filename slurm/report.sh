#!/bin/bash
# Compare runs: RUNS="runs/calm_m runs/transformer_s" [OUT=runs/report] sbatch slurm/report.sh
#SBATCH --job-name=report
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=00:30:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Slurm runs a copy of this file; the job knows where it was submitted from.
root=${CALM_DIST_ROOT:-$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null |
  sed -n '/^ *Command=/{s|^ *Command=\([^ ]*\)/slurm/[^/ ]*\.sh.*|\1|p;q}')}
exec bash "${root:-.}/slurm/launch.sh" report --out "${OUT:-runs/report}" "$@"
