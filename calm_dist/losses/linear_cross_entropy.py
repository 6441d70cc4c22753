"""Cross entropy of an output layer over a large vocabulary, without all logits in memory.

The logits of a few rows at a time are computed and turned into their gradient in place; the
gradients of hidden states and weights are computed in the forward pass and only scaled in the
backward pass. The work is that of the plain form, three matrix products; the memory is one chunk of
logits instead of three times all of them.
"""

from __future__ import annotations

from typing import Any

import torch

from calm_dist.costs.chunks import LOGITS


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Mean cross entropy of ``softmax(hidden @ weight.T)`` in nats, a scalar in fp32.

    Args:
        hidden: [n, d], n >= 1.
        weight: [V, d], the output layer, without bias.
        targets: [n], the correct rows of ``weight``.

    Under autocast the products have autocast's type, as in an output layer; the rest is fp32.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        # Pass it on, since gradients are always off inside `forward`.
        return _LinearCrossEntropy.apply(hidden, weight, targets, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        needs_gradient: bool,
    ) -> torch.Tensor:
        compute = hidden.dtype
        cast = weight.detach().to(compute)
        parts = -(-len(hidden) // max(1, LOGITS // len(weight)))
        rows = -(-len(hidden) // parts)
        loss = torch.zeros((), device=hidden.device)
        if needs_gradient:
            of_hidden, of_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        chunk: torch.Tensor | None = None
        for start in range(0, len(hidden), rows):
            part, target = hidden[start : start + rows], targets[start : start + rows, None]
            if chunk is None or len(chunk) != len(part):
                chunk = part.new_empty(len(part), len(weight))
            logits = torch.mm(part, cast.T, out=chunk).float()
            largest = logits.amax(-1, keepdim=True)
            chosen = logits.gather(1, target)
            powers = logits.sub_(largest).exp_()
            total = powers.sum(-1, keepdim=True)
            loss += (largest + total.log() - chosen).sum()
            if needs_gradient:
                gradient = powers.div_(total * len(hidden))
                gradient.scatter_add_(1, target, torch.full_like(chosen, -1 / len(hidden)))
                gradient = gradient.to(compute)
                torch.mm(gradient, cast, out=of_hidden[start : start + rows])
                if compute == weight.dtype:
                    of_weight.addmm_(gradient.T, part)
                else:
                    of_weight += gradient.T @ part
        if needs_gradient:
            ctx.save_for_backward(of_hidden, of_weight)
        return loss / len(hidden)

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # In place, since they are as large as the weight. Autograd therefore refuses a second
        # backward pass over a retained graph.
        return *(saved.mul_(grad_loss) for saved in ctx.saved_tensors), None, None
