"""Typed recipes: sections, fields, YAML, overrides, and all that can be wrong. No torch."""

from calm_dist.recipe.recipe import LARGEST_FILE, Recipe, load_recipe
from calm_dist.recipe.sections import (
    AutoencoderRecipe,
    AutoencoderSize,
    BackboneRecipe,
    CalmRecipe,
    Checkpoint,
    Data,
    DataSource,
    Evaluation,
    HeadRecipe,
    Health,
    Logging,
    Parallel,
    Run,
    Training,
    TransformerRecipe,
)

__all__ = [
    "LARGEST_FILE",
    "AutoencoderRecipe",
    "AutoencoderSize",
    "BackboneRecipe",
    "CalmRecipe",
    "Checkpoint",
    "Data",
    "DataSource",
    "Evaluation",
    "HeadRecipe",
    "Health",
    "Logging",
    "Parallel",
    "Recipe",
    "Run",
    "Training",
    "TransformerRecipe",
    "load_recipe",
]
