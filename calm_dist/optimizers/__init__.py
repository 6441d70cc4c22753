"""What each optimizer says of itself: its state, its settings, what an update costs. No torch.

`optimizer_spec` finds a description by ``training.optimizer``; trainers, checkpoints, planner and
recipe ask it. What makes the optimizer, with torch, is what `OptimizerSpec.builder` names.
"""

from calm_dist.optimizers.spec import (
    GROUP,
    OptimizerSpec,
    all_optimizers,
    optimizer_spec,
)

__all__ = ["GROUP", "OptimizerSpec", "all_optimizers", "optimizer_spec"]
