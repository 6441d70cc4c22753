#!/usr/bin/env bash
# Run by the jobs of this folder: bash slurm/launch.sh TOOL ARGUMENT...
#
#   train, train_autoencoder   RECIPE [key=value ...]    one task per GPU, after checking every node
#   encode_latents             the tool's own options    one worker per task, split after split
#   evaluate, report           the tool's own options    one task
#
# USR1 (before the time limit, and at a preemption) makes a training write a checkpoint and end.
# After that, and after a failure that a restart may not repeat, the job is requeued and continues
# where it was. docs/slurm.md lists the settings and explains how to read the logs.
set -uo pipefail

TOOL=$1
shift
RESTART=${SLURM_RESTART_COUNT:-0}
# Limits: consecutive starts without progress, and restarts in all.
MAX_FAILURES=${CALM_MAX_FAILURES:-3}
MAX_RESTARTS=${CALM_MAX_RESTARTS:-100}
LAUNCHER=${CALM_LAUNCHER:-srun}
# The last job of an array has the number of the array.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}
JOB=${JOB:-${SLURM_JOB_ID:-}}

say() { echo "[$(date +%FT%T) ${SLURMD_NODENAME:-}] $*"; }

die() {
  echo "error: $*" >&2
  exit 2
}

[ -n "${SLURM_JOB_ID:-}" ] || die "this is not a Slurm job; submit it: sbatch slurm/NAME.sh"
unset CDPATH
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# first_address : the first node's name if it resolves, otherwise the address that Slurm uses.
first_address() {
  local first
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  if getent hosts "$first" >/dev/null; then
    echo "$first"
  else
    scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'
  fi
}

set_up() {
  if [ -n "${CALM_SETUP:-}" ]; then
    [ -r "$CALM_SETUP" ] || die "CALM_SETUP=$CALM_SETUP: no such file"
    # Modules and conda use variables that are not set.
    set +u
    # shellcheck disable=SC1090
    . "$CALM_SETUP"
    set -u
  fi
  [[ $MAX_FAILURES =~ ^[1-9][0-9]*$ ]] || die "CALM_MAX_FAILURES=$MAX_FAILURES: give a number from 1"
  [[ $MAX_RESTARTS =~ ^[0-9]+$ ]] || die "CALM_MAX_RESTARTS=$MAX_RESTARTS: give a number from 0"
  [[ $LAUNCHER =~ ^(srun|deepspeed)$ ]] || die "CALM_LAUNCHER=$LAUNCHER: give srun or deepspeed"
  [ -z "${CALM_CONTAINER:-}" ] || [ "$LAUNCHER" = srun ] ||
    die "CALM_CONTAINER: needs CALM_LAUNCHER=srun; deepspeed would run outside the image"
  PYTHON=${CALM_PYTHON:-$ROOT/.venv/bin/python}
  [ -n "${CALM_PYTHON:-}${CALM_CONTAINER:-}" ] || [ -x "$PYTHON" ] || PYTHON=python3
  # With --nodes=MIN-MAX of sbatch, the number of nodes is known only now.
  NODES=$SLURM_JOB_NUM_NODES PER_NODE=${SLURM_NTASKS_PER_NODE:-1}
  TASKS=$((NODES * PER_NODE))
  [ "${SLURM_NTASKS:-$TASKS}" = "$TASKS" ] || die "--ntasks=$SLURM_NTASKS: $NODES nodes have" \
    "$PER_NODE tasks each; give --nodes and --ntasks-per-node instead"
  # The steps need this environment, even after sbatch --export=NONE.
  export SLURM_EXPORT_ENV=ALL
  # Use the checkout's package rather than one installed in an image or beside python3.
  export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
  # srun does not inherit it from sbatch.
  [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
  # The other half reads data and writes checkpoints.
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((${SLURM_CPUS_PER_TASK:-1} + 1) / 2))}
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
  # Here, because images have no scontrol.
  [ -n "${MASTER_ADDR:-}" ] || MASTER_ADDR=$(first_address)
  export MASTER_ADDR
  # Consecutive ranks on one node, and there on one socket, whose GPUs have consecutive numbers.
  SRUN=(srun --kill-on-bad-exit=1 --distribution=block:block)
  if [ -n "${CALM_CONTAINER:-}" ]; then
    SRUN+=(--container-image="$CALM_CONTAINER" --container-workdir="$PWD"
      --container-mounts="${CALM_MOUNTS:-$ROOT,$PWD}")
  fi
  # shellcheck disable=SC2206  # options, one per word
  SRUN+=(${CALM_SRUN_ARGS:-})
}

# masked TEXT... : TEXT without passwords and keys, for the log. calm_dist.redact masks the output
# of ranks.
masked() {
  sed -E 's#(://[^ /:@]*):[^ /]+@#\1:***@#g; s#((key|token|secret|password)=)[^ &]+#\1***#Ig' <<<"$*"
}

# open_logs DIR : create the folder of this job's logs in DIR.
open_logs() {
  export CALM_LOGS=$1/slurm-$SLURM_JOB_ID
  mkdir -p "$CALM_LOGS" || die "$CALM_LOGS: cannot be created; give a writable directory"
}

# Show rank 0's log in the job's log.
follow_rank_zero() {
  local first log
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  log=$CALM_LOGS/rank0000.$first.restart$RESTART.log
  say "ranks log to $CALM_LOGS/rank*.restart$RESTART.log"
  : >>"$log"
  tail --follow=name --lines=0 --sleep-interval=0.5 "$log" 2>/dev/null &
  FOLLOWER=$!
}

# run_step COMMAND... : run one step. Sets CODE to the exit code of the first task that failed, and
# FIRST to srun's message about it.
run_step() {
  local errors=$CALM_LOGS/srun.err
  CODE=75
  [ -z "$ASKED" ] || return
  "$@" 2> >(tee "$errors" >&2) &
  STEP=$!
  # A signal to this script interrupts `wait`, but does not end the step.
  while kill -0 "$STEP" 2>/dev/null; do wait "$STEP"; done
  wait "$STEP"
  CODE=$?
  STEP=''
  # The last lines that tee has read may not be in the file yet.
  sleep 0.2
  # srun's own code may be that of a task that --kill-on-bad-exit ended because another failed.
  FIRST=$(sed -n 's/^srun: error: \(.*: tasks\{0,1\} .*\)/\1/p' "$errors" | head -n 1)
  case $FIRST in
    *'Exited with exit code '*) [ "$CODE" = 0 ] || CODE=${FIRST##* } ;;
  esac
  # The signal came before a rank could handle it.
  case $ASKED$CODE in yes137 | yes138 | yes143) CODE=75 ;; esac
}

# ask_to_end : make the ranks write a checkpoint and end.
ask_to_end() {
  local rank
  # A second signal would kill a rank that has written its checkpoint.
  [ -z "$ASKED" ] || return
  ASKED=yes
  say "USR1: the ranks are asked to write a checkpoint and end"
  [ -n "$STEP" ] || return
  # Signal the rank that holds the run directory; it tells the others. Slurm would also signal their
  # helper processes and deepspeed, which would die.
  rank=$(sed -n 's/^process \([0-9]*\) .*/\1/p' "$RUN_DIR/.lock" 2>/dev/null)
  if grep -qzxs "SLURM_JOB_ID=$SLURM_JOB_ID" "/proc/${rank:-none}/environ"; then
    kill -USR1 "$rank"
  else
    # No rank holds it yet: nothing is lost. srun may miss a signal while it launches the step.
    kill -TERM "$STEP"
    (while sleep 10 && kill -TERM "$STEP"; do :; done) 2>/dev/null &
  fi
}

# progress : its output changes when the job has made progress.
progress() {
  case $TOOL in
    train*) find "$RUN_DIR/checkpoints" -maxdepth 1 -name 'step_*[0-9]' | sort | tail -n 1 ;;
    encode_latents) find "$RUN_DIR" -type d ! -name '*tmp*' | sort ;;
  esac 2>/dev/null
}

# finish : end the job with CODE, or requeue it.
finish() {
  local after state failures
  case $CODE in
    0) exit 0 ;;
    75) ;;
    2 | 4)
      show_failures
      end "another start would fail in the same way; fix the error reported above"
      ;;
    *) show_failures ;;
  esac
  # If the job was cancelled, ran out of time or lost a node, Slurm has already decided.
  state=$(ask_slurm squeue --noheader --format=%T --jobs="$JOB") || end "Slurm does not answer"
  [ "$state" = RUNNING ] || end "the job is ${state:-gone}"
  after=$(progress)
  failures=$(cat "$CALM_LOGS/without_progress" 2>/dev/null || echo 0)
  if [ "$after" = "$BEFORE" ]; then failures=$((failures + 1)); else failures=0; fi
  echo "$failures" >"$CALM_LOGS/without_progress"
  [ "$failures" -lt "$MAX_FAILURES" ] ||
    end "$failures starts in a row made no progress (CALM_MAX_FAILURES=$MAX_FAILURES)"
  [ "$RESTART" -lt "$MAX_RESTARTS" ] ||
    end "restarted $RESTART times (CALM_MAX_RESTARTS=$MAX_RESTARTS)"
  [[ $(scontrol show job "$SLURM_JOB_ID" 2>/dev/null) != *Requeue=0* ]] ||
    end "it was submitted with --no-requeue"
  say "exit code $CODE; requeued${FIRST:+; the first task to end was $FIRST}"
  ask_slurm scontrol requeue "$JOB" || end "scontrol cannot requeue it"
  # Slurm ends this script.
  sleep 300
  exit "$CODE"
}

# ask_slurm COMMAND... : retry for ten minutes while the controller does not answer.
ask_slurm() {
  local tries
  for tries in {1..40}; do
    "$@" && return
    sleep 15
  done
  return 1
}

end() {
  say "exit code $CODE; not requeued: $*"
  exit "$CODE"
}

# The last lines of the logs of ranks that reported an error.
show_failures() {
  local log
  for log in "$CALM_LOGS"/rank*.restart"$RESTART".log; do
    grep -qsE '^(error:|Traceback|[A-Za-z.]*Error:)' "$log" || continue
    echo "---- $log"
    tail -n 15 "$log"
  done | head -n 100
}

train() {
  local arguments=("${RECIPE:-$ROOT/$1}" "${@:2}" "parallel.world_size=$TASKS") once=() code
  [ -z "${CALM_CONTAINER:-}" ] || once=("${SRUN[@]}" --nodes=1 --ntasks=1)
  RUN_DIR=$("${once[@]}" "$PYTHON" "$ROOT/tools/preflight.py" "${arguments[@]}" | tail -n 1)
  code=$?
  case $code in
    0) ;;
    # 6: an object store does not answer, or a mount was lost. 137, 143: preflight.py was killed, for
    # memory or at a preemption (srun forwards Slurm's TERM). There is no run directory yet: count
    # failures under logs/.
    6 | 137 | 143) CODE=$code && open_logs "logs" && finish ;;
    *) exit 2 ;;
  esac
  # preflight.py prints it with escapes, since a name may contain line breaks.
  printf -v RUN_DIR %b "$RUN_DIR"
  open_logs "$RUN_DIR/logs"
  BEFORE=$(progress)
  say "restart $RESTART of $TOOL $(masked "${arguments[@]}") in $RUN_DIR" \
    "on $NODES nodes ($SLURM_JOB_NODELIST) x $PER_NODE ranks"
  if [ "${CALM_PREFLIGHT:-1}" = 1 ]; then
    run_step "${SRUN[@]}" --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 \
      "$PYTHON" "$ROOT/tools/preflight.py" "${arguments[@]}" --node
    [ "$CODE" = 0 ] || finish
  fi
  if [ "$LAUNCHER" = deepspeed ]; then
    [ "$NODES" = 1 ] || die "CALM_LAUNCHER=deepspeed: works on one node, the job has $NODES; use srun"
    run_step "$PYTHON" -m deepspeed.launcher.runner --num_accelerators "$TASKS" \
      --master_port "${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 12000))}" "$ROOT/tools/$TOOL.py" "${arguments[@]}"
  else
    run_ranks "$PYTHON" "$ROOT/tools/$TOOL.py" "${arguments[@]}"
  fi
}

# run_ranks COMMAND... : run it in every task, each with its own log.
run_ranks() {
  follow_rank_zero
  run_step "${SRUN[@]}" --nodes="$NODES" --ntasks="$TASKS" bash "$ROOT/slurm/rank.sh" "$@"
  # The last lines may be a moment late.
  sleep 1
  kill "$FOLLOWER" 2>/dev/null
}

# encode [OPTION...] : encode the splits of a prepared corpus, each into its own store.
encode() {
  local data=${DATA:-data} store=${STORE:-latents} split tokenizer command
  local kind=(--autoencoder "${AUTOENCODER:-runs/autoencoder}" --block-size "${BLOCK_SIZE:-8192}")
  if [ "$store" = tokens ]; then
    kind=(--variant tokens --patch-size "${PATCH_SIZE:-4}" --block-size "${BLOCK_SIZE:-2048}")
  fi
  [ -z "${BEGIN_TOKEN:-}" ] || kind+=("--begin-token=$BEGIN_TOKEN")
  [ -z "${END_TOKEN:-}" ] || kind+=("--end-token=$END_TOKEN")
  tokenizer=${TOKENIZER:-$(find "$data" -maxdepth 1 -name 'tokenizer.*' 2>/dev/null | head -n 1)}
  for split in ${SPLITS:-train valid test}; do
    [ -r "$data/corpus/$split.jsonl" ] ||
      die "DATA=$data: has no corpus/$split.jsonl; set DATA (or SPLITS), or create it:" \
        "python tools/prepare_corpus.py --corpus PATH... --tokenizer F --out $data"
  done
  [ -r "$tokenizer" ] || die "TOKENIZER=$tokenizer: no such file, and none in DATA=$data"
  [ $((${SLURM_ARRAY_TASK_COUNT:-1} - 1)) = $(((${SLURM_ARRAY_TASK_MAX:-0} - \
    ${SLURM_ARRAY_TASK_MIN:-0}) / ${SLURM_ARRAY_TASK_STEP:-1})) ] ||
    die "--array: has gaps; give MIN-MAX, so that each job knows its share"
  RUN_DIR=$data/$store
  open_logs "$data/logs"
  BEFORE=$(progress)
  for split in ${SPLITS:-train valid test}; do
    if [ "$split" != train ] && [ "${SLURM_ARRAY_TASK_ID:-}" != "${SLURM_ARRAY_TASK_MIN:-}" ]; then
      continue
    fi
    say "restart $RESTART: $data/corpus/$split.jsonl -> $RUN_DIR/$split"
    command=("$PYTHON" "$ROOT/tools/encode_latents.py" --corpus "$data/corpus/$split.jsonl"
      --tokenizer "$tokenizer" --out "$RUN_DIR/$split" "${kind[@]}" "$@")
    if [ "$split" = train ]; then
      command+=(--parts "${PARTS:-64}")
      # Otherwise every worker that starts now would search and fingerprint the corpus.
      run_step "${SRUN[@]}" --nodes=1 --ntasks=1 "${command[@]}" --begin
      [ "$CODE" = 0 ] || return
      run_ranks "${command[@]}"
    else
      # One part: each part loses its tail of up to a block, which is much of a small split.
      run_step "${SRUN[@]}" --nodes=1 --ntasks=1 "${command[@]}"
    fi
    [ "$CODE" = 0 ] || return
  done
}

# report [OPTION...] : report on those of RUNS that have results.
report() {
  local run arguments=("$@")
  for run in ${RUNS:-runs/calm_* runs/transformer_*}; do
    [ ! -s "$run/metrics.jsonl" ] || arguments+=(--run "$run")
  done
  [ ${#arguments[@]} -gt $# ] || die "RUNS=${RUNS:-runs/...}: none of these has a metrics.jsonl"
  [ ! -s "${AUTOENCODER:-runs/autoencoder}/metrics.jsonl" ] ||
    arguments+=(--autoencoder "${AUTOENCODER:-runs/autoencoder}")
  alone "${arguments[@]}"
}

# alone ARGUMENT... : run the tool in one task.
alone() {
  open_logs "${LOGS:-logs}"
  run_step "${SRUN[@]}" --nodes=1 --ntasks=1 "$PYTHON" "$ROOT/tools/$TOOL.py" "$@"
}

ASKED='' STEP='' CODE=0 FIRST='' BEFORE='' RUN_DIR=''
trap ask_to_end USR1
# Slurm itself signals the tasks; this script waits for them.
trap 'say "TERM: asked to end"' TERM
set_up
case $TOOL in
  train | train_autoencoder) train "$@" ;;
  encode_latents) encode "$@" ;;
  report) report "$@" ;;
  *) alone "$@" ;;
esac
finish
