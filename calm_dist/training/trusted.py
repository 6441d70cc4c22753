"""What may be unpickled from a checkpoint.

PyTorch's distributed checkpoints keep the shapes and places of tensors in a pickle, ``.metadata``,
and read it with `pickle.load`, which runs whatever code a pickle names (torch 2.13). So it is read
here first, by an unpickler that knows the names of such descriptions and no others. All other
pickled parts are read with ``weights_only`` by the libraries themselves.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from calm_dist.errors import CheckpointError

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
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
}


class _DescriptionUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _DESCRIPTIONS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def check_description(path: Path) -> None:
    """Refuse a ``.metadata`` that holds anything but descriptions of tensors.

    Raises:
        CheckpointError: it does, is missing, or is damaged; nothing of it was executed.
    """
    try:
        with path.open("rb") as file:
            _DescriptionUnpickler(file).load()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        raise CheckpointError(
            f"{path}: refused, it is no description of tensors ({error}); restore the file, or "
            "use another checkpoint"
        ) from error
