"""Restricts what may be unpickled from a checkpoint.

PyTorch's distributed checkpoints keep the shapes and offsets of tensors in a pickle, ``.metadata``,
and read it with `pickle.load`, which runs any code that a pickle names (torch 2.13). Therefore it
is first measured and read here, by an unpickler that accepts only the names of such descriptions.
The libraries themselves read all other pickled parts with ``weights_only``.
"""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    Metadata,
    MetadataIndex,
)

from calm_dist.errors import CheckpointError
from calm_dist.pickles import check_pickle, load_weights

DESCRIPTION = ".metadata"
_OTHER_FILES = ("common.pt", "metadata.json")

_DESCRIPTIONS = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


class _DescriptionUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # Pickles of protocol 2 have Python 2's name of the module.
        if module in ("builtins", "__builtin__") and name == "getattr":
            return _memory_format
        is_dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if is_dtype or name in _DESCRIPTIONS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _memory_format(kind: Any, name: str) -> _MEM_FORMAT_ENCODING:
    """Stands in for the ``getattr`` with which Python 3.11.0 to 3.11.3 pickle the enumeration;
    refuses any other use."""
    if kind is not _MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError("it names builtins.getattr")
    return _MEM_FORMAT_ENCODING[name]


def read_description(path: Path) -> Metadata:
    """Read a ``.metadata``, refusing one that holds anything but descriptions of tensors.

    Raises:
        CheckpointError: it is refused, missing or damaged; none of its code was executed.
    """
    try:
        data = path.read_bytes()
        check_pickle(data)
        description = _DescriptionUnpickler(io.BytesIO(data)).load()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(
            f"{path}: refused, it is not a description of tensors ({_line(error)}); restore the "
            "file, or use another checkpoint"
        ) from error
    if not isinstance(description, Metadata):
        raise CheckpointError(f"{path}: refused, it is not a description of tensors")
    return description


def tensor_files(directory: Path) -> set[str]:
    """Names of all files of a distributed checkpoint, after checking them against its description.

    Raises:
        CheckpointError: a file is missing or shorter than its tensors, or the description is
            refused.
    """
    path = directory / DESCRIPTION
    description = read_description(path)
    _check_other_files(directory)
    try:
        return _check_places(directory, description)
    except CheckpointError:
        raise
    except Exception as error:  # its values may be anything
        raise CheckpointError(f"{path}: damaged ({_line(error)})") from error


def _check_other_files(directory: Path) -> None:
    common, config = (directory / name for name in _OTHER_FILES)
    try:
        load_weights(common)
    except Exception as error:  # damaged bytes may raise anything
        raise CheckpointError(f"{common}: missing or damaged ({_line(error)})") from error
    try:
        backend = json.loads(config.read_text(encoding="utf-8"))["sharded_backend"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{config}: missing or damaged ({_line(error)})") from error
    if backend != "torch_dist":
        raise CheckpointError(f"{config}: damaged; it names {backend!r} instead of torch_dist")


def _check_places(directory: Path, description: Metadata) -> set[str]:
    path, stored = directory / DESCRIPTION, description.storage_data or {}
    if not description.state_dict_metadata:
        raise CheckpointError(f"{path}: damaged; it describes no tensor")
    for name, tensor in description.state_dict_metadata.items():
        for chunk in getattr(tensor, "chunks", ()):
            if MetadataIndex(name, chunk.offsets) not in stored:
                raise CheckpointError(f"{path}: damaged; it gives no location for {name}")
    names = {DESCRIPTION, *_OTHER_FILES}
    for index, info in stored.items():
        file = directory / info.relative_path
        if file.parent != directory or not file.is_file():
            raise CheckpointError(
                f"{file}: missing, although {path} says that {index.fqn} is in it; run.dir must "
                "be on a file system that all nodes share"
            )
        if info.offset < 0 or info.length <= 0:
            raise CheckpointError(
                f"{path}: damaged; the location of {index.fqn} in {file.name} is invalid"
            )
        if info.transform_descriptors:
            raise CheckpointError(
                f"{path}: refused, {index.fqn} is encoded ({info.transform_descriptors!r:.80}); "
                "tensors must be stored unencoded"
            )
        if info.offset + info.length > file.stat().st_size:
            raise CheckpointError(f"{file}: too short for {index.fqn}, which {path} says is in it")
        names.add(info.relative_path)
    return names


def _line(error: Exception) -> str:
    """The first line of a message, shortened, since it may quote much of a file."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
