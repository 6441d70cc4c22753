"""File names of the released checkpoints; needs no torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from calm_dist.errors import CheckpointError
from calm_dist.runs.checkpoints import CHECKPOINTS, MANIFEST

CONFIG_FILE = "config.json"
RELEASED_CONFIG_FILE = "released_config.json"
"""The ``config.json`` from which a run was imported, kept next to its recipe."""
WEIGHTS_FILE = "model.safetensors"
PICKLED_WEIGHTS_FILE = "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"


def is_released(path: str | Path) -> bool:
    """Whether a directory is in the authors' layout, and neither a run nor a checkpoint of ours."""
    path = Path(path)
    ours = (MANIFEST, CHECKPOINTS)
    return (path / CONFIG_FILE).is_file() and not any((path / name).exists() for name in ours)


def weights_file(directory: str | Path) -> Path:
    """The only weights file of a model directory.

    Raises:
        CheckpointError: there is none, or the weights are spread over several.
    """
    for name in (WEIGHTS_FILE, PICKLED_WEIGHTS_FILE):
        path = Path(directory) / name
        if path.is_file():
            return path
        if (index := path.with_name(name + INDEX_SUFFIX)).is_file():
            raise CheckpointError(
                f"{index}: the weights are spread over several files; write them into one with "
                "tools/convert_checkpoint.py import-hf"
            )
    raise CheckpointError(
        f"{directory}: has neither {WEIGHTS_FILE} nor {PICKLED_WEIGHTS_FILE}, in one file or "
        f"with {INDEX_SUFFIX}; give the directory of a released checkpoint"
    )


def weight_files(directory: str | Path) -> dict[Path, frozenset[str] | None]:
    """The weights files of a model directory, each with the tensors that the index assigns to it.

    A single file has no index; None then stands for all tensors in the file.

    Raises:
        CheckpointError: there is none, or the index is damaged or names a file outside the
            directory.
    """
    directory = Path(directory)
    for name in (WEIGHTS_FILE, PICKLED_WEIGHTS_FILE):
        if (directory / name).is_file():
            break
        if (index := directory / (name + INDEX_SUFFIX)).is_file():
            return _files_of_index(index, Path(name).suffix)
    return {weights_file(directory): None}


def _files_of_index(index: Path, suffix: str) -> dict[Path, frozenset[str] | None]:
    content = read_json(index)
    placed = content.get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{index}: has no weight_map of tensor names to file names")
    for tensor, name in placed.items():
        # Only plain names: a downloaded index must not make us read files elsewhere.
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix != suffix:
            raise CheckpointError(
                f"{index}: places {tensor} in {name!r}; it must be the name of a {suffix} file in "
                "the same directory"
            )
    return {
        index.with_name(name): frozenset(tensor for tensor in placed if placed[tensor] == name)
        for name in sorted(set(placed.values()))
    }


def read_config(directory: str | Path) -> dict[str, Any]:
    """``config.json`` of a model directory.

    Raises:
        CheckpointError: it is missing, or not a JSON object.
    """
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; give the directory of a released checkpoint")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is missing or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text, parse_float=_number, parse_constant=_number)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return values


def _number(text: str) -> float:
    """Parse a number of a JSON file; Python's parser would accept infinity and NaN."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a valid JSON number, or too large")
    return value
