"""Make the optimizer of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from calm_dist.errors import RecipeError
from calm_dist.optimizers.spec import ADAMW, OptimizerSpec
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
        RecipeError: the package that registers it does not hold the function it names, or the
            optimizer is not as described (tried on six numbers, once for each kind; not in a
            rehearsal).
    """
    builder = load_module_part(spec.builder, "training.optimizer", spec.kind, "builder")
    parameters = [parameter for group in groups for parameter in group["params"]]
    # A rehearsal's tensors have no numbers to compare.
    is_rehearsal = any(isinstance(parameter, FakeTensor) for parameter in parameters)
    if spec is not ADAMW and spec.kind not in _checked and not is_rehearsal:
        device = parameters[0].device if parameters else torch.device("cpu")
        _check_description(spec, lambda own: builder(own, training), device)
        _checked.add(spec.kind)
    return builder(groups, training)


_checked: set[str] = set()
_VALUES = ((0.5, -2.0, 3.0), (-0.1, 0.7, 1.5))
_GRADIENTS = (((1.0, -0.2, 0.03), (4.0, 0.5, -6.0)), ((-0.3, 2.0, 0.1), (0.6, -5.0, 0.8)))


def _check_description(
    spec: OptimizerSpec, build: Callable[[Groups], torch.optim.Optimizer], device: torch.device
) -> None:
    """Compare two updates of a [2, 3] parameter with those of its pieces, continued in between as
    from a checkpoint: with nothing but `moments` and the number of updates, at first zeros.

    Raises:
        RecipeError: the results differ, or the optimizer keeps other state than described.
    """
    values = torch.tensor(_VALUES, device=device)
    gradients = torch.tensor(_GRADIENTS, device=device)
    whole = _Trial(build, values)
    groups_before = whole.group_entries()
    for gradient in gradients:
        whole.update(gradient)
    problem = whole.state_problem(spec.moments)
    if not problem and whole.group_entries() != groups_before:
        problem = "changes entries of its parameter groups, which no checkpoint keeps"
    if not problem:
        pieces = []
        for piece in (slice(0, 2), slice(2, 6)):
            value = values.flatten()[piece]
            state = {name: torch.zeros_like(value) for name in spec.moments}
            for number, gradient in enumerate(gradients.flatten(1)):
                trial = _Trial(build, value, state | {"step": torch.tensor(float(number))})
                trial.update(gradient[piece])
                value = trial.parameter.detach()
                state = {name: trial.state[name] for name in spec.moments}
            pieces.append(value)
        if not torch.allclose(torch.cat(pieces), whole.parameter.flatten(), rtol=1e-5, atol=1e-7):
            problem = (
                "updates a parameter in one piece otherwise than in two pieces that are continued "
                f"after an update with nothing but {', '.join((*spec.moments, 'step'))}: it is not "
                "element-wise, its state does not begin with zeros, or it keeps more state"
            )
    if problem:
        raise RecipeError(
            f"training.optimizer: {spec.kind} {problem}; correct the package that registers it, "
            "see docs/howto/add_an_optimizer.md"
        )


class _Trial:
    """One parameter with an optimizer of its own."""

    def __init__(
        self,
        build: Callable[[Groups], torch.optim.Optimizer],
        value: torch.Tensor,
        state: dict[str, torch.Tensor] | None = None,
    ) -> None:
        self.parameter = nn.Parameter(value.clone())
        # Large enough for differences to exceed rounding errors.
        groups = [{"params": [self.parameter], "lr": 0.1, "weight_decay": 0.1}]
        self._optimizer = build(groups)
        if state is not None:
            copies = {name: tensor.to(value.device).clone() for name, tensor in state.items()}
            self._optimizer.state[self.parameter] = copies

    @property
    def state(self) -> dict[str, Any]:
        return self._optimizer.state[self.parameter]

    def update(self, gradient: torch.Tensor) -> None:
        self.parameter.grad = gradient.clone()
        self._optimizer.step()

    def group_entries(self) -> str:
        """All entries but the parameters and the rate, which the trainer sets; as text, since they
        may be tensors."""
        return repr(
            [
                {name: value for name, value in group.items() if name not in ("params", "lr")}
                for group in self._optimizer.param_groups
            ]
        )

    def state_problem(self, moments: tuple[str, ...]) -> str:
        """What is wrong with the state after an update; empty if nothing is."""
        missing = sorted(set(moments) - set(self.state))
        extra = sorted(set(self.state) - {*moments, "step"})
        if missing or extra:
            found = [f"has no {', '.join(missing)}"] if missing else []
            found += [f"has {', '.join(extra)}"] if extra else []
            return (
                f"is described with moments=({', '.join(map(repr, moments))}), but its state "
                f"{' and '.join(found)}"
            )
        wrong = [
            name
            for name in moments
            if not isinstance(self.state[name], torch.Tensor)
            or self.state[name].shape != self.parameter.shape
            or self.state[name].dtype != torch.float32
        ]
        return f"keeps {', '.join(wrong)} not in fp32 or not in the parameter's shape" * bool(wrong)
