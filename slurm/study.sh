#!/usr/bin/env bash
# The whole study as a chain of jobs, each after the jobs whose results it needs:
#
#   tokens -> autoencoder -> latents -> CALM models -> their scores -> report
#          -> Transformers ----------------------------> their scores ->
#
#   bash slurm/study.sh [--dry-run] [--models "NAME ..."] [--autoencoder NAME] [--sbatch "OPTION ..."]
#                       [[NAME:]key=value ...]
#
#   --dry-run      show what would be submitted
#   --models       recipes (default: calm_s calm_m calm_l calm_xl transformer_s transformer_m transformer_l)
#   --autoencoder  recipe of the autoencoder (default: autoencoder)
#   --sbatch       options for every job, such as --account=x --partition=y
#   key=value      override for every training; NAME:key=value: for the recipe NAME only
#
# DATA (default: data) is a corpus made by tools/prepare_corpus.py; RUNS (default: runs) gets a run
# directory for each recipe, and report/; TOKENIZER, BEGIN_TOKEN and END_TOKEN are those of
# slurm/encode.sh. Finished jobs are not submitted again, and jobs that are
# still queued or running are waited for: after any failure, run the same command again.
set -euo pipefail

unset CDPATH
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
MODELS='calm_s calm_m calm_l calm_xl transformer_s transformer_m transformer_l'
declare -A FACTS=()
AUTOENCODER_RECIPE=autoencoder OPTIONS=() OVERRIDES=() DRY=''

die() {
  echo "error: $*" >&2
  exit 2
}

while [ $# -gt 0 ]; do
  case $1 in
    -h | --help)
      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
      exit
      ;;
    --dry-run) DRY=1 ;;
    --models | --autoencoder | --sbatch)
      [ $# -gt 1 ] || die "$1: no value given"
      case $1 in
        --models) MODELS=$2 ;;
        --autoencoder) AUTOENCODER_RECIPE=$2 ;;
        # shellcheck disable=SC2206  # options, one per word
        --sbatch) OPTIONS=($2) ;;
      esac
      shift
      ;;
    -*) die "$1: unknown option; see bash slurm/study.sh --help" ;;
    *=*) OVERRIDES+=("$1") ;;
    *) die "$1: neither an option nor key=value; see bash slurm/study.sh --help" ;;
  esac
  shift
done

DATA=$(realpath -m "${DATA:-data}") STUDY=$(realpath -m "${RUNS:-runs}")
AUTOENCODER=$STUDY/$AUTOENCODER_RECIPE
PYTHON=${CALM_PYTHON:-$ROOT/.venv/bin/python}
[ -n "${CALM_PYTHON:-}" ] || [ -x "$PYTHON" ] || PYTHON=python3
command -v "$PYTHON" >/dev/null || die "CALM_PYTHON=$PYTHON: no such program"
# The report's job gets its runs as words, separated by blanks.
[[ $STUDY$DATA != *[[:space:]*?[\\]* ]] ||
  die "RUNS=$STUDY, DATA=$DATA: a path with blanks or one of * ? [ \\; give another"
[ -n "${MODELS// /}" ] || die "--models: is empty; give names of recipes"
[ -n "$DRY" ] || command -v sbatch >/dev/null || die "no sbatch here; run it where jobs are submitted"
for split in train valid test; do
  [ -r "$DATA/corpus/$split.jsonl" ] || die "DATA=$DATA: has no corpus/$split.jsonl; create it:" \
    "python tools/prepare_corpus.py --corpus PATH... --tokenizer F --out $DATA"
done
for given in ${OVERRIDES[@]+"${OVERRIDES[@]}"}; do
  name=${given%%[:=]*}
  [[ ${given%%=*} != *:* || " $AUTOENCODER_RECIPE $MODELS " == *" $name "* ]] ||
    die "$given: $name is not a recipe of this study ($AUTOENCODER_RECIPE $MODELS)"
done

# overrides_of NAME : set ARGUMENTS to the overrides of its training, and DEVICE.
overrides_of() {
  local given
  ARGUMENTS=("run.dir=$STUDY/$1")
  case $1 in
    calm_*) ARGUMENTS+=("data.path=$DATA/latents/train" "model.autoencoder=$AUTOENCODER") ;;
    *) ARGUMENTS+=("data.path=$DATA/tokens/train") ;;
  esac
  for given in ${OVERRIDES[@]+"${OVERRIDES[@]}"}; do
    if [[ ${given%%=*} != *:* ]]; then
      ARGUMENTS+=("$given")
    elif [ "${given%%:*}" = "$1" ]; then
      ARGUMENTS+=("${given#*:}")
    fi
  done
  # Jobs without a recipe use the device of the trainings.
  DEVICE=()
  for given in "${ARGUMENTS[@]}"; do
    case $given in
      parallel.device=cpu) DEVICE=(--device cpu) ;;
      parallel.device=*) DEVICE=() ;;
    esac
  done
}

# facts_of NAME : set BLOCK_SIZE, PATCH_SIZE and STEPS from its recipe; refuses an invalid recipe.
facts_of() {
  overrides_of "$1"
  [ -n "${FACTS[$1]:-}" ] || FACTS[$1]=$("$PYTHON" - "$ROOT" "recipes/$1.yaml" "${ARGUMENTS[@]}" <<'PY'
import sys
sys.path.insert(0, sys.argv[1])
from calm_dist.cli.console import run
from calm_dist.recipe import load_recipe

def main():
    recipe = load_recipe(f"{sys.argv[1]}/{sys.argv[2]}", sys.argv[3:])
    print(recipe.block_size, recipe.model.patch_size, recipe.training.steps)

run(main)
PY
  ) || exit 2
  read -r BLOCK_SIZE PATCH_SIZE STEPS <<<"${FACTS[$1]}"
}

# submit NAME IDS SCRIPT [ARGUMENT...] : submit a job and set ID to its number. It starts when the
# jobs IDS (words) have succeeded or, with IDS "any: ...", ended. An ID "done" needs no waiting.
# SETTINGS are the job's environment.
submit() {
  local name=$1 after=$2 script=$3 kind=afterok job command wait=()
  shift 3
  if [[ $after == any:* ]]; then kind=afterany after=${after#any:}; fi
  for job in $after; do [ "$job" = done ] || wait+=("$job"); done
  # --export: SETTINGS must reach the job even if the site sets SBATCH_EXPORT to something else.
  command=(env "${SETTINGS[@]}" sbatch --parsable --export=ALL "--job-name=$NAME-$name"
    "--output=${STUDY//%/%%}/logs/%x-%j.out")
  # Without the second option a job would wait forever for one that failed.
  if [ ${#wait[@]} -gt 0 ]; then
    command+=("--dependency=$kind$(printf ':%s' "${wait[@]}")" --kill-on-invalid-dep=yes)
  fi
  command+=(${OPTIONS[@]+"${OPTIONS[@]}"} "$ROOT/slurm/$script" "$@")
  if [ -n "$DRY" ]; then
    ID=$name
    echo "$name${wait[*]+ (after ${wait[*]})}:$(printf ' %q' "${command[@]}")"
    return
  fi
  ID=$(squeue --noheader --user="$(id -un)" --name="$NAME-$name" --format=%A | head -n 1) ||
    die "squeue does not answer; try again"
  if [ -n "$ID" ]; then
    echo "$name: still queued or running as job $ID"
    return
  fi
  ID=$("${command[@]}") || die "sbatch refused $name; the jobs submitted before it stay queued"
  ID=${ID%%;*}
  echo "$name: submitted as job $ID${wait[*]+, after ${wait[*]}}"
}

# already NAME FILE... : whether all results of NAME exist.
already() {
  local name=$1 file
  shift
  for file in "$@"; do [ -e "$file" ] || return; done
  echo "$name: already there"
  ID=done
}

# train NAME IDS : submit a training of recipes/NAME.yaml.
train() {
  local script=$1.sh
  facts_of "$1"
  ! already "$1" "$STUDY/$1/checkpoints/step_$(printf %08d "$STEPS")/manifest.json" || return 0
  # A user's own recipe is submitted like CALM-S, apart from the options in --sbatch.
  if [ ! -e "$ROOT/slurm/$script" ]; then
    case $1 in autoencoder*) script=autoencoder.sh ;; *) script=calm_s.sh ;; esac
  fi
  SETTINGS=("RECIPE=$ROOT/recipes/$1.yaml")
  submit "$1" "$2" "$script" "${ARGUMENTS[@]}"
}

# encode STORE IDS : submit the encoding of all splits of the corpus.
encode() {
  # If the autoencoder has changed, the job refuses the existing store with a message.
  [[ $2 != done ]] || ! already "$1" "$DATA/$1"/{train,valid,test}/meta.json || return 0
  SETTINGS=("DATA=$DATA" "STORE=$1" "BLOCK_SIZE=$BLOCK_SIZE" "PATCH_SIZE=$PATCH_SIZE"
    "AUTOENCODER=$AUTOENCODER")
  submit "$1" "$2" encode.sh ${DEVICE[@]+"${DEVICE[@]}"}
}

# Jobs in the queue belong to the same study if the runs directory is the same.
NAME=study-$(cksum <<<"$STUDY" | cut -d' ' -f1)
[ -n "$DRY" ] || mkdir -p "$STUDY/logs"

# Check all recipes before anything is submitted.
for model in $AUTOENCODER_RECIPE $MODELS; do facts_of "$model"; done

facts_of "$AUTOENCODER_RECIPE"
encode tokens done
tokens=$ID
train "$AUTOENCODER_RECIPE" "$tokens"
autoencoder=$ID latents=done
for model in $MODELS; do
  case $model in calm_*) ;; *) continue ;; esac
  facts_of "$model"
  encode latents "$autoencoder"
  latents=$ID
  break
done
scores=()
for model in $MODELS; do
  case $model in
    calm_*) train "$model" "$autoencoder $latents" ;;
    *) train "$model" "$tokens" ;;
  esac
  trained=$ID
  if [ "$trained" != done ] || ! already "score of $model" "$STUDY/$model/evaluation.json"; then
    # The same blocks for all models: scores on different blocks are not comparable.
    SETTINGS=("CHECKPOINT=$STUDY/$model" "TEST=$DATA/tokens/test" "LOGS=$STUDY/$model/logs")
    submit "score-$model" "$trained $tokens" evaluate.sh --json "$STUDY/$model/evaluation.json" \
      ${DEVICE[@]+"${DEVICE[@]}"}
  fi
  scores+=("$ID")
done
# The report runs however the other jobs ended, and covers the runs that exist.
all=()
for model in $MODELS; do all+=("$STUDY/$model"); done
SETTINGS=("RUNS=${all[*]}" "OUT=$STUDY/report" "LOGS=$STUDY/logs" "AUTOENCODER=$AUTOENCODER")
submit report "any:${scores[*]}" report.sh
