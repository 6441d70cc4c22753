"""File names of the released checkpoints, for those who need no tensors."""

from __future__ import annotations

from pathlib import Path

from calm_dist.errors import CheckpointError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PICKLED_WEIGHTS_FILE = "pytorch_model.bin"


def weights_file(directory: str | Path) -> Path:
    """The weights file of a model directory.

    Raises:
        CheckpointError: there is none.
    """
    for name in (WEIGHTS_FILE, PICKLED_WEIGHTS_FILE):
        path = Path(directory) / name
        if path.is_file():
            return path
    raise CheckpointError(
        f"{directory}: holds neither {WEIGHTS_FILE} nor {PICKLED_WEIGHTS_FILE}; "
        "give the directory of an autoencoder checkpoint"
    )
