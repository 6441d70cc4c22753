#!/usr/bin/env bash
# From a fresh machine to a trained, scored and compared CALM on real text.
#
#   bash tools/quickstart.sh [OUT] [--corpus PATH...] [--tokenizer FILE]
#                            [--begin-token NAME] [--end-token NAME]
#
#   OUT          output directory (default: runs/quickstart)
#   --corpus     .txt, .jsonl or .json files, plain or with .gz, .xz, .bz2 or .zst, and .parquet
#                or .arrow files, directories, quoted globs; none may contain OUT or be inside it
#                (default: the source text of Python's standard library)
#   --tokenizer  tokenizer.json or tokenizer.model (default: a BPE is trained on the corpus)
#   --begin-token, --end-token
#                the tokenizer's tokens that begin and end documents, if it does not mark them
#                itself; one token may be both
#
# Run the same command again to continue after a stop. A stage is skipped if its result exists and
# was made from the same inputs; if they changed, the previous result moves to OUT/previous.
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
. "$ROOT/tools/_stages.sh"

usage() {
  sed -n '2,/^set /{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
}

absolute() {
  # Links are not resolved: a corpus may be a glob.
  realpath --canonicalize-missing --no-symlinks "$1"
}

OUT='' CORPUS=() TOKENIZER=() ENDS=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help)
      usage
      exit
      ;;
    --corpus)
      shift
      [[ $# -gt 0 && $1 != --* ]] || die "--corpus: no path given"
      while [ $# -gt 0 ] && [[ $1 != --* ]]; do
        CORPUS+=("$(absolute "$1")")
        shift
      done
      ;;
    --tokenizer)
      [[ $# -gt 1 && $2 != --* ]] || die "--tokenizer: no file given"
      TOKENIZER=(--tokenizer "$(absolute "$2")")
      shift 2
      ;;
    --begin-token | --end-token)
      [[ $# -gt 1 && -n $2 && $2 != --* ]] || die "$1: no token given"
      ENDS+=("$1=$2")
      shift 2
      ;;
    -*) die "$1: unknown option; see bash tools/quickstart.sh --help" ;;
    *)
      [ -z "$OUT" ] || die "$1: a second OUT after $OUT; paths of text follow --corpus"
      OUT=$(absolute "$1")
      shift
      ;;
  esac
done
OUT=${OUT:-$ROOT/runs/quickstart}
[ ${#CORPUS[@]} = 0 ] || CORPUS=(--corpus "${CORPUS[@]}")

# value FILE KEY...: one value of a recipe or of a JSON file, which is also YAML.
value() {
  python - "$@" <<'PY'
import functools, sys, yaml
print(functools.reduce(dict.__getitem__, sys.argv[2:], yaml.safe_load(open(sys.argv[1]))))
PY
}

AUTOENCODER=$ROOT/recipes/autoencoder_tiny.yaml
CALM=$ROOT/recipes/calm_tiny.yaml
TRANSFORMER=$ROOT/recipes/transformer_tiny.yaml
# The patches of the CALM with a discrete head.
TOKENS_HEAD=$ROOT/recipes/tokens_tiny.yaml
# Runs under OUT, in the order of the report.
MODELS=(calm transformer tokens_head)

corpus() {
  logged python "$ROOT/tools/prepare_corpus.py" --out "$OUT" "${CORPUS[@]}" "${TOKENIZER[@]}" \
    "${ENDS[@]}" \
    --vocab-size "$(value "$AUTOENCODER" model vocab_size)"
}

encode() {
  local store=$1 split=$2
  shift 2
  logged python "$ROOT/tools/encode_latents.py" --corpus "$OUT/corpus/$split.jsonl" \
    --tokenizer "$(ls "$OUT"/tokenizer.*)" "${ENDS[@]}" --out "$OUT/$store/$split" \
    --block-size "$(value "$CALM" data block_size)" ${redo:+--overwrite} "$@"
}

tokens() {
  local split
  for split in train valid; do
    encode tokens $split --variant tokens --patch-size "$(value "$AUTOENCODER" model patch_size)"
  done
}

autoencoder() {
  logged python "$ROOT/tools/train_autoencoder.py" "$AUTOENCODER" run.dir="$OUT/autoencoder" \
    data.path="$OUT/tokens/train" model.vocab_size="$VOCABULARY"
}

latents() {
  local split
  for split in train valid test; do
    encode latents $split --autoencoder "$OUT/autoencoder"
  done
}

# Layout of the language models: the tiny recipes' four processes, or fewer if GPUs are fewer.
choose_layout() {
  local gpus=4
  if has_gpu; then gpus=$(python -c 'import torch; print(torch.cuda.device_count())'); fi
  case $gpus in
    0 | 1) PROCESSES=1 LAYOUT=(parallel.tensor_parallel_size=1 parallel.pipeline_parallel_size=1) ;;
    2 | 3) PROCESSES=2 LAYOUT=(parallel.pipeline_parallel_size=1) ;;
    *) PROCESSES=4 LAYOUT=() ;;
  esac
}

train() {
  local port
  port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
  # There may be more processes than cores: give each one thread.
  OMP_NUM_THREADS=1 logged deepspeed --quiet --num_accelerators "$PROCESSES" --master_port "$port" \
    "$ROOT/tools/train.py" "$@" data.path="$OUT/latents/train" model.vocab_size="$VOCABULARY" \
    "${LAYOUT[@]}"
}

calm() {
  train "$CALM" run.dir="$OUT/calm" model.autoencoder="$OUT/autoencoder"
}

transformer() {
  train "$TRANSFORMER" run.dir="$OUT/transformer"
}

tokens_head() {
  train "$TOKENS_HEAD" run.dir="$OUT/tokens_head"
}

evaluation() {
  local model prompt
  mkdir -p "$OUT/evaluation"
  prompt=$(python - "$OUT/corpus/test.jsonl" <<'PY'
import json, sys
text = json.loads(open(sys.argv[1], encoding="utf-8").readline())["text"].strip()
print(text[:80].rpartition(" ")[0] or text[:80])
PY
  )
  for model in "${MODELS[@]}"; do
    logged python "$ROOT/tools/evaluate.py" --checkpoint "$OUT/$model" --data "$OUT/latents/test" \
      --all-checkpoints --json "$OUT/evaluation/$model.json"
    logged python "$ROOT/tools/generate.py" --checkpoint "$OUT/$model" --prompt="$prompt" \
      --max-new-tokens 64 --json "$OUT/evaluation/$model.text.json"
  done
  logged python "$ROOT/tools/benchmark.py" inference "$OUT/calm" "$OUT/transformer" \
    $(has_gpu && echo --device cuda) --batches 1 4 16 64 --contexts 64 --new-tokens 16 \
    --repeats 1 --json "$OUT/evaluation/inference.json"
}

report() {
  logged python "$ROOT/tools/report.py" --autoencoder "$OUT/autoencoder" \
    --run "${MODELS[@]/#/$OUT/}" --inference "$OUT/evaluation/inference.json" --out "$OUT/report"
}

summary() {
  python - "$OUT" <<'PY'
import json, sys
from pathlib import Path

from calm_dist.scores import MARK_EXPLAINED, noisy_brier, summary_text

out = Path(sys.argv[1])
report = json.loads((out / "report" / "report.json").read_text())
autoencoder, comparison = report["autoencoder"], report["comparison"]
print(f"\nautoencoder    {autoencoder['token_accuracy']:.2%} of held-out tokens reconstructed, "
      f"{autoencoder['collapsed_dims']} of {autoencoder['latent_size']} dimensions collapsed")
for model in report["models"]:
    print(f"{model['kind']:<14} {summary_text(model, ' | ')}"
          f" | {model['parameters'] / 1e6:.2f}M parameters"
          f" | {model['train_flops_ours']:.2e} training FLOPs"
          f" | {model['tokens_per_second']:,.0f} tokens/s")
if any(noisy_brier(model) for model in report["models"]):
    print(MARK_EXPLAINED)
for name, shown in (
    ("calm", {
        "training FLOPs": "train_flops_ours_ratio",
        "with the autoencoder": "train_flops_with_autoencoder_ours_ratio",
        "inference FLOPs per token": "inference_flops_ratio",
    }),
    ("tokens", {
        "training FLOPs": "tokens_train_flops_ours_ratio",
        "inference FLOPs per token": "tokens_inference_flops_ratio",
    }),
):
    ratios = [f"{words} {comparison[key]:.2f}" for words, key in shown.items()]
    print(f"{name + ' : transformer':<21} {', '.join(ratios)}")
PY
  printf '\nreport: %s\n' "$OUT/report/index.html"
}

STAGES=9
open_output
ensure_venv
has_gpu || export DS_ACCELERATOR=cpu
choose_layout

echo "calm_dist quickstart -> $OUT"
# Always runs: it checks the text itself, and refuses to mix two corpora.
always corpus
# The recipes have the sizes of blocks and patches.
run_stage tokens "tokens" "$OUT/corpus/manifest.json" "$CALM" "$AUTOENCODER"
VOCABULARY=$(value "$OUT/tokens/train/meta.json" vocab_size)
run_stage autoencoder "autoencoder/checkpoints" "$AUTOENCODER" "$OUT"/tokens/{train,valid}/meta.json
run_stage latents "latents" "$OUT/corpus/manifest.json" "$CALM" "$OUT"/autoencoder/checkpoints/*/manifest.json
run_stage calm "calm/checkpoints" "$CALM" "$OUT/latents/train/meta.json"
run_stage transformer "transformer/checkpoints" "$TRANSFORMER" "$OUT/latents/train/meta.json"
run_stage tokens_head "tokens_head/checkpoints" "$TOKENS_HEAD" "$OUT/latents/train/meta.json"
checkpoints=() records=()
for model in "${MODELS[@]}"; do
  checkpoints+=("$OUT/$model"/checkpoints/*/manifest.json)
  records+=("$OUT/$model"/{recipe.yaml,metrics.jsonl})
  # A run that was made again has lost its scores, although its checkpoints may be the same.
  grep -q '"eval"' "$OUT/$model/metrics.jsonl" || forget evaluation
done
# Earlier versions did not measure generation.
[ -e "$OUT/evaluation/inference.json" ] || forget evaluation
run_stage evaluation "evaluation" "$OUT/latents/test/meta.json" "${checkpoints[@]}"
run_stage report "report" "$OUT"/autoencoder/{recipe.yaml,metrics.jsonl} "${records[@]}" \
  "$OUT/evaluation/inference.json"
summary
echo "in all $((SECONDS / 60)) min $((SECONDS % 60)) s"
