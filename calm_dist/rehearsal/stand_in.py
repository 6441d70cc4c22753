"""A stand-in for the CUDA runtime and driver: torch finds GPUs where there are none.

The C sources beside this file are compiled on first use, against the headers that a CUDA build of
torch brings, into the user's cache. A process that loads them (`environment`) sees eight GPUs of
one kind, on which nothing is computed. Nothing here needs torch to be imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import runpy
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from calm_dist.costs.clusters import Cluster
from calm_dist.errors import UserError

SOURCES = Path(__file__).parent
HEADER = "cuda_runtime_api.h"
RUNTIME, DRIVER = "libcalm_cuda_runtime.so", "libcuda.so.1"


@dataclass(frozen=True)
class Chip:
    """What torch asks a kind of GPU for, to choose its kernels."""

    name: str
    capability: int
    """Compute capability times ten."""
    multiprocessors: int


CHIPS = {
    "a100-sxm-80": Chip("NVIDIA A100-SXM4-80GB", 80, 108),
    "h100-sxm": Chip("NVIDIA H100 80GB HBM3", 90, 132),
    "h200-sxm": Chip("NVIDIA H200", 90, 132),
    "b200": Chip("NVIDIA B200", 100, 148),
}


def cuda_of_torch() -> str:
    """Version of CUDA that the installed torch is built for, without importing it.

    Raises:
        UserError: torch is not installed, or is not a CUDA build.
    """
    roots = _roots("torch")
    if not roots:
        raise UserError(f"torch is not installed; {_how_to_install()}")
    version = runpy.run_path(str(roots[0] / "version.py"))
    if not version.get("cuda"):
        raise UserError(
            f"torch {version['__version__']} is a CPU build; a rehearsal runs the CUDA code of "
            f"torch, though it needs no GPU; {_how_to_install()}"
        )
    return str(version["cuda"])


def _how_to_install() -> str:
    return (
        "make an environment of its own with the default build of torch for Linux (about 6 GB): "
        "python3.11 -m venv cuda_env; cuda_env/bin/pip install torch; "
        "cuda_env/bin/pip install -e . (see docs/rehearsal.md)"
    )


def compile_libraries() -> Path:
    """Compile both libraries, unless they have been; returns their directory.

    Raises:
        UserError: there is no C compiler, or no header of the CUDA runtime.
    """
    headers = _headers()
    sources = [SOURCES / "cuda_runtime.c", SOURCES / "cuda_driver.c"]
    key = hashlib.sha256(b"".join(source.read_bytes() for source in sources))
    key.update(next(path for d in headers if (path := d / HEADER).is_file()).read_bytes())
    directory = _cache() / key.hexdigest()[:16]
    if (directory / DRIVER).is_file():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    for source, name in zip(sources, (RUNTIME, DRIVER), strict=True):
        _compile(source, headers, directory / name)
    return directory


def _compile(source: Path, headers: list[Path], library: Path) -> None:
    compiler = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("cc")
    if compiler is None:
        raise UserError("gcc: not found; a rehearsal compiles two small C files, install gcc")
    with tempfile.TemporaryDirectory(dir=library.parent) as place:
        made = Path(place) / library.name
        command = [compiler, "-shared", "-fPIC", "-O1", "-w", *(f"-I{h}" for h in headers)]
        done = subprocess.run(
            [*command, str(source), "-o", str(made)], capture_output=True, text=True
        )
        if done.returncode:
            raise UserError(f"{source}: {compiler} cannot compile it: {done.stderr[-2000:]}")
        # Another rehearsal may be compiling the same file.
        made.replace(library)


def _headers() -> list[Path]:
    """Directories of headers of the CUDA runtime: NVIDIA's packages', which are of torch's version,
    then Triton's copy, which also has what the packages split off, then a CUDA toolkit's.

    Raises:
        UserError: ``cuda_runtime_api.h`` is in none of them.
    """
    places = [
        *(path for root in _roots("nvidia") for path in sorted(root.glob("*/include"))),
        *(root / "backends" / "nvidia" / "include" for root in _roots("triton")),
        Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include",
    ]
    if not any((directory / HEADER).is_file() for directory in places):
        raise UserError(
            f"{HEADER}: not found, neither in NVIDIA's and Triton's Python packages nor in "
            "$CUDA_HOME; pip install nvidia-cuda-runtime of the version that torch is built for"
        )
    return places


def _roots(package: str) -> list[Path]:
    """Directories of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    return [Path(place) for place in (spec and spec.submodule_search_locations) or ()]


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "calm_dist" / "rehearsal"


def environment(libraries: Path, gpu: Cluster) -> dict[str, str]:
    """Variables of a process that sees GPUs of this kind."""
    chip = CHIPS[gpu.name]
    preloaded = os.environ.get("LD_PRELOAD")
    search = os.environ.get("LD_LIBRARY_PATH")
    return {
        "LD_PRELOAD": os.pathsep.join(filter(None, (str(libraries / RUNTIME), preloaded))),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, (str(libraries), search))),
        "CALM_REHEARSAL_GPUS": str(gpu.gpus_per_node),
        "CALM_REHEARSAL_NAME": chip.name,
        "CALM_REHEARSAL_CAPABILITY": str(chip.capability),
        "CALM_REHEARSAL_MULTIPROCESSORS": str(chip.multiprocessors),
        "CALM_REHEARSAL_MEMORY": str(int(gpu.memory)),
    }
