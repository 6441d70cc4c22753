"""The recipe that a command line asks to rehearse."""

from __future__ import annotations

from collections.abc import Sequence

from calm_dist.errors import UserError
from calm_dist.recipe import Recipe, load_recipe
from calm_dist.training.resolve import resolve


def recipe_to_rehearse(
    path: str, overrides: Sequence[str], world_size: int | None = None
) -> Recipe:
    """Load a recipe for ``world_size`` GPUs (default: its own number); stores may be absent.

    Raises:
        UserError: the recipe is wrong, or ``world_size`` contradicts an override.
    """
    more = []
    if world_size is not None:
        size = f"parallel.world_size={world_size}"
        for override in overrides:
            if override.startswith("parallel.world_size=") and override != size:
                raise UserError(f"{override}: contradicts --world {world_size}; omit one")
        more = [size]
    return resolve(load_recipe(path, [*overrides, *more]), missing_stores=True)
