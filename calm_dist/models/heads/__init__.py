"""The modules of the generative heads: one interface (`base`); `calm_dist.heads` describes them."""

from __future__ import annotations

from pkgutil import resolve_name

from calm_dist.errors import RecipeError
from calm_dist.heads import HeadRecipe
from calm_dist.models.heads.base import GenerativeHead

__all__ = ["GenerativeHead", "make_head"]


def make_head(head: HeadRecipe, hidden_size: int, latent_size: int) -> GenerativeHead:
    """The module of a head, with torch's own initial weights, fp32 on the CPU.

    Raises:
        RecipeError: the package that registers this head does not hold the module that it names.
    """
    name = head.spec.module
    try:
        module = resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(
            f"model.head.kind: {head.kind}, whose module {name} cannot be loaded ({error}); mend "
            "the package that registers it"
        ) from error
    return module(head, hidden_size, latent_size)
