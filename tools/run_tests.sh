#!/usr/bin/env bash
# Every check that has to pass: bash tools/run_tests.sh [--full] [arguments of pytest]
# Creates .venv if needed, then runs linters, type checks and tests. --full adds the long tests:
# all combinations, many repetitions, the quickstart itself.
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
cd "$ROOT"
ensure_venv

# The multi-process tests start more processes than there are cores.
export OMP_NUM_THREADS=1

# One worker per core; each takes up to a gigabyte.
workers() {
  local cores
  # nproc obeys OMP_NUM_THREADS.
  cores=$(env -u OMP_NUM_THREADS nproc)
  echo $((cores < 8 ? cores : 8))
}

status=0
step() {
  echo "== $*"
  "$@" || status=1
}
step ruff check .
step ruff format --check .
# Beside the tests, many of which wait.
checked=$(mktemp)
trap 'rm -f "$checked"' EXIT
mypy >"$checked" 2>&1 &
mypy=$!
# Triton compiles the energy kernel, and interprets it, without a GPU. Beside .venv and not in it:
# other libraries look for it, and would behave as on a GPU.
TRITON=$VENV/triton
ensure_triton() {
  python -c 'import triton' 2>/dev/null && return
  [ -d "$TRITON/triton" ] || "$VENV/bin/pip" install -qq --no-deps --target "$TRITON" triton==3.9.0
}
# -rs: list tests that are skipped because hardware is missing.
tests=(python -m pytest -rs --durations=10)
case "$*" in
"" | --full)
  # Each worker takes one file after another, the tests of several processes first. What is done to
  # Slurm's jobs has to happen while they run: its tests have the cores to themselves.
  step "${tests[@]}" "$@" -n "$(workers)" --dist loadfile --no-loadscope-reorder \
    --ignore=tests/slurm --ignore=tests/gpu
  step "${tests[@]}" "$@" tests/slurm
  ;;
*) step "${tests[@]}" "$@" ;;
esac
case "$*" in
"" | --full)
  # A process of its own: Triton's interpreter is chosen when it is loaded.
  step ensure_triton
  PYTHONPATH=$TRITON step "${tests[@]}" "$@" -n "$(workers)" tests/gpu
  ;;
esac
echo "== mypy"
wait "$mypy" || status=1
cat "$checked"
[ "$status" = 0 ] || echo "error: not everything passed, see the steps above (== ...)" >&2
exit "$status"
