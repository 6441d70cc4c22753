"""Make the optimizer of a recipe."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from calm_dist.optimizers.spec import OptimizerSpec
from calm_dist.registry import load_module_part

Groups = list[dict[str, Any]]


def decay_groups(parameters: Iterable[nn.Parameter], training: Any) -> Groups:
    """Two parameter groups: matrices, with weight decay, and norms and biases, without."""
    parameters = list(parameters)
    return [
        {
            "params": [p for p in parameters if p.ndim > 1],
            "lr": training.learning_rate,
            "weight_decay": training.weight_decay,
        },
        {
            "params": [p for p in parameters if p.ndim <= 1],
            "lr": training.learning_rate,
            "weight_decay": 0.0,
        },
    ]


def make_optimizer(spec: OptimizerSpec, groups: Groups, training: Any) -> torch.optim.Optimizer:
    """Make the optimizer that ``spec`` describes.

    Raises:
        RecipeError: the package that registers it does not hold the function it names.
    """
    builder = load_module_part(spec.builder, "training.optimizer", spec.kind, "builder")
    return builder(groups, training)
