"""Language models in the authors' released layout: read them, fill a model, name its tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from calm_dist.costs import flops
from calm_dist.errors import CheckpointError, RecipeError, listed
from calm_dist.models.autoencoder import Autoencoder
from calm_dist.recipe import CalmModel, LanguageModelRecipe, Recipe
from calm_dist.released.autoencoder import (
    build_autoencoder,
    config_from_tensors,
    released_autoencoder,
)
from calm_dist.released.config import calm_values, released_head
from calm_dist.released.files import CONFIG_FILE, read_config
from calm_dist.released.names import (
    AUTOENCODER,
    backbone_rules,
    released_shapes,
    rules_for,
    to_released,
)
from calm_dist.released.tensors import Tensors, read_tensors

DATA_PATH = "data/latents/train"
"""``data.path`` of a recipe for a released checkpoint: the one of recipes/calm_m.yaml."""


@dataclass(frozen=True)
class ReleasedCalm:
    """The weights of a released language model, left in their files until they are used."""

    directory: Path
    tensors: Tensors

    @torch.no_grad()
    def copy_into(self, model: CalmModel, backbone: nn.Module, head: nn.Module) -> None:
        """Fill a whole backbone and a head of this recipe with the weights, in their own dtype.

        Raises:
            CheckpointError: a tensor is missing, unknown or of another shape.
        """
        prefixes = released_head(model.head).prefixes
        of_head = dict(head.named_parameters())
        tensors = self.tensors.tied(
            (prefixes[0] + name, prefix + name) for prefix in prefixes[1:] for name in of_head
        )
        shapes = released_shapes(model) | {
            prefix + name: tuple(parameter.shape)
            for prefix in prefixes
            for name, parameter in of_head.items()
        }
        inside = {name: tuple(tensors.values[name].shape) for name in _autoencoder_names(tensors)}
        tensors.check(shapes | inside, CONFIG_FILE)
        of_backbone = dict(backbone.named_parameters())
        for rule in rules_for(model, of_backbone):
            released = [tensors.values[name] for name in rule.released]
            of_backbone[rule.ours].copy_(rule.join(released))
        for name, parameter in of_head.items():
            parameter.copy_(tensors.values[prefixes[0] + name])

    def backbone(self, model: CalmModel) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and whole tensor of each of our backbone's parameters, one at a time.

        Raises:
            CheckpointError: tensors are missing, of another shape or left over (more layers); the
                message lists them.
        """
        shapes = released_shapes(model)
        parts = {name.split(".")[0] for name in shapes}
        left_over = [
            f"{name} is not here"
            for name in self.tensors.values
            if name.split(".")[0] in parts and name not in shapes
        ]
        self._refuse_misfits(self.misfits(shapes) + left_over)
        for rule in backbone_rules(model):
            yield rule.ours, rule.join([self.tensors.values[name] for name in rule.released])

    def head(self, prefix: str, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The head's tensors of these names, without the prefix of the released ones."""
        return {name: self.tensors.values[prefix + name] for name in names}

    def misfits(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Of the released tensors of these names, those that are missing or of another shape."""
        held = self.tensors.values
        return [
            f"{name} {list(shape)} is not there"
            if name not in held
            else f"{name} {list(held[name].shape)} there, {list(shape)} here"
            for name, shape in shapes.items()
            if name not in held or tuple(held[name].shape) != shape
        ]

    def _refuse_misfits(self, misfits: list[str]) -> None:
        if misfits:
            raise CheckpointError(f"its backbone does not fit the recipe's: {listed(misfits, 5)}")

    def check_size(self, recipe: Recipe) -> None:
        """Check the number of parameters before memory is allocated for them.

        Raises:
            CheckpointError: the recipe, made from ``config.json``, needs far more than the weight
                files contain.
        """
        asked = flops.count(recipe, tokens=0).parameters
        held = sum(tensor.numel() for tensor in self.tensors.values.values())
        if asked > 2 * held:
            raise CheckpointError(
                f"{self.directory / CONFIG_FILE}: asks for {asked:.4g} parameters, but the weights "
                f"have only {held:.4g}"
            )

    def autoencoder_directory(self) -> Path | None:
        """The directory in ``ae_path``: as given, or relative to the weights' directory or its
        parent; None if it exists nowhere."""
        given = read_config(self.directory).get("ae_path")
        if not isinstance(given, str) or not given:
            return None
        # An absolute path may be from another machine: only its last part can exist here.
        local = Path(Path(given).name) if Path(given).is_absolute() else Path(given)
        for path in (Path(given), self.directory / local, self.directory.parent / local):
            # Not Path.is_file, which raises for invalid file names.
            if os.path.isfile(path / CONFIG_FILE):
                return path
        return None

    def autoencoder_inside(self) -> Autoencoder:
        """The autoencoder inside the weights.

        Raises:
            CheckpointError: there is none, or it is incomplete.
        """
        tensors = self.tensors.below(AUTOENCODER)
        if not tensors.values:
            given = read_config(self.directory).get("ae_path")
            raise CheckpointError(
                f"{self.directory}: ae_path {given!r} is not a directory here, and the weights "
                f"have no {AUTOENCODER}*; give the autoencoder's directory (--autoencoder)"
            )
        return build_autoencoder(
            config_from_tensors(tensors), tensors, f"the autoencoder inside ({AUTOENCODER}*)"
        )


def read_calm(directory: str | Path) -> ReleasedCalm:
    """The weights of a released language model.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    return ReleasedCalm(Path(directory), read_tensors(directory))


def released_recipe(
    directory: str | Path,
    *,
    run_dir: str,
    autoencoder: str | None = None,
    tokenizer: str | None = None,
) -> LanguageModelRecipe:
    """A recipe that continues training a released language model as recipes/calm_m.yaml does, in
    micro-batches of one block, which models of all sizes have memory for.

    Args:
        directory: directory of the released checkpoint.
        run_dir, autoencoder, tokenizer: ``run.dir``, ``model.autoencoder``, ``data.tokenizer``.

    Raises:
        CheckpointError: the configuration is not that of a CALM, or the backbone does not support
            it.
    """
    values = calm_values(directory)
    values["run"] = {"dir": run_dir}
    values["model"]["autoencoder"] = autoencoder
    values["data"] |= {"path": DATA_PATH, "tokenizer": tokenizer}
    values["training"] = {"steps": 250_000, "micro_batch_size": 1, "global_batch_size": 256}
    values |= {"precision": "bf16", "checkpoint": {"keep": 3}}
    try:
        return LanguageModelRecipe.from_dict(values)
    except RecipeError as error:
        raise CheckpointError(f"{Path(directory) / CONFIG_FILE}: {error}") from error


def released_calm(
    model: CalmModel,
    backbone: Mapping[str, torch.Tensor],
    head: Mapping[str, torch.Tensor],
    autoencoder: Autoencoder | None = None,
) -> dict[str, torch.Tensor]:
    """Tensors of a whole CALM (weights or gradients) under all their released names.

    No two of them share memory, as safetensors requires; most are the given tensors themselves.
    """
    released = to_released(model, backbone)
    first, *others = released_head(model.head).prefixes
    for name, tensor in head.items():
        released[first + name] = tensor
        released |= {prefix + name: tensor.clone() for prefix in others}
    if autoencoder is not None:
        inside = released_autoencoder(autoencoder)
        released |= {AUTOENCODER + name: tensor for name, tensor in inside.items()}
    return {name: tensor.detach().contiguous() for name, tensor in released.items()}


def _autoencoder_names(tensors: Tensors) -> list[str]:
    return [name for name in tensors if name.startswith(AUTOENCODER)]
