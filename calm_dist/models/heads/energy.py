"""The energy head: one step from noise and hidden state to a latent sample (paper, section 4).

Names of parameters are those of the released code's ``mlp_generator``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from calm_dist.heads import HeadRecipe
from calm_dist.losses.energy import energy_score_chunked
from calm_dist.models.heads.base import GenerativeHead, NoiseSource, normal_noise

LAYER_NORM_EPS = 1e-6


class ConditionedLinear(nn.Linear):
    """Linear on concat[x, condition], where all N samples of a position share the condition.

    A separate module, because ZeRO-3 fetches only the weights of modules that are called.
    """

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """x [N, S, d], condition [S, d] -> [N, S, out]; the condition's half is computed once."""
        of_x, of_condition = self.weight.chunk(2, dim=1)
        return F.linear(x, of_x).add_(F.linear(condition, of_condition, self.bias))


class HeadBlock(nn.Module):
    """Residual block: concat[LN(x), y] -> Linear, SiLU, Linear, SiLU, Linear -> gate -> Linear."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS)
        self.linears = nn.Sequential(
            ConditionedLinear(2 * hidden_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, 2 * hidden_size),
        )
        self.down_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """x [N, S, d], condition [S, d] -> [N, S, d]."""
        hidden = self.linears[0](self.in_ln(x), condition)
        gate, up = self.linears[1:](hidden).chunk(2, dim=-1)
        return x + self.down_proj(F.silu(gate) * up)


class FinalLayer(nn.Module):
    """LN -> Linear, SiLU, Linear to the latent size."""

    def __init__(self, hidden_size: int, latent_size: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS)
        self.linears = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, latent_size)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linears(self.in_ln(x))


class EnergyHead(GenerativeHead):
    """An MLP that maps uniform noise and the backbone's hidden state to a latent in one pass."""

    def __init__(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> None:
        super().__init__()
        self.noise_size = head.noise_size
        self.num_samples = head.num_samples
        self.num_draws = head.posterior_samples
        self.beta = head.beta
        self.kernel = "torch"
        """Implementation of the score. The random streams differ; the distribution is the same."""
        self.noise_embd = nn.Linear(head.noise_size, hidden_size)
        self.hidden_embd = nn.Linear(hidden_size, hidden_size)
        self.norm_hidden = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS)
        self.norm_noise = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS)
        self.mlp_blocks = nn.ModuleList(HeadBlock(hidden_size) for _ in range(head.num_mlp_layers))
        self.final_layer = FinalLayer(hidden_size, latent_size)

    def layers_from_zero(self, init: str) -> Iterable[nn.Linear]:
        """``released``: the last layer, so that every sample is at first the origin. ``fan_in``:
        none; small initial samples let gradients reach the backbone from the first step."""
        last = self.final_layer.linears[-1]
        assert isinstance(last, nn.Linear)
        return [last] if init == "released" else []

    def use_kernel(self, kernel: str) -> None:
        self.kernel = kernel

    def draw_noise(
        self, generator: torch.Generator, num_samples: int, positions: int
    ) -> torch.Tensor:
        """Uniform noise in [-0.5, 0.5) of shape [num_samples, positions, noise_size]."""
        shape = (num_samples, positions, self.noise_size)
        return torch.rand(shape, generator=generator, device=generator.device) - 0.5

    def sample(self, hidden: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """hidden [S, d], noise [N, S, noise_size] -> latent samples [N, S, l]."""
        x = self.norm_noise(self.noise_embd(noise.to(hidden.dtype)))
        condition = self.norm_hidden(self.hidden_embd(hidden))
        for block in self.mlp_blocks:
            x = block(x, condition)
        return self.final_layer(x)

    def position_loss(
        self,
        hidden: torch.Tensor,
        mean: torch.Tensor,
        log_std: torch.Tensor,
        noise: NoiseSource,
    ) -> torch.Tensor:
        """The negative energy score of N samples against M posterior draws, fp32 [S]."""

        if self.kernel == "triton":
            return self._position_loss_by_kernels(hidden, mean, log_std, noise)

        def head_noise(generator: torch.Generator, positions: int) -> torch.Tensor:
            return self.draw_noise(generator, self.num_samples, positions)

        samples = self.sample(hidden, noise.whole("head", head_noise))
        chunks = noise.chunks("posterior", normal_noise(self.num_draws, mean.shape[-1]))
        return -energy_score_chunked(samples, mean, log_std, chunks, self.beta)

    def _position_loss_by_kernels(
        self,
        hidden: torch.Tensor,
        mean: torch.Tensor,
        log_std: torch.Tensor,
        noise: NoiseSource,
    ) -> torch.Tensor:
        """`position_loss` with two kernels that draw their own numbers."""
        # Imported on demand: triton comes only with torch for GPUs.
        from calm_dist.losses.energy_kernel import fused_energy_score
        from calm_dist.models.heads.noise_kernel import uniform_noise

        keys = noise.keys("head")
        drawn = uniform_noise(keys, self.num_samples, self.noise_size, hidden.dtype)
        return -fused_energy_score(
            self.sample(hidden, drawn),
            mean,
            log_std,
            noise.keys("posterior"),
            num_draws=self.num_draws,
            beta=self.beta,
        )
