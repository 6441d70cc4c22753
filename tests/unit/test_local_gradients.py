"""Local sums of gradients against the gradient of the summed loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from calm_dist.parallel.local_gradients import LocalGradients


class Small(nn.Module):
    """A shared weight, which is used twice, and one that a switch leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)

    def forward(self, x: torch.Tensor, use_other: bool = True) -> torch.Tensor:
        x = self.layer(torch.tanh(self.layer(x)))
        return (self.other(x) if use_other else x).square().sum()


def losses_of(module: nn.Module, sums: LocalGradients, batch: torch.Tensor) -> list[torch.Tensor]:
    """Forward passes of all micro-batches before the first backward pass, as a pipeline may."""
    losses = [sums.run(part) for part in batch[:-1]]
    sums.before_last()
    return [*losses, module(batch[-1])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_last_gradient_is_that_of_all_micro_batches(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module, batch = Small(), torch.randn(16, 4, 6)
    whole = Small()
    whole.load_state_dict(module.state_dict())
    torch.stack([whole(part) for part in batch]).sum().backward()
    module, batch = module.to(dtype), batch.to(dtype)
    sums = LocalGradients(module)
    for _ in range(2):
        for loss in losses_of(module, sums, batch):
            assert all(parameter.grad is None for parameter in module.parameters())
            loss.backward()
        sums.check_complete()
        for parameter, expected in zip(module.parameters(), whole.parameters(), strict=True):
            assert parameter.grad is not None and expected.grad is not None
            error = (parameter.grad.float() - expected.grad).norm() / expected.grad.norm()
            # One rounding to bf16 of the sum, beside those within each pass.
            assert error < (1e-6 if dtype is torch.float32 else 6e-3)
            parameter.grad = None
    sums.close()
    module(batch[0]).backward()
    assert sums.check_complete() is None  # type: ignore[func-returns-value]


def test_a_parameter_that_the_last_micro_batch_leaves_out_is_named() -> None:
    module = Small()
    sums = LocalGradients(module)
    x = torch.randn(4, 6)
    sums.run(x).backward()
    sums.before_last()
    module(x, False).backward()
    with pytest.raises(RuntimeError, match=r"head parameter other.weight: .*none from the last"):
        sums.check_complete()


class Recomputed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = Small(), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = checkpoint(self.inner, x, use_reentrant=self.reentrant)
        assert isinstance(result, torch.Tensor)
        return result


def test_recomputation_keeps_the_graph_of_the_aliases() -> None:
    module, x = Recomputed(reentrant=False), torch.randn(2, 4, 6)
    sums = LocalGradients(module)
    for loss in losses_of(module, sums, x):
        loss.backward()
    expected = torch.autograd.grad(
        module.inner(x[0]) + module.inner(x[1]), list(module.inner.parameters())
    )
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_reentrant_recomputation_is_refused() -> None:
    """It would compute with the parameters themselves."""
    module = Recomputed(reentrant=True)
    sums = LocalGradients(module)
    loss = sums.run(torch.randn(4, 6, requires_grad=True))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        loss.backward()
