"""Cross entropy over a vocabulary that is sharded over the tensor-parallel ranks."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy


def next_token_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor,
) -> torch.Tensor:
    """Weighted sum of the next-token cross entropy in nats, the same on every rank of a shard.

    Args:
        logits: [T, B, V / tensor_parallel_size]
        targets: [B, T], the token that each position predicts.
        weight: [T], zero for positions that predict nothing.
    """
    losses = vocab_parallel_cross_entropy(logits.float(), targets.transpose(0, 1).contiguous())
    return (losses * weight[:, None]).sum()
