#!/usr/bin/env bash
# One task of a job step: rank.sh COMMAND... runs COMMAND with its output in the task's own log.
set -euo pipefail

rank=$(printf '%04d' "$SLURM_PROCID")
restart=${SLURM_RESTART_COUNT:-0}
if [[ ${2:-} == */tools/encode_latents.py ]]; then
  # The tasks of all jobs of an array are workers that share only the directory.
  array=$(((${SLURM_ARRAY_TASK_ID:-0} - ${SLURM_ARRAY_TASK_MIN:-0}) / ${SLURM_ARRAY_TASK_STEP:-1}))
  worker=$((array * SLURM_STEP_NUM_TASKS + SLURM_PROCID))
  set -- "$@" --worker "$worker/$((${SLURM_ARRAY_TASK_COUNT:-1} * SLURM_STEP_NUM_TASKS))"
fi
exec "$@" >>"$CALM_LOGS/rank$rank.$SLURMD_NODENAME.restart$restart.log" 2>&1
