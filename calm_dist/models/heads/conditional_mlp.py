"""The network of the iterative heads: an MLP with adaptive layer norm (arXiv 2406.11838).

Names of parameters are those of the released code's ``generative_head.net``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from calm_dist.heads.iterative import TIME_FEATURES

LAYER_NORM_EPS = 1e-6
LONGEST_PERIOD = 10_000.0


class TimeEmbedding(nn.Module):
    """Sinusoids of a time in 0..1000 and a two-layer MLP: times [...] -> [..., d]."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_FEATURES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, times: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        half = TIME_FEATURES // 2
        numbers = torch.arange(half, dtype=torch.float32, device=times.device)
        frequencies = torch.exp(-math.log(LONGEST_PERIOD) * numbers / half)
        angles = times[..., None].float() * frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(features.to(dtype))


class AdaptiveBlock(nn.Module):
    """x + gate * MLP(LN(x) * (1 + scale) + shift); gate, scale and shift are linear in SiLU of the
    condition."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 3 * hidden_size))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift, scale, gate = self.adaLN_modulation(condition).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class AdaptiveFinalLayer(nn.Module):
    """LN without weights, shift and scale from the condition, Linear."""

    def __init__(self, hidden_size: int, out_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, out_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        x = F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
        return self.linear(x * (1 + scale) + shift)


class ConditionalMLP(nn.Module):
    """Maps noisy latents, times and the backbone's hidden states to a vector for each latent."""

    def __init__(self, latent_size: int, hidden_size: int, out_size: int, num_blocks: int) -> None:
        super().__init__()
        self.time_embed = TimeEmbedding(hidden_size)
        self.cond_embed = nn.Linear(hidden_size, hidden_size)
        self.input_proj = nn.Linear(latent_size, hidden_size)
        self.res_blocks = nn.ModuleList(AdaptiveBlock(hidden_size) for _ in range(num_blocks))
        self.final_layer = AdaptiveFinalLayer(hidden_size, out_size)

    def layers_from_zero(self) -> Iterator[nn.Linear]:
        """All modulations and the output, so that every block starts as the identity."""
        for block in (*self.res_blocks, self.final_layer):
            yield block.adaLN_modulation[1]
        yield self.final_layer.linear

    def forward(
        self, x: torch.Tensor, times: torch.Tensor, embedded_hidden: torch.Tensor
    ) -> torch.Tensor:
        """x [N, S, l], times [N, S] or a scalar, `cond_embed` of the hidden states [S, d] -> fp32
        [N, S, out].

        If all N samples of a position have the same time, the condition, and everything that
        depends only on it, is computed once and broadcast.
        """
        condition = self.time_embed(times, embedded_hidden.dtype) + embedded_hidden
        x = self.input_proj(x.to(embedded_hidden.dtype))
        for block in self.res_blocks:
            x = block(x, condition)
        return self.final_layer(x, condition).float()
