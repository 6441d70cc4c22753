"""Which part of a step, and which line of code, an operation belongs to: from the Python stack."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

_OWN = str(Path(__file__).parent)
_PACKAGES = ("calm_dist", "megatron", "deepspeed")

# Only passes calls on to torch.
_PASSED_ON = "deepspeed/accelerator/"

OPTIMIZER = "optimizer"
ENGINE = "head's ZeRO engine"
OTHER = "other"

# The first that the path of a source file contains decides. Frames of other files are passed over:
# who called them decides.
_PARTS = (
    ("calm_dist/parallel/noise.py", "noise"),
    ("calm_dist/losses/energy", "energy score"),
    ("calm_dist/models/heads/noise", "noise"),
    ("calm_dist/models/heads/", "head"),
    ("calm_dist/models/autoencoder.py", "autoencoder"),
    ("calm_dist/losses/autoencoder.py", "autoencoder"),
    ("calm_dist/models/patch_embedding.py", "embedding"),
    ("calm_dist/models/patch_tokens.py", "embedding"),
    ("megatron/core/models/common/embeddings/language_model_embedding", "embedding"),
    ("calm_dist/models/output_layer.py", "output layer and loss"),
    ("calm_dist/losses/linear_cross_entropy.py", "output layer and loss"),
    ("calm_dist/models/", "backbone"),
    ("megatron/core/transformer/", "backbone"),
    ("megatron/core/models/", "backbone"),
    ("megatron/core/distributed/", "gradient buffers"),
    ("torch/nn/parallel/distributed.py", "gradient buffers"),
    ("megatron/core/pipeline_parallel/p2p_communication", "pipeline messages"),
    ("megatron/core/pipeline_parallel/", "schedule"),
    ("calm_dist/training/optimizer.py", OPTIMIZER),
    ("megatron/core/optimizer/", OPTIMIZER),
    ("torch/optim/", OPTIMIZER),
    ("deepspeed/", ENGINE),
    ("calm_dist/parallel/pipeline.py", "batch and loss"),
    ("calm_dist/training/", "batch and loss"),
)


@functools.cache
def _part_of_file(file: str) -> str | None:
    path = "/".join(_installed(file))
    return next((part for pattern, part in _PARTS if pattern in path), None)


def _frames() -> Iterator[FrameType]:
    """Frames outside this room, from the innermost."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_OWN):
            yield frame
        frame = frame.f_back


def part_here() -> str | None:
    """The part that the caller works for; None if only the autograd engine knows."""
    found = None
    for frame in _frames():
        code = frame.f_code
        if code.co_filename.endswith("torch/autograd/graph.py") and found is None:
            return None
        part = _part_of_file(code.co_filename)
        if part is None or (part == "head" and "noise" in code.co_name):
            # A head's function that draws is called by the source of noise.
            continue
        if part != ENGINE:
            # The engine's own work is that of the optimizer, if that called it.
            return part if found is None or part == OPTIMIZER else found
        found = part
    return found or OTHER


def is_inside(function: str) -> bool:
    """Whether a function of that name is being called."""
    return any(frame.f_code.co_name == function for frame in _frames())


def line_here(besides: str = "") -> str:
    """``file:line`` of the innermost frame of this package or of the libraries under it, and of
    this package if that is another one.

    Args:
        besides: start of paths, from their package on, whose frames do not count.
    """
    lines: list[str] = []
    for frame in _frames():
        file = relative(frame.f_code.co_filename)
        if file is None or file.startswith(_PASSED_ON) or (besides and file.startswith(besides)):
            continue
        lines.append(f"{file}:{frame.f_lineno}")
        if file.startswith("calm_dist/"):
            break
    return " < ".join(dict.fromkeys((*lines[:1], *lines[-1:]))) or "unknown"


def _installed(file: str) -> tuple[str, ...]:
    """The parts of a path; of an installed module, those after the folder of packages. A checkout
    is often called as a package is, and holds a virtual environment."""
    parts = Path(file).parts
    for place in range(len(parts) - 1, -1, -1):
        if parts[place] in ("site-packages", "dist-packages"):
            return parts[place + 1 :]
    return parts


@functools.cache
def relative(file: str) -> str | None:
    """A path from its package on; None for files of other packages."""
    parts = _installed(file)
    for package in _PACKAGES:
        if package in parts:
            first = len(parts) - 1 - parts[::-1].index(package)
            return "/".join(parts[first:])
    return None
