"""Compress the K token embeddings of a patch into one input of the backbone."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import nn

from calm_dist.recipe.checks import padded_vocab_size

LAYER_NORM_EPS = 1e-6


class TokenEmbedding(MegatronModule):
    """Vocabulary-parallel token embedding: tokens [B, T] -> [T, B, d] (this rank's part of T
    under sequence parallelism)."""

    def __init__(
        self, config: TransformerConfig, vocab_size: int, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        self.tp_group = groups.tp
        self.embed_tokens = VocabParallelEmbedding(
            padded_vocab_size(vocab_size),
            config.hidden_size,
            init_method=config.init_method,
            config=config,
            tp_group=groups.tp,
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed_tokens(tokens).transpose(0, 1).contiguous()
        return scatter_sequence(hidden, self.config, self.tp_group)


class PatchEmbedding(MegatronModule):
    """Tokens [B, P*K] -> patch embeddings [P, B, d] (this rank's part of P under sequence
    parallelism).

    Linear(K*d, 2d), SiLU, Linear(2d, d), LayerNorm over the concatenated token embeddings
    (section 3.1 of the paper; ``embed_proj`` of the released code). The first linear is
    column-parallel, the second row-parallel.
    """

    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        patch_size: int,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        self.patch_size = patch_size
        self.tp_group = groups.tp
        hidden_size = config.hidden_size
        self.embed_tokens = VocabParallelEmbedding(
            padded_vocab_size(vocab_size),
            hidden_size,
            init_method=config.init_method,
            config=config,
            tp_group=groups.tp,
        )
        # The compressor sees whole sequences; only its result is scattered over the ranks.
        unsharded = copy.copy(config)
        unsharded.sequence_parallel = False
        self.compress_in = ColumnParallelLinear(
            patch_size * hidden_size,
            2 * hidden_size,
            config=unsharded,
            init_method=config.init_method,
            tp_group=groups.tp,
        )
        self.compress_out = RowParallelLinear(
            2 * hidden_size,
            hidden_size,
            config=unsharded,
            init_method=config.init_method,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=groups.tp,
        )
        self.norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS, dtype=config.params_dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, length = tokens.shape
        patches = length // self.patch_size
        embedded = self.embed_tokens(tokens).reshape(batch, patches, -1)
        hidden, _ = self.compress_in(embedded.transpose(0, 1).contiguous())
        hidden, _ = self.compress_out(F.silu(hidden))
        return scatter_sequence(self.norm(hidden), self.config, self.tp_group)


def scatter_sequence(
    hidden: torch.Tensor, config: TransformerConfig, tp_group: torch.distributed.ProcessGroup
) -> torch.Tensor:
    """This rank's part of the first dimension if sequence parallelism is on, else all of it."""
    if not config.sequence_parallel:
        return hidden
    return scatter_to_sequence_parallel_region(hidden, group=tp_group)
