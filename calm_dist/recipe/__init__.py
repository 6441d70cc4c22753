"""Typed recipes: sections, fields, YAML, overrides and checks. No torch."""

from calm_dist.recipe.ignored import RECIPE_FILE
from calm_dist.recipe.recipe import (
    LARGEST_FILE,
    AutoencoderRecipe,
    LanguageModelRecipe,
    Recipe,
    load_recipe,
)
from calm_dist.recipe.sections import (
    AutoencoderModel,
    AutoencoderSize,
    BackboneModel,
    CalmModel,
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
    TransformerModel,
    WeightFrom,
)

__all__ = [
    "LARGEST_FILE",
    "RECIPE_FILE",
    "AutoencoderModel",
    "AutoencoderRecipe",
    "AutoencoderSize",
    "BackboneModel",
    "CalmModel",
    "Checkpoint",
    "Data",
    "DataSource",
    "Evaluation",
    "HeadRecipe",
    "Health",
    "LanguageModelRecipe",
    "Logging",
    "Parallel",
    "Recipe",
    "Run",
    "Training",
    "TransformerModel",
    "WeightFrom",
    "load_recipe",
]
