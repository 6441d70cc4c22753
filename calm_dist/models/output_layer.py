"""A vocabulary-parallel output layer."""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig

from calm_dist.recipe.checks import padded_vocab_size


class OutputLayer(ColumnParallelLinear):
    """Hidden states [T, n, d] -> logits [T, n, V / tensor_parallel_size], without bias.

    Logits of rows that only pad the vocabulary to equal shards are -inf.
    """

    def __init__(
        self, config: TransformerConfig, vocab_size: int, groups: ProcessGroupCollection
    ) -> None:
        padded = padded_vocab_size(vocab_size)
        super().__init__(
            config.hidden_size,
            padded,
            config=config,
            init_method=config.init_method,
            bias=False,
            tp_group=groups.tp,
        )
        shard = padded // groups.tp.size()
        self.real_rows = min(max(vocab_size - groups.tp.rank() * shard, 0), shard)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits, _ = super().forward(hidden)
        if self.real_rows < logits.shape[-1]:
            logits[..., self.real_rows :] = float("-inf")
        return logits
