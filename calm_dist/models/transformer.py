"""The discrete baseline: the same backbone with a vocabulary-parallel output layer."""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from calm_dist.models.backbone import Backbone
from calm_dist.models.kv_cache import KeyValueCache
from calm_dist.models.output_layer import OutputLayer
from calm_dist.recipe import LanguageModelRecipe


class Transformer(Backbone):
    """One stage of the discrete Transformer.

    The last stage returns logits [T, B, V / tensor_parallel_size] (untied output layer, no bias);
    those of rows that only pad the vocabulary to equal shards are -inf. With a cache and no
    ``positions``, it returns only the logits of the last step, [1, B, V], which is all that a long
    prompt needs. With ``targets`` [B, T] and their ``weight`` [T], it returns the loss instead, as
    `OutputLayer.forward` does.
    """

    def __init__(
        self,
        recipe: LanguageModelRecipe,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        *,
        first: bool = True,
        last: bool = True,
        vp_stage: int | None = None,
        attention: str = "sdpa",
    ) -> None:
        super().__init__(
            recipe, config, groups, first=first, last=last, vp_stage=vp_stage, attention=attention
        )
        self.output_layer: OutputLayer | None = None
        if last:
            assert recipe.model.vocab_size is not None
            self.output_layer = OutputLayer(config, recipe.model.vocab_size, groups)

    def forward(
        self,
        tokens: torch.Tensor,
        num_steps: int,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
        targets: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden = super().forward(tokens, num_steps, positions, mask, cache)
        if self.output_layer is None:
            return hidden
        if cache is not None and positions is None:
            hidden = hidden[-1:]
        return self.output_layer(hidden, targets, weight)
