"""Save and load an optimizer's moments as a safetensors file, by parameter name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from calm_dist.errors import CheckpointError
from calm_dist.released.tensors import save_tensors
from calm_dist.runs.checkpoints import OPTIMIZER_FILE


def save_moments(
    optimizer: torch.optim.Optimizer, model: nn.Module, directory: Path, moments: Sequence[str]
) -> None:
    """Write the moments of every parameter; before the first step, there are none."""
    tensors = {
        f"{moment}.{name}": optimizer.state[parameter][moment].contiguous()
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for moment in moments
    }
    save_tensors(tensors, directory / OPTIMIZER_FILE)


def load_moments(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    directory: Path,
    moments: Sequence[str],
    steps: int,
) -> None:
    """Read the file that `save_moments` wrote after ``steps`` updates.

    Raises:
        CheckpointError: the file is missing, damaged, or of another model.
    """
    if steps == 0:
        return
    path = directory / OPTIMIZER_FILE
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = optimizer.state_dict()["param_groups"]
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        tensors = load_file(path)
    except Exception as error:  # damaged bytes may raise anything
        raise CheckpointError(f"{path}: does not hold this optimizer's state ({error})") from error
    for moment in moments:
        for parameter in order:
            _check(path, f"{moment}.{names[parameter]}", parameter, tensors)
    state = {
        number: {
            # One tensor each: a shared one would be incremented once per parameter.
            "step": torch.tensor(float(steps)),
            **{moment: tensors[f"{moment}.{names[p]}"] for moment in moments},
        }
        for number, p in enumerate(order)
    }
    # This also moves the tensors to the devices of the parameters.
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _check(
    path: Path, name: str, parameter: nn.Parameter, tensors: Mapping[str, torch.Tensor]
) -> None:
    tensor = tensors.get(name)
    if tensor is None:
        raise CheckpointError(f"{path}: does not hold this optimizer's state (it has no {name})")
    if tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
        raise CheckpointError(
            f"{path}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, its parameter is "
            f"{parameter.dtype} of {tuple(parameter.shape)}"
        )
