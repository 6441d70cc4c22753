"""A vocabulary-parallel output layer."""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig

from calm_dist.costs.chunks import output_logits
from calm_dist.losses.linear_cross_entropy import weighted_cross_entropy
from calm_dist.recipe.checks import padded_vocab_size


class OutputLayer(ColumnParallelLinear):
    """Hidden states [T, n, d] -> logits [T, n, V / tensor_parallel_size], without bias.

    Logits of rows that only pad the vocabulary to equal shards are -inf. With targets, the layer
    returns its loss, for which the logits exist a chunk of rows at a time.
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

    def forward(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits or, with targets, a weighted sum of the cross entropy in nats: a scalar in fp32,
        the same on every tensor-parallel rank.

        Args:
            hidden: [T, n, d]; under sequence parallelism this rank's part of T.
            targets: [n, T], the token that each position predicts.
            weight: [T], zero for positions that predict nothing; given with ``targets``.
        """
        if targets is not None:
            assert weight is not None
            return self._loss(hidden, targets, weight)
        logits, _ = super().forward(hidden)
        if self.real_rows < logits.shape[-1]:
            logits[..., self.real_rows :] = float("-inf")
        return logits

    def _loss(
        self, hidden: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        # As in the linear layer itself, the gradient of the states is summed over the ranks.
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        return weighted_cross_entropy(
            hidden.flatten(0, 1),
            self.weight,
            targets.T.flatten(),
            weight.repeat_interleave(len(targets)),
            at_once=output_logits(hidden.device.type == "cpu"),
            real_words=self.real_rows,
            group=self.tp_group,
        )
