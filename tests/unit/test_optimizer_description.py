"""An optimizer that is not as its description says is refused before it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from calm_dist.errors import RecipeError
from calm_dist.optimizers import OptimizerSpec, make
from calm_dist.recipe.sections import Training

Groups = list[dict[str, Any]]
ADAM = ("exp_avg", "exp_avg_sq")


def nesterov(groups: Groups, training: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, momentum=0.9, nesterov=True)


def dampened(groups: Groups, training: Any) -> torch.optim.Optimizer:
    """Its first update takes the gradient as momentum, later ones a tenth of it."""
    return torch.optim.SGD(groups, momentum=0.9, dampening=0.9)


def adagrad(groups: Groups, training: Any) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(groups, initial_accumulator_value=0.1)


def adamw(groups: Groups, training: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups)


def amsgrad(groups: Groups, training: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, amsgrad=True)


class Simple(torch.optim.Optimizer):
    """Momentum of gradients, with something added in a subclass."""

    def __init__(self, groups: Groups, training: Any = None) -> None:
        super().__init__(groups, {"updates": 0})
        self.updates = 0

    def change(self, gradient: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        return gradient

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.updates += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state.setdefault("momentum", torch.zeros_like(parameter)).add_(parameter.grad)
                parameter -= group["lr"] * self.change(state["momentum"], group)


class Lamb(Simple):
    def change(self, gradient: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        return gradient / gradient.norm()


class Rows(Simple):
    def change(self, gradient: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        return gradient / gradient.abs().amax(dim=-1, keepdim=True)


class CountsInGroup(Simple):
    def change(self, gradient: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        group["updates"] += 1
        return gradient


class CountsAside(Simple):
    def change(self, gradient: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        return gradient / self.updates


class HalfPrecision(Simple):
    def change(self, gradient: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        for state in self.state.values():
            state["momentum"] = state["momentum"].bfloat16()
        return gradient


def build(builder: Callable[..., Any], moments: tuple[str, ...]) -> torch.optim.Optimizer:
    name = builder.__name__
    spec = OptimizerSpec(name, f"{__name__}:{name}", moments, accesses=(1, 1))
    weight = nn.Parameter(torch.ones(4, 4))
    training = Training(steps=1, micro_batch_size=1, global_batch_size=1)
    return make.make_optimizer(spec, make.decay_groups([weight], training), training)


@pytest.fixture(autouse=True)
def nothing_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "_checked", set())


@pytest.mark.parametrize(
    ("builder", "moments"),
    [(nesterov, ("momentum_buffer",)), (adamw, ADAM), (Simple, ("momentum",))],
)
def test_as_described(builder: Callable[..., Any], moments: tuple[str, ...]) -> None:
    state = torch.get_rng_state()
    optimizer = build(builder, moments)
    assert not optimizer.state
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("builder", "moments", "message"),
    [
        (
            nesterov,
            ("momentum",),
            r"nesterov is described with moments=\('momentum'\), but its state has no momentum and "
            "has momentum_buffer",
        ),
        (nesterov, (), "its state has momentum_buffer"),
        (amsgrad, ADAM, "its state has max_exp_avg_sq"),
        (adamw, (*ADAM, "max_exp_avg_sq"), "its state has no max_exp_avg_sq"),
        (dampened, ("momentum_buffer",), "does not begin with zeros"),
        (adagrad, ("sum",), "does not begin with zeros"),
        (Lamb, ("momentum",), "not element-wise"),
        (Rows, ("momentum",), "not element-wise"),
        (CountsInGroup, ("momentum",), "changes entries of its parameter groups"),
        (CountsAside, ("momentum",), "keeps more state"),
        (HalfPrecision, ("momentum",), "keeps momentum not in fp32"),
    ],
)
def test_not_as_described(
    builder: Callable[..., Any], moments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RecipeError, match=f"training.optimizer: .*{message}"):
        build(builder, moments)


def test_a_rehearsal_builds_one_without_the_comparison() -> None:
    """Its tensors have shapes but no numbers."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        optimizer = build(nesterov, ("momentum_buffer",))
        (weight,) = optimizer.param_groups[0]["params"]
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert optimizer.state[weight]["momentum_buffer"].shape == weight.shape
    # The rehearsal did not count as the comparison: a training in this process still makes it.
    with pytest.raises(RecipeError, match="its state has momentum_buffer"):
        build(nesterov, ())
