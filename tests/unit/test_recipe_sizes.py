"""The modules that a recipe builds have exactly the parameters that its model is said to have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_flops import PUBLISHED_SIZES
from torch import nn

from calm_dist.inference.load import single_process_recipe, single_process_topology
from calm_dist.models.autoencoder import Autoencoder
from calm_dist.models.backbone import Backbone, transformer_config
from calm_dist.models.heads import make_head
from calm_dist.models.transformer import Transformer
from calm_dist.recipe import AutoencoderRecipe, LanguageModelRecipe, Recipe, load_recipe
from calm_dist.training.autoencoder import autoencoder_config

RECIPES = Path(__file__).parents[2] / "recipes"


def modules_of(recipe: Recipe) -> list[nn.Module]:
    """The real modules of a whole model, on one rank and without memory for their weights."""
    if isinstance(recipe, AutoencoderRecipe):
        with torch.device("meta"):
            return [Autoencoder(autoencoder_config(recipe))]
    assert isinstance(recipe, LanguageModelRecipe)
    recipe = single_process_recipe(recipe)
    model = recipe.model
    topology = single_process_topology(recipe, torch.device("cpu"))
    config = transformer_config(recipe, torch.float32)
    with torch.device("meta"):
        if model.kind == "transformer":
            return [Transformer(recipe, config, topology.groups)]
        assert model.latent_size is not None
        head = make_head(model.head, model.hidden_size, model.latent_size)
        return [Backbone(recipe, config, topology.groups), head]


def parameters_of(recipe: Recipe) -> int:
    """Parameters without the rows that only pad a vocabulary to equal shards."""
    total, vocab_size = 0, recipe.model.vocab_size
    assert vocab_size is not None
    for module in modules_of(recipe):
        for name, parameter in module.named_parameters():
            assert parameter.is_meta
            rows = vocab_size if is_vocabulary(name) else len(parameter)
            assert rows <= len(parameter)
            total += rows * parameter[0].numel()
    return total


def is_vocabulary(name: str) -> bool:
    return "embed_tokens" in name or "output_layer" in name


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED_SIZES)
# The released checkpoints have one entry more than the tokenizer.
@pytest.mark.parametrize("more_tokens", [0, 1])
def test_modules_have_the_published_sizes(name: str, parameters: int, more_tokens: int) -> None:
    path = RECIPES / f"{name}.yaml"
    recipe = load_recipe(path, [f"model.vocab_size={128_256 + more_tokens}"])
    tables = 2 if recipe.model.kind == "transformer" else 1
    added = more_tokens * tables * recipe.model.hidden_size
    assert parameters_of(recipe) == parameters + added
