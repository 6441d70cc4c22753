"""The authors' released checkpoints as models, and ours in their layout.

A directory with ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin``, in one file or
several with an index. Pickles are read as data only, never executed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from calm_dist.released.autoencoder import load_autoencoder, save_autoencoder

if TYPE_CHECKING:
    from calm_dist.inference.load import LoadedModel

__all__ = ["load_autoencoder", "load_calm", "save_autoencoder"]


def load_calm(
    directory: str | Path, autoencoder: str | Path | None = None, device: str = "cpu"
) -> LoadedModel:
    """A released CALM in eval mode, fp32, on Megatron's backbone, in this process alone.

    It evaluates and generates like a model of `inference.load.load_model`.

    Args:
        directory: of the checkpoint.
        autoencoder: overrides ``ae_path`` of ``config.json``, which is looked for as given, then
            beside the weights, then beside their directory; where it is nowhere, the autoencoder
            inside the weights serves.
        device: of all weights.

    Raises:
        CheckpointError: a file is missing, damaged, or of a model that the backbone cannot be.
    """
    # The whole model is assembled above this layer.
    from calm_dist.inference.load import load_released

    return load_released(directory, autoencoder, device)
