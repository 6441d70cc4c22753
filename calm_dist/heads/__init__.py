"""Descriptions of the generative heads: fields, sizes, FLOPs, memory, released names. No torch.

`head_spec` returns the description for a ``model.head.kind``; the rest of the package uses it and
never compares kinds. The modules are in `calm_dist.models.heads`.
"""

from __future__ import annotations

from calm_dist.heads.chain import CHAIN
from calm_dist.heads.energy import ENERGY
from calm_dist.heads.iterative import DIFFUSION, FLOW
from calm_dist.heads.spec import HeadRecipe, HeadSpec, Released, all_specs, head_spec, register
from calm_dist.heads.tokens import TOKENS

# The heads of this package; other packages use the entry-point group `calm_dist.heads`.
for _spec in (ENERGY, CHAIN, FLOW, DIFFUSION, TOKENS):
    register(_spec)

__all__ = ["HeadRecipe", "HeadSpec", "Released", "all_specs", "head_spec"]
