"""Read and write autoencoders in the authors' released layout, which ours use as well."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from calm_dist.errors import CheckpointError
from calm_dist.models.autoencoder import Autoencoder, AutoencoderConfig
from calm_dist.released.config import autoencoder_config, autoencoder_values
from calm_dist.released.files import CONFIG_FILE
from calm_dist.released.names import TIED_OUTPUT
from calm_dist.released.tensors import Tensors, read_tensors, write_weights


def load_autoencoder(directory: str | Path) -> Autoencoder:
    """An autoencoder in eval mode, fp32, frozen, on the CPU.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit the configuration.
    """
    return build_autoencoder(autoencoder_values(directory), read_tensors(directory), CONFIG_FILE)


def build_autoencoder(config: AutoencoderConfig, tensors: Tensors, source: str) -> Autoencoder:
    """`load_autoencoder` from tensors; ``source`` names the origin of the sizes in errors."""
    layers = config.num_encoder_layers + config.num_decoder_layers
    if layers > len(tensors.values):
        raise CheckpointError(
            f"{tensors.directory}: {source} asks for {layers} layers, but the weights have only "
            f"{len(tensors.values)} tensors"
        )
    # On the meta device, without memory: every weight comes from the file.
    try:
        with torch.device("meta"):
            model = Autoencoder(config)
    except RuntimeError as error:
        raise CheckpointError(
            f"{tensors.directory}: {source} asks for tensors that are too large ({error})"
        ) from error
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    embedding, output = TIED_OUTPUT
    tensors = tensors.tied([TIED_OUTPUT])
    tensors.check(shapes | {output: shapes[embedding]}, source)
    # Copy: the files may be changed or removed while the model is in use.
    weights = {name: tensors.values[name].to(torch.float32, copy=True) for name in shapes}
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def config_from_tensors(tensors: Tensors) -> AutoencoderConfig:
    """Derive the configuration from the shapes, if there is no ``config.json``.

    Values that no shape shows (dropouts, the epsilon of the norms) are the released defaults.

    Raises:
        CheckpointError: a tensor that is needed for this is missing or not a matrix.
    """
    tensors = tensors.tied([TIED_OUTPUT])

    def matrix(name: str) -> torch.Size:
        if name not in tensors or tensors.values[name].ndim != 2:
            raise CheckpointError(
                f"{tensors.directory}: the autoencoder inside the weights has no matrix {name}; "
                "give the directory of an autoencoder"
            )
        return tensors.values[name].shape

    def layers(part: str) -> int:
        found = (re.match(rf"{part}\.{part}_layers\.(\d+)\.", name) for name in tensors)
        return max((int(match[1]) + 1 for match in found if match), default=0)

    vocab_size, hidden_size = matrix(TIED_OUTPUT[0])
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "patch_size": matrix("encoder.squeeze_layer.weight")[1] // max(hidden_size, 1),
        "latent_size": matrix("decoder.latent_to_hidden.weight")[1],
        "intermediate_size": matrix("encoder.encoder_layers.0.mlp.gate_proj.weight")[0],
        "num_encoder_layers": layers("encoder"),
        "num_decoder_layers": layers("decoder"),
    }
    try:
        return AutoencoderConfig(**sizes)
    except ValueError as error:
        raise CheckpointError(
            f"{tensors.directory}: the autoencoder inside the weights: {error}"
        ) from error


def released_autoencoder(model: Autoencoder) -> dict[str, torch.Tensor]:
    """All tensors of a released autoencoder, the tied one under the name of the output matrix.

    From that name alone the authors' class (transformers 4.43) loads the one parameter that both
    of its modules share. From a file with both names it makes two parameters, which diverge in
    training; from a file with only the embedding it leaves the output matrix random.
    """
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    embedding, output = TIED_OUTPUT
    weights[output] = weights.pop(embedding)
    return weights


def save_autoencoder(
    model: Autoencoder,
    directory: str | Path,
    token_ids: Mapping[str, int | None] | None = None,
) -> None:
    """Write ``config.json`` and ``model.safetensors`` into an existing directory.

    The authors' class and `load_autoencoder` can read them.

    Args:
        token_ids: ids of the begin, end and padding tokens for the configuration.
    """
    directory = Path(directory)
    config = autoencoder_config(model.config, token_ids or {})
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_weights(released_autoencoder(model), directory)
