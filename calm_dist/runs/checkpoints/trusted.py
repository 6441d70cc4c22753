"""What may be unpickled from a checkpoint.

PyTorch's distributed checkpoints keep the shapes and places of tensors in a pickle, ``.metadata``,
and read it with `pickle.load`, which runs whatever code a pickle names (torch 2.13). So it is
measured and read here first, by an unpickler that knows the names of such descriptions and no
others. All other pickled parts are read with ``weights_only`` by the libraries themselves.
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
    """What Python 3.11.0 to 3.11.3 pickle as ``getattr`` of the enumeration; of nothing else."""
    if kind is not _MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError("it names builtins.getattr")
    return _MEM_FORMAT_ENCODING[name]


def read_description(path: Path) -> Metadata:
    """Read a ``.metadata``, refusing one that holds anything but descriptions of tensors.

    Raises:
        CheckpointError: it does, is missing, or is damaged; nothing of it was executed.
    """
    try:
        data = path.read_bytes()
        check_pickle(data)
        description = _DescriptionUnpickler(io.BytesIO(data)).load()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        raise CheckpointError(
            f"{path}: refused, it is no description of tensors ({_line(error)}); restore the "
            "file, or use another checkpoint"
        ) from error
    if not isinstance(description, Metadata):
        raise CheckpointError(f"{path}: refused, it is no description of tensors")
    return description


def tensor_files(directory: Path) -> set[str]:
    """Names of all files of a distributed checkpoint, checked to hold what it says they hold.

    Raises:
        CheckpointError: one is missing or shorter than its tensors, or the description is refused.
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
    except Exception as error:  # whatever its bytes lead to
        raise CheckpointError(f"{common}: missing or damaged ({_line(error)})") from error
    try:
        backend = json.loads(config.read_text(encoding="utf-8"))["sharded_backend"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{config}: missing or damaged ({_line(error)})") from error
    if backend != "torch_dist":
        raise CheckpointError(f"{config}: damaged; it speaks of {backend!r}, not of torch_dist")


def _check_places(directory: Path, description: Metadata) -> set[str]:
    path, stored = directory / DESCRIPTION, description.storage_data or {}
    if not description.state_dict_metadata:
        raise CheckpointError(f"{path}: damaged; it describes no tensor")
    for name, tensor in description.state_dict_metadata.items():
        for chunk in getattr(tensor, "chunks", ()):
            if MetadataIndex(name, chunk.offsets) not in stored:
                raise CheckpointError(f"{path}: damaged; it has no place for {name}")
    names = {DESCRIPTION, *_OTHER_FILES}
    for index, info in stored.items():
        file = directory / info.relative_path
        if file.parent != directory or not file.is_file():
            raise CheckpointError(
                f"{file}: missing, although {path} says that {index.fqn} is in it; run.dir must "
                "be on a file system that all nodes share"
            )
        if info.offset < 0 or info.length <= 0:
            raise CheckpointError(f"{path}: damaged; {index.fqn} is at no place of {file.name}")
        if info.transform_descriptors:
            raise CheckpointError(
                f"{path}: refused, {index.fqn} is packed ({info.transform_descriptors!r:.80}); "
                "tensors are stored as they are"
            )
        if info.offset + info.length > file.stat().st_size:
            raise CheckpointError(f"{file}: too short for {index.fqn}, which {path} says is in it")
        names.add(info.relative_path)
    return names


def _line(error: Exception) -> str:
    """The first line of a message, which may quote much of a file."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
