"""Cross entropy of an output layer over a large vocabulary, without all logits in memory.

The logits of a few rows at a time are computed and turned into their gradient in place; the
gradients of hidden states and weights are computed in the forward pass and only scaled in the
backward pass. The work is that of the plain form, three matrix products; the memory is one chunk of
logits instead of three times all of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from calm_dist.costs import chunks


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
    row_weight = torch.full((len(hidden),), 1 / len(hidden), device=hidden.device)
    return weighted_cross_entropy(hidden, weight, targets, row_weight, at_once=chunks.LOGITS)


def weighted_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    row_weight: torch.Tensor,
    *,
    at_once: int,
    real_words: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Sum of ``row_weight`` times the cross entropy of each row in nats, a scalar in fp32.

    Args:
        hidden: [n, d], n >= 1, the same on all ranks of ``group``.
        weight: [V / ranks, d], this rank's rows of the output layer, without bias.
        targets: [n], the correct rows of the whole layer.
        row_weight: [n], fp32, zero for rows that predict nothing.
        at_once: number of logits in memory at a time; at least those of one row are.
        real_words: how many of this rank's rows are words; those after them only pad the shard and
            have no probability. Default: all.
        group: the ranks that share the vocabulary in equal shards; default: this rank has all of
            it. The loss is the same on all of them; the gradient of ``hidden`` is this rank's part,
            to be summed over the group.

    Under autocast the products have autocast's type, as in an output layer; the rest is fp32.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    words = len(weight) if real_words is None else real_words
    shared = group if group is not None and group.size() > 1 else None
    with torch.autocast(device, enabled=False):
        # Pass it on, since gradients are always off inside `forward`.
        enabled = torch.is_grad_enabled()
        return _LinearCrossEntropy.apply(
            hidden, weight, targets, row_weight, at_once, words, shared, enabled
        )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        row_weight: torch.Tensor,
        at_once: int,
        words: int,
        group: dist.ProcessGroup | None,
        needs_gradient: bool,
    ) -> torch.Tensor:
        compute = hidden.dtype
        cast = weight.detach().to(compute)
        # The correct row of this rank's shard, and one if it is there.
        local = targets - (0 if group is None else group.rank() * len(weight))
        is_local = ((local >= 0) & (local < len(weight))).float()
        local = local.clamp(0, len(weight) - 1)
        rows = chunks.rows_at_once(len(hidden), len(weight), at_once)
        loss = torch.zeros((), device=hidden.device)
        if needs_gradient:
            of_hidden = torch.empty_like(hidden)
            # In fp32, in which one product over all rows would be accumulated.
            of_weight = torch.zeros_like(weight, dtype=torch.float32)
        products = hidden.new_empty(rows, len(weight))
        for start in range(0, len(hidden), rows):
            at = slice(start, start + rows)
            part, target, here = hidden[at], local[at, None], is_local[at, None]
            logits = torch.mm(part, cast.T, out=products[: len(part)]).float()
            logits[:, words:] = float("-inf")
            largest = logits.amax(-1, keepdim=True)
            if group is not None:
                dist.all_reduce(largest, dist.ReduceOp.MAX, group)
            logits.sub_(largest)
            # Not a product with `here`: a row of padding has -inf.
            chosen = logits.gather(1, target).masked_fill_(here == 0, 0.0)
            powers = logits.exp_()
            sums = torch.cat((powers.sum(-1, keepdim=True), chosen), 1)
            if group is not None:
                dist.all_reduce(sums, group=group)
            total, chosen = sums.split(1, 1)
            of_row = row_weight[at, None]
            loss += ((total.log() - chosen) * of_row).sum()
            if needs_gradient:
                gradient = powers.mul_(of_row / total)
                gradient.scatter_add_(1, target, -of_row * here)
                gradient = gradient.to(compute)
                torch.mm(gradient, cast, out=of_hidden[at])
                if compute == torch.float32:
                    of_weight.addmm_(gradient.T, part)
                else:
                    of_weight += gradient.T @ part
                del gradient
            del logits, powers  # before those of the next chunk are made
        if needs_gradient:
            ctx.type = weight.dtype
            ctx.save_for_backward(of_hidden, of_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # In place, since they are as large as the weight. Autograd therefore refuses a second
        # backward pass over a retained graph.
        of_hidden, of_weight = (saved.mul_(grad_loss) for saved in ctx.saved_tensors)
        return of_hidden, of_weight.to(ctx.type), None, None, None, None, None, None
