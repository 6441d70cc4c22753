"""The layout of the authors' released checkpoints: ``config.json`` and a weights file.

Our own autoencoders are written in it too, so that one loader serves both.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from calm_dist.errors import CheckpointError
from calm_dist.interop.layout import CONFIG_FILE, WEIGHTS_FILE, weights_file
from calm_dist.models.autoencoder import Autoencoder, AutoencoderConfig

# The released files hold the tied output matrix under a name of its own.
TIED_OUTPUT = "decoder.lm_head_weight"


def load_autoencoder(directory: str | Path) -> Autoencoder:
    """An autoencoder in eval mode, fp32, frozen, on the CPU.

    Pickled weights are read as data only (``weights_only``).

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit the configuration.
    """
    directory = Path(directory)
    config = _read_config(directory / CONFIG_FILE)
    path = weights_file(directory)
    weights = _read_weights(path)
    weights.pop(TIED_OUTPUT, None)
    # Built without memory: every weight comes from the file.
    with torch.device("meta"):
        model = Autoencoder(config)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: does not fit {CONFIG_FILE}: {error}") from error
    return model.float().eval().requires_grad_(False)


def save_autoencoder(model: Autoencoder, directory: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` into an existing directory."""
    directory = Path(directory)
    config = {
        "model_type": "autoencoder",
        "architectures": ["Autoencoder"],
        "torch_dtype": "float32",
        **dataclasses.asdict(model.config),
    }
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, directory / WEIGHTS_FILE, metadata={"format": "pt"})


def _read_config(path: Path) -> AutoencoderConfig:
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(raw, dict) or "vocab_size" not in raw or "latent_size" not in raw:
        raise CheckpointError(f"{path}: is not the configuration of an autoencoder")
    # The released code has one dropout for both the latent and the tokens.
    raw.setdefault("token_dropout", raw.get("ae_dropout", 0.15))
    known = {field.name for field in dataclasses.fields(AutoencoderConfig)}
    return AutoencoderConfig(**{name: value for name, value in raw.items() if name in known})


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, EOFError) as error:
        raise CheckpointError(f"{path}: damaged or not a weights file ({error})") from error
    except Exception as error:  # pickle.UnpicklingError names no common base of its own
        raise CheckpointError(f"{path}: refused, it holds more than tensors ({error})") from error
