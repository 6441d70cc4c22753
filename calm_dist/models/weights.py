"""Initial weights as a function of (seed, parameter name), independent of layout and device."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from calm_dist.errors import RecipeError
from calm_dist.randomness import key_seed
from calm_dist.recipe.sections import CalmModel, Initialization

InitStd = Callable[[str, torch.Size], float]
VectorValue = Callable[[str], float | None]

# Projections that add to the backbone's residual stream.
RESIDUAL_OUTPUTS = ("linear_proj", "linear_fc2")


def init_std(initialization: Initialization, num_layers: int = 0) -> InitStd:
    """Standard deviation of a weight matrix, by name and full shape.

    ``released``: `initializer_range` everywhere, as in the released code. ``fan_in``: 1/sqrt(last
    dimension), so that signals keep their size at any width (with 0.02 a narrow energy head passes
    no signal: three layers with small weights in a row), scaled by 1/sqrt(2 * num_layers) for
    layers whose output is added to the residual stream. The last dimension of an embedding table is
    its width, so that a table tied to the output starts with logits of size 1.
    """
    if initialization.init == "released":
        return lambda name, shape: initialization.initializer_range

    def fan_in(name: str, shape: torch.Size) -> float:
        is_output = num_layers > 0 and any(part in name for part in RESIDUAL_OUTPUTS)
        depth = 2 * num_layers if is_output else 1
        return 1.0 / math.sqrt(shape[-1] * depth)

    return fan_in


def head_init_std(model: CalmModel) -> InitStd:
    """`init_std` of a generative head, adjusted by its description."""
    std, spec = init_std(model), model.head_spec
    return lambda name, shape: spec.weight_std(model.init, name, shape, std(name, shape))


def draw_weight(name: str, shape: torch.Size, std: float, seed: int) -> torch.Tensor:
    """The full weight of one parameter, normal(0, std) from a generator keyed by seed and name."""
    generator = torch.Generator().manual_seed(key_seed(seed, name))
    return torch.randn(shape, generator=generator) * std


def initialize_module(
    module: nn.Module,
    prefix: str,
    std: InitStd,
    seed: int,
    vector_value: VectorValue = lambda name: None,
) -> None:
    """Initialise a module that is whole on every rank (autoencoder, heads).

    Args:
        vector_value: see `HeadSpec.vector_value`; as for ``std``, names begin with ``prefix``.

    Raises:
        RecipeError: see `fill_parameter`.
    """
    for name, parameter in module.named_parameters():
        full_name = f"{prefix}.{name}"
        given = vector_value(full_name) if parameter.ndim <= 1 else None
        if given is None:
            fill_parameter(parameter, full_name, parameter.shape, std, seed, lambda full: full)
        else:
            nn.init.constant_(parameter, given)


@torch.no_grad()
def fill_parameter(
    parameter: nn.Parameter,
    name: str,
    full_shape: torch.Size,
    std: InitStd,
    seed: int,
    local_part: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Initialise one parameter; this rank may hold only its ``local_part``.

    Raises:
        RecipeError: a vector or scalar whose name does not say how it begins.
    """
    if len(full_shape) > 1:
        full = draw_weight(name, full_shape, std(name, full_shape), seed)
        parameter.copy_(local_part(full))
    elif name.endswith("bias"):
        parameter.fill_(0.0)
    elif name.endswith("weight"):
        # Of a norm.
        parameter.fill_(1.0)
    else:
        raise RecipeError(
            f"model: there is no rule for the initial value of the parameter {name} of shape "
            f"{tuple(full_shape)}: vectors called bias begin at zero, those called weight at one; "
            "give it such a name or, in a head, let HeadSpec.vector_value give its value"
        )
