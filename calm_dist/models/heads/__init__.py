"""The modules of the generative heads: one interface (`base`); `calm_dist.heads` describes them."""

from __future__ import annotations

from calm_dist.heads import HeadRecipe
from calm_dist.models.heads.base import GenerativeHead
from calm_dist.registry import load_module_part

__all__ = ["GenerativeHead", "make_head"]


def make_head(head: HeadRecipe, hidden_size: int, latent_size: int) -> GenerativeHead:
    """The module of a head, with torch's own initial weights, fp32 on the CPU.

    Raises:
        RecipeError: the package that registers this head does not hold the module that it names.
    """
    module = load_module_part(head.spec.module, "model.head.kind", head.kind, "module")
    return module(head, hidden_size, latent_size)
