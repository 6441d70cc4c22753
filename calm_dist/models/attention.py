"""Attention core and norm used in Megatron's layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import nn

from calm_dist.models.kv_cache import KeyValueCache


class RMSNorm(nn.RMSNorm):
    """RMSNorm that works under sequence parallelism.

    Megatron's wrapper of torch norms refuses sequence parallelism (0.16.1). The tag makes
    `finalize_model_grads` sum the weight's gradient over the tensor-parallel ranks.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class CachedSelfAttention(SelfAttention):
    """Megatron's self-attention, with a `KeyValueCache` as its inference context."""

    def _adjust_key_value_for_inference(
        self,
        inference_context: KeyValueCache | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rotary_pos_emb: tuple[torch.Tensor, torch.Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        if inference_context is None:
            return super()._adjust_key_value_for_inference(
                None, query, key, value, rotary_pos_emb, *args, **kwargs
            )
        of_query, of_key = rotary_pos_emb
        key = apply_rotary_pos_emb(key, of_key, self.config, cp_group=self.pg_collection.cp)
        if inference_context.together:
            memory: tuple[Any, Any] = inference_context.append_together(
                self.layer_number, key, value
            )
        else:
            memory = inference_context.append(self.layer_number, key, value)
        # The keys need no further rotation; there is no block table.
        return query, *memory, (of_query, None), self.attn_mask_type, None


class CoreAttention(MegatronModule):
    """Softmax attention on [steps, B, heads, head_dim]: by SDPA or flash-attn.

    Causal by default. A boolean mask [steps, slots] (True: may attend), or one for each row [B, 1,
    steps, slots], replaces the causal one and always runs on SDPA. Under context parallelism the
    steps are this rank's piece of the sequence; keys and values of the earlier pieces are gathered.
    Keys and values of a cache whose rows are not together are lists, see `KeyValueCache.append`:
    the steps are the last ones of each row, and rows beyond the lists get zeros.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        kernel: str = "sdpa",
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type is not AttnMaskType.causal:
            raise ValueError("CoreAttention is causal")
        assert pg_collection is not None
        self.context_group = pg_collection.cp
        self.softmax_scale = softmax_scale
        self._flash: Callable[..., torch.Tensor] | None = None
        if kernel == "flash":
            from flash_attn import flash_attn_func

            self._flash = flash_attn_func

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | list[torch.Tensor],
        value: torch.Tensor | list[torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        if isinstance(key, torch.Tensor):
            assert isinstance(value, torch.Tensor)
            if self.context_group.size() > 1:
                assert attention_mask is None
                key, value = self._up_to_here(key), self._up_to_here(value)
            return self._attend(query, key, value, attention_mask)
        # Clone the queries so that alignment never varies, and attend row by row. On some of SDPA's
        # paths the rounding of a row depends on alignment and on the other rows of the call.
        rows = [
            self._attend(query[:, row : row + 1].clone(), *memory, attention_mask)
            for row, memory in enumerate(zip(key, value, strict=True))
        ]
        return F.pad(torch.cat(rows, dim=1), (0, 0, 0, query.shape[1] - len(rows)))

    def _up_to_here(self, piece: torch.Tensor) -> torch.Tensor:
        """This rank's piece of keys or values and all pieces before it, [slots, B, heads, size].

        Gathering sums the gradients of a piece over the ranks that attend to it.
        """
        whole = gather_from_sequence_parallel_region(piece.contiguous(), group=self.context_group)
        return whole[: (self.context_group.rank() + 1) * len(piece)]

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """[steps, B, heads, head_dim] -> [steps, B, heads * head_dim]."""
        (steps, batch), slots = query.shape[:2], key.shape[0]
        if mask is None and self._flash is not None:
            # Causal from the end: the last step sees all slots.
            output = self._flash(
                *(x.transpose(0, 1) for x in (query, key, value)),
                softmax_scale=self.softmax_scale,
                causal=True,
            ).transpose(0, 1)
        else:
            if mask is None and 1 < steps < slots:
                # SDPA's own causal mask is aligned to the first slot.
                # Imported here: this module loads torch's compiler front end, 2 seconds.
                from torch.nn.attention.bias import causal_lower_right

                mask = causal_lower_right(steps, slots)
            output = F.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=mask,
                is_causal=mask is None and steps == slots,
                scale=self.softmax_scale,
                enable_gqa=key.shape[2] != query.shape[2],
            ).permute(2, 0, 1, 3)
        return output.reshape(steps, batch, -1)
