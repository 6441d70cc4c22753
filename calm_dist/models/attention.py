"""Attention core and norm that Megatron's layers are built with."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import nn

try:
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None


class RMSNorm(nn.RMSNorm):
    """RMSNorm that may be used under sequence parallelism.

    Megatron's wrapper of torch norms refuses sequence parallelism (0.16.1). The tag makes
    `finalize_model_grads` sum the weight's gradient over the tensor-parallel ranks.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class CoreAttention(MegatronModule):
    """Softmax attention on [steps, B, heads, head_dim]: flash-attn where it applies, else SDPA.

    Causal by default. A boolean mask [steps, steps] (True: may attend) replaces the causal one;
    it always runs on SDPA.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type is not AttnMaskType.causal or config.context_parallel_size != 1:
            # A plain core under context parallelism does not raise by itself: it is wrong.
            raise ValueError("CoreAttention is causal and does not support context parallelism")
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        steps, batch = query.shape[:2]
        if attention_mask is None and _flash_applies(query):
            output = flash_attn_func(
                *(x.transpose(0, 1) for x in (query, key, value)),
                softmax_scale=self.softmax_scale,
                causal=True,
            ).transpose(0, 1)
        else:
            output = F.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=attention_mask,
                is_causal=attention_mask is None,
                scale=self.softmax_scale,
                enable_gqa=key.shape[2] != query.shape[2],
            ).permute(2, 0, 1, 3)
        return output.reshape(steps, batch, -1)


def _flash_applies(query: torch.Tensor) -> bool:
    return (
        flash_attn_func is not None
        and query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
    )
