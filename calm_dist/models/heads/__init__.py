"""The modules of the generative heads, with one interface (`base`); `calm_dist.heads` describes
them."""

from __future__ import annotations

from calm_dist.heads import HeadRecipe
from calm_dist.models.heads.base import GenerativeHead, Head
from calm_dist.registry import load_module_part

__all__ = ["GenerativeHead", "Head", "latent_head", "make_head"]


def make_head(head: HeadRecipe, hidden_size: int, latent_size: int, patch_size: int = 4) -> Head:
    """The module of a head, with torch's own initial weights, fp32 on the CPU.

    Args:
        latent_size: 0 for a head without latents.

    Raises:
        RecipeError: the package that registers this head does not contain the module it names.
    """
    module = load_module_part(head.spec.module, "model.head.kind", head.kind, "module")
    spec = head.spec.for_patches(patch_size)
    return module(head, hidden_size, latent_size, *spec.module_arguments)


def latent_head(head: Head) -> GenerativeHead:
    """Narrow the type of a head that predicts latents.

    Raises:
        TypeError: it predicts tokens.
    """
    if not isinstance(head, GenerativeHead):
        raise TypeError(f"{type(head).__name__} does not predict latents")
    return head
