# Sourced by quickstart.sh and run_tests.sh: `ensure_venv` creates .venv in the checkout.
# shellcheck shell=bash

# With CDPATH, cd prints, and may go elsewhere.
unset CDPATH
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
# Records what .venv was made from; "unfinished" while it is being made.
VENV_STATE=$VENV/calm_dist.state
CPU_INDEX=https://download.pytorch.org/whl/cpu

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# Find a suitable Python with the modules that `python -m venv` needs. The version is run, since a
# pyenv shim can exist without its Python.
find_python() {
  local name
  for name in "${PYTHON:-}" python3.11 python3.12 python3; do
    if [ -n "$name" ] && "$name" -c '
import sys, venv, ensurepip
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1; then
      printf '%s\n' "$name"
      return
    fi
  done
  die "no Python 3.11 or 3.12 with the modules venv and ensurepip was found (looked for \$PYTHON," \
    "python3.11, python3.12, python3); install one (Debian, Ubuntu: apt install python3.11-venv)" \
    "or set PYTHON to it"
}

has_gpu() {
  # Not into grep -q, which ends before nvidia-smi: with pipefail that is a failure.
  [[ $'\n'$(nvidia-smi -L 2>/dev/null) == *$'\n'GPU* ]]
}

# wanted_state [gpu]: hash of everything that determines the installation, here or with a GPU. It
# includes ROOT, since a virtual environment cannot be moved.
wanted_state() {
  { cat "$ROOT/setup.py" "$ROOT/constraints.txt" && echo "$ROOT" && "$VENV/bin/python" --version &&
    if [ "${1:-}" = gpu ] || has_gpu; then echo gpu; fi; } | sha256sum | cut -d' ' -f1
}

is_current() {
  local state
  [ -x "$VENV/bin/python" ] && state=$(cat "$VENV_STATE" 2>/dev/null) || return 1
  # A login node without a GPU keeps what a GPU node that shares the checkout has made.
  [ "$state" = "$(wanted_state)" ] || [ "$state" = "$(wanted_state gpu)" ]
}

# Modules are compiled when they are first imported: compiling all of them takes longer than installing
# them, and half of them belong to one cloud's SDK.
pip_install() {
  "$VENV/bin/pip" install -qq --no-compile -c "$ROOT/constraints.txt" "$@"
}

# On Linux the default torch wheels are CUDA builds with gigabytes of nvidia-* wheels; the CPU build has
# the local version +cpu. Try pip's configured sources first, then PyTorch's index.
install_cpu_torch() {
  local version
  version=$(sed -n 's/^torch==//p' "$ROOT/constraints.txt")
  pip_install "torch==$version+cpu" 2>/dev/null ||
    pip_install "torch==$version+cpu" --extra-index-url "$CPU_INDEX" ||
    die "no GPU was found (nvidia-smi), and pip found no CPU build of torch for" \
      "$("$VENV/bin/python" --version), neither in its configured sources nor at $CPU_INDEX." \
      "Put torch-$version+cpu-*.whl into a directory, set PIP_FIND_LINKS to it, and start again"
}

# pip takes an installed CPU build for the version that is wanted.
remove_cpu_torch() {
  if "$VENV/bin/python" -c '
import sys
from importlib.metadata import version
sys.exit(not version("torch").endswith("+cpu"))' 2>/dev/null; then
    "$VENV/bin/pip" uninstall -qq -y torch
  fi
}

# Whether .venv holds a torch that is not a CPU build: made by hand or on a GPU node that shares the
# checkout, whose jobs may be using it.
has_gpu_torch() {
  [ "$(cat "$VENV_STATE" 2>/dev/null)" != unfinished ] && [ -x "$VENV/bin/python" ] &&
    "$VENV/bin/python" -c '
import sys
from importlib.metadata import version
sys.exit(version("torch").endswith("+cpu"))' 2>/dev/null
}

# Without a GPU a CUDA build is gigabytes of no use: make sure that no dependency has installed one.
refuse_cuda() {
  local found
  found=$("$VENV/bin/python" - <<'PY'
import runpy
from importlib.metadata import distributions
from importlib.util import find_spec

found = [d.name for d in distributions() if d.name.lower().startswith("nvidia-")]
version = runpy.run_path(find_spec("torch").submodule_search_locations[0] + "/version.py")
print(*found, *(["torch for CUDA " + version["cuda"]] if version["cuda"] else []), sep=", ")
PY
  ) || die "$VENV: torch is not installed properly; remove $VENV and start again"
  [ -z "$found" ] || die "$VENV: no GPU was found (nvidia-smi), yet CUDA packages were installed ($found);" \
    "remove $VENV, install the CPU wheel of torch ($CPU_INDEX) and start again"
}

# Streaming requires torchvision, for image formats that nothing here uses. The package index's build is
# for CUDA and cannot be imported beside CPU torch; transformers, which finds it, then loads no model.
remove_broken_torchvision() {
  "$VENV/bin/python" -c 'import torchvision' 2>/dev/null ||
    "$VENV/bin/pip" uninstall -qq -y torchvision
}

make_venv() {
  local python gpu='' started=$SECONDS
  python=$(find_python)
  if has_gpu || has_gpu_torch; then gpu=gpu; fi
  # Remove only what this script left unfinished: pip treats half-written packages as installed.
  if [ "$(cat "$VENV_STATE" 2>/dev/null)" = unfinished ] || [ ! -x "$VENV/bin/python" ]; then
    rm -rf "$VENV"
  fi
  echo "installing calm_dist into $VENV (some minutes) ..."
  if [ ! -d "$VENV" ]; then
    # Write the state first, so that an interrupted `python -m venv` is recognised as well.
    mkdir "$VENV" && echo unfinished >"$VENV_STATE"
    "$python" -m venv "$VENV" || die "$python -m venv $VENV failed"
  elif [ -n "$gpu" ] && has_gpu_torch; then
    # Jobs may be using it: the next start may not remove it if this one is interrupted.
    rm -f "$VENV_STATE"
  elif [ -e "$VENV_STATE" ]; then
    echo unfinished >"$VENV_STATE"
  fi
  if [ -n "$gpu" ]; then remove_cpu_torch; elif [ "$(uname -s)" = Linux ]; then install_cpu_torch; fi
  pip_install -e "$ROOT[dev]" ||
    die "pip could not install calm_dist (see its messages above); fix the cause and start again"
  [ -n "$gpu" ] || { refuse_cuda && remove_broken_torchvision; }
  wanted_state $gpu >"$VENV_STATE"
  echo "installed in $((SECONDS - started)) s"
}

# Create or update .venv, and put it first in PATH. Costs nothing if it is current.
ensure_venv() {
  export PIP_DISABLE_PIP_VERSION_CHECK=1
  if ! is_current; then
    # One installation at a time, if system and file system have flock.
    # NFS locks only files that are open for writing.
    if [ -w "$ROOT/setup.py" ]; then exec 8<>"$ROOT/setup.py"; else exec 8<"$ROOT/setup.py"; fi
    if command -v flock >/dev/null; then flock 8 2>/dev/null || true; fi
    is_current || make_venv
    exec 8<&-
  fi
  export PATH="$VENV/bin:$PATH" VIRTUAL_ENV="$VENV"
  # .venv keeps what imports compile (see pip_install).
  unset PYTHONDONTWRITEBYTECODE
}
