"""The vocabulary tables of the `tokens` head, which belong to the backbone's last stage.

The head itself processes a rank's own positions (`parallel.zero_head`); the tables are cut over the
vocabulary, so that no rank holds a whole table.
"""

from __future__ import annotations

import copy

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from calm_dist.models.output_layer import OutputLayer
from calm_dist.recipe.checks import padded_vocab_size


class PatchTokens(MegatronModule):
    """Embedding of a patch's earlier tokens, and output layer, both vocabulary-parallel.

    A head whose tokens are independent of each other has no embedding.
    """

    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        groups: ProcessGroupCollection,
        *,
        independent: bool,
    ) -> None:
        super().__init__(config)
        self.tp_group = groups.tp
        # Positions are gathered and scattered here, whether or not the backbone's layers do.
        unsharded = copy.copy(config)
        unsharded.sequence_parallel = False
        self.embed_tokens: VocabParallelEmbedding | None = None
        if not independent:
            self.embed_tokens = VocabParallelEmbedding(
                padded_vocab_size(vocab_size),
                config.hidden_size,
                init_method=config.init_method,
                config=unsharded,
                tp_group=groups.tp,
            )
        self.output_layer = OutputLayer(unsharded, vocab_size, groups)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Tokens [P, B, n] -> embeddings [P / tensor_parallel_size, B, n, d] of this rank's shard
        of the positions; None if the head does not use them."""
        if self.embed_tokens is None:
            return None
        embedded = self.embed_tokens(tokens)
        return scatter_to_sequence_parallel_region(embedded, group=self.tp_group)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """States [P / tensor_parallel_size, n, d] of this rank's shard of the positions -> logits
        [P, n, V / tensor_parallel_size] of all positions."""
        return self.output_layer(self._gathered(states))

    def loss(
        self, states: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """The states' weighted cross entropy, see `OutputLayer.forward`.

        Args:
            states: [P / tensor_parallel_size, n, d] of this rank's shard of the positions.
            targets: [n, P] of all positions.
            weight: [P] of all positions.
        """
        return self.output_layer(self._gathered(states), targets, weight)

    def _gathered(self, states: torch.Tensor) -> torch.Tensor:
        # The output layer sums the gradient over the ranks; each takes its own positions' part.
        return gather_from_sequence_parallel_region(
            states, tensor_parallel_output_grad=False, group=self.tp_group
        )
