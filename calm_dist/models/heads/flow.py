"""The flow-matching head (Lipman et al., arXiv 2210.02747), an alternative to the energy head."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from calm_dist.heads import HeadRecipe
from calm_dist.models.heads.base import (
    GenerativeHead,
    NoiseSource,
    normal_noise,
    posterior_samples,
)
from calm_dist.models.heads.conditional_mlp import ConditionalMLP

TIME_UNITS = 1000


class FlowHead(GenerativeHead):
    """Learns the velocity z - x_0 on straight paths from normal noise x_0 to a latent z; sampling
    integrates it from time 0 to 1 with the midpoint rule."""

    def __init__(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> None:
        super().__init__()
        self.latent_size = latent_size
        self.num_samples = head.num_samples
        self.num_steps = head.steps_per_sample
        self.net = ConditionalMLP(latent_size, hidden_size, latent_size, head.num_mlp_layers)

    def layers_from_zero(self, init: str) -> Iterable[nn.Linear]:
        """The same for every ``init``: this is part of the method."""
        return self.net.layers_from_zero()

    def draw_noise(
        self, generator: torch.Generator, num_samples: int, positions: int
    ) -> torch.Tensor:
        """Normal noise [num_samples, positions, l], the start of the paths."""
        return normal_noise(num_samples, self.latent_size)(generator, positions)

    def sample(self, hidden: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """hidden [S, d], noise [N, S, l] -> latent samples [N, S, l]."""
        condition = self.net.cond_embed(hidden)
        x = noise.float()
        step_size = 1.0 / self.num_steps
        for step in range(self.num_steps):
            # A kernel fills it; a tensor of the host would be copied, with a wait.
            time = torch.full((), step / self.num_steps, device=x.device)
            middle = x + 0.5 * step_size * self._velocity(x, time, condition)
            x = x + step_size * self._velocity(middle, time + 0.5 * step_size, condition)
        return x

    def position_loss(
        self,
        hidden: torch.Tensor,
        mean: torch.Tensor,
        log_std: torch.Tensor,
        noise: NoiseSource,
    ) -> torch.Tensor:
        """Squared error of the velocity, mean over l and over N draws of the posterior, each with
        its own time and start; fp32 [S]."""

        def time_noise(generator: torch.Generator, positions: int) -> torch.Tensor:
            shape = (self.num_samples, positions)
            return torch.rand(shape, generator=generator, device=generator.device)

        target = posterior_samples(mean, log_std, noise, self.num_samples)
        start = noise.whole("head", normal_noise(self.num_samples, self.latent_size))
        times = noise.whole("time", time_noise)
        return self.path_loss(hidden, target, start, times).mean(dim=0)

    def path_loss(
        self, hidden: torch.Tensor, target: torch.Tensor, start: torch.Tensor, times: torch.Tensor
    ) -> torch.Tensor:
        """hidden [S, d], target and start [N, S, l], times [N, S] in [0, 1) -> [N, S]."""
        weight = times[..., None]
        between = (1 - weight) * start + weight * target
        velocity = self._velocity(between, times, self.net.cond_embed(hidden))
        return (velocity - (target - start)).square().mean(dim=-1)

    def _velocity(
        self, x: torch.Tensor, times: torch.Tensor, condition: torch.Tensor
    ) -> torch.Tensor:
        # The released code embeds times as whole thousandths.
        return self.net(x, (times * TIME_UNITS).long(), condition)
