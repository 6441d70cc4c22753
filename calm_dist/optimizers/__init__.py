"""Descriptions of optimizers: their state and the cost of an update. No torch.

`optimizer_spec` finds a description by ``training.optimizer``, for trainers, checkpoints, planner
and recipe. `OptimizerSpec.builder` names the function that makes the optimizer, with torch.
"""

from calm_dist.optimizers.spec import (
    GROUP,
    OptimizerSpec,
    all_optimizers,
    optimizer_spec,
)

__all__ = ["GROUP", "OptimizerSpec", "all_optimizers", "optimizer_spec"]
