"""Load the authors' released checkpoints as models, and write ours in their layout.

The layout is a directory with ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin``,
in one file or several with an index. Pickles are read as data only, never executed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from calm_dist.released.autoencoder import load_autoencoder, save_autoencoder

if TYPE_CHECKING:
    from calm_dist.inference.loading import LoadedModel

__all__ = ["load_autoencoder", "load_calm", "save_autoencoder"]


def load_calm(
    directory: str | Path, autoencoder: str | Path | None = None, device: str = "cpu"
) -> LoadedModel:
    """Load a released CALM in eval mode, fp32, on Megatron's backbone, into this process alone.

    It can be used like a model from `inference.load.load_model`.

    Args:
        directory: directory of the checkpoint.
        autoencoder: overrides ``ae_path`` of ``config.json``. That path is tried as given, then
            relative to the weights' directory, then to its parent; if it exists nowhere, the
            autoencoder inside the weights is used.
        device: device of all weights.

    Raises:
        CheckpointError: a file is missing, damaged, or from a model that the backbone does not
            support.
    """
    # Imported here because it takes seconds.
    from calm_dist.inference.loading import load_released

    return load_released(directory, autoencoder, device)
