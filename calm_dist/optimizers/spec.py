"""Descriptions of optimizers, and a registry of them.

Another package adds an optimizer by naming an instance of `OptimizerSpec` in the entry-point group
``calm_dist.optimizers``::

    [project.entry-points."calm_dist.optimizers"]
    lion = "lion_optimizer.spec:LION"
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from calm_dist.registry import with_installed

GROUP = "calm_dist.optimizers"


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer with torch's interface that updates every element independently.

    ZeRO and Megatron's distributed optimizer cut the flattened parameters anywhere, so an update
    must not depend on the shape of a parameter or on its other elements.

    Attributes:
        kind: ``training.optimizer``.
        builder: ``package.module:function``, called with (parameter groups, the recipe's
            ``training`` section); each group has ``params``, ``lr`` and ``weight_decay``, which the
            optimizer must keep. Returns a `torch.optim.Optimizer`.
        moments: names of the state tensors kept for each parameter, of the parameter's shape, in
            fp32. They must be zero before the first update. Besides them, checkpoints keep only
            ``step``, the number of updates.
        accesses: elements that an update reads and writes per parameter, norm and clipping
            included: for the backbone, and for the head, whose norm is in fp64.
    """

    kind: str
    builder: str
    moments: tuple[str, ...]
    accesses: tuple[int, int]

    @property
    def state_bytes(self) -> int:
        """Bytes of the moments of one parameter."""
        return 4 * len(self.moments)

    @property
    def can_be_distributed(self) -> bool:
        """Whether Megatron's distributed optimizer can gather its state for a checkpoint; Megatron
        0.16.1 knows only Adam's moments."""
        return self.moments == ADAMW.moments


# Norm, clipping and torch's fused AdamW, per parameter, fp32; for the head, with a norm in fp64 and
# the copy of the new weight. Counted with a TorchDispatchMode, see `costs.work`.
ADAMW = OptimizerSpec(
    "adamw", "calm_dist.optimizers.adamw:adamw", ("exp_avg", "exp_avg_sq"), accesses=(11, 15)
)

_OWN = {spec.kind: spec for spec in (ADAMW,)}


@cache
def all_optimizers() -> dict[str, OptimizerSpec]:
    """The descriptions of all optimizers by kind, this package's first.

    Raises:
        RecipeError: see `registry.with_installed`.
    """
    return with_installed(_OWN, GROUP, OptimizerSpec, "optimizer")


def optimizer_spec(kind: str) -> OptimizerSpec:
    """The description of an optimizer.

    Raises:
        KeyError: no optimizer of this kind is registered.
    """
    return all_optimizers()[kind]
