"""Descriptions of optimizers, and which there are.

Another package adds one by naming an instance of `OptimizerSpec` in the entry-point group
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
    """An optimizer of torch's interface that updates every element by itself.

    ZeRO and Megatron's distributed optimizer cut the flattened parameters anywhere, so an update
    may not depend on the shape of a parameter, or on other elements of it.

    Attributes:
        kind: ``training.optimizer``.
        builder: ``package.module:function``, called with (parameter groups, the recipe's
            ``training`` section); each group has ``params``, ``lr`` and ``weight_decay``, which it
            must keep. Returns a `torch.optim.Optimizer`.
        moments: the names that its state gives to the tensors that it keeps of each parameter, of
            the parameter's shape, in fp32. Zeros must be the state before the first update. Beside
            them only ``step`` is kept in checkpoints, the number of updates.
        accesses: elements that an update reads and writes for each parameter, norm and clipping
            included: of the backbone, and of the head, whose norm is in fp64.
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
        """Whether Megatron's distributed optimizer can gather its state for a checkpoint; it knows
        Adam's moments alone (0.16.1)."""
        return self.moments == ADAMW.moments


# Norm, clipping and torch's fused AdamW, per parameter, fp32; of the head with a norm in fp64 and
# the copy of the new weight: counted with a TorchDispatchMode, see `costs.work`.
ADAMW = OptimizerSpec(
    "adamw", "calm_dist.optimizers.adamw:adamw", ("exp_avg", "exp_avg_sq"), accesses=(11, 15)
)

_OWN = {spec.kind: spec for spec in (ADAMW,)}


@cache
def all_optimizers() -> dict[str, OptimizerSpec]:
    """Every optimizer and its description, this package's first.

    Raises:
        RecipeError: see `registry.with_installed`.
    """
    return with_installed(_OWN, GROUP, OptimizerSpec, "optimizer")


def optimizer_spec(kind: str) -> OptimizerSpec:
    """The description of an optimizer; `KeyError` for one that no recipe can name."""
    return all_optimizers()[kind]
