"""The diffusion head: DDPM with learned variances (Nichol & Dhariwal, arXiv 2102.09672).

An alternative to the energy head, with the released code's choices: 1,000 noise levels on the
cosine schedule, the noise as the network's target, the variational bound only for the variances,
and 100 of the levels for sampling.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import nn

from calm_dist.heads import HeadRecipe
from calm_dist.heads.iterative import DIFFUSION_STEPS
from calm_dist.models.heads.base import (
    GenerativeHead,
    NoiseSource,
    normal_noise,
    posterior_samples,
)
from calm_dist.models.heads.conditional_mlp import ConditionalMLP

LARGEST_BETA = 0.999
# The bound's last term treats a latent as one of 256 levels in -1..1, as for images.
HALF_LEVEL = 1.0 / 255.0
EDGE = 0.999
SMALLEST_PROBABILITY = 1e-12


@dataclass(frozen=True)
class DiffusionSchedule:
    """Coefficients of each of the t noise levels, fp32 [t]; q is the noising process."""

    times: torch.Tensor
    """int64: the level's number among the `DIFFUSION_STEPS` of training."""
    signal: torch.Tensor
    """sqrt(alpha_bar): the share of the latent in its noisy version."""
    noise: torch.Tensor
    """sqrt(1 - alpha_bar)."""
    log_beta: torch.Tensor
    """Log of the larger variance; the network interpolates between it and the next one."""
    log_posterior_variance: torch.Tensor
    """Log variance of q(x_{t-1} | x_t, x_0)."""
    posterior_of_start: torch.Tensor
    """Weight of x_0 in the mean of q(x_{t-1} | x_t, x_0)."""
    posterior_of_noisy: torch.Tensor
    """Weight of x_t in that mean."""

    def __len__(self) -> int:
        return len(self.times)

    def to(self, device: torch.device) -> DiffusionSchedule:
        """A copy on a device."""
        # A copy made in inference mode could not be used in a later training.
        with torch.inference_mode(False):
            return DiffusionSchedule(*(getattr(self, f.name).to(device) for f in fields(self)))


class _Schedules:
    """One schedule on every device on which it was used: a copy makes the host wait."""

    def __init__(self, num_steps: int) -> None:
        self._on = {torch.device("cpu"): schedule(num_steps)}

    def on(self, device: torch.device) -> DiffusionSchedule:
        if device not in self._on:
            self._on[device] = self._on[torch.device("cpu")].to(device)
        return self._on[device]


def cosine_alpha_bar() -> torch.Tensor:
    """alpha_bar of the cosine schedule, float64 [`DIFFUSION_STEPS`]."""

    def level(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [
        min(1 - level((t + 1) / DIFFUSION_STEPS) / level(t / DIFFUSION_STEPS), LARGEST_BETA)
        for t in range(DIFFUSION_STEPS)
    ]
    return (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)


def schedule(num_steps: int = DIFFUSION_STEPS) -> DiffusionSchedule:
    """``num_steps`` >= 2 evenly spaced levels of training, including the first and the last."""
    stride = (DIFFUSION_STEPS - 1) / (num_steps - 1)
    times = torch.tensor([round(number * stride) for number in range(num_steps)])
    alpha_bar = cosine_alpha_bar()[times]
    before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    beta = 1 - alpha_bar / before
    variance = beta * (1 - before) / (1 - alpha_bar)
    # The first level's variance is zero; use the second's, so that its log exists.
    variance[0] = variance[1]
    coefficients = (
        alpha_bar.sqrt(),
        (1 - alpha_bar).sqrt(),
        beta.log(),
        variance.log(),
        beta * before.sqrt() / (1 - alpha_bar),
        (1 - before) * (1 - beta).sqrt() / (1 - alpha_bar),
    )
    return DiffusionSchedule(times, *(values.float() for values in coefficients))


class DiffusionHead(GenerativeHead):
    """Learns the noise in a noisy latent and the variance of a denoising step."""

    def __init__(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> None:
        super().__init__()
        self.latent_size = latent_size
        self.num_samples = head.num_samples
        self.num_steps = head.steps_per_sample
        self.net = ConditionalMLP(latent_size, hidden_size, 2 * latent_size, head.num_mlp_layers)
        # Not buffers, which a bf16 engine would round.
        self._training, self._sampling = _Schedules(DIFFUSION_STEPS), _Schedules(self.num_steps)

    def layers_from_zero(self, init: str) -> Iterable[nn.Linear]:
        """The same for every ``init``: this is part of the method."""
        return self.net.layers_from_zero()

    def draw_noise(
        self, generator: torch.Generator, num_samples: int, positions: int
    ) -> torch.Tensor:
        """Normal noise [sampling_steps + 1, num_samples, positions, l]: the start of the chain,
        then the noise of each step (that of the last step is unused)."""
        shape = (self.num_steps + 1, num_samples, positions, self.latent_size)
        return torch.randn(shape, generator=generator, device=generator.device)

    def sample(self, hidden: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """hidden [S, d], noise [sampling_steps + 1, N, S, l] -> latent samples [N, S, l]."""
        condition = self.net.cond_embed(hidden)
        x = noise[0].float()
        table = self._sampling.on(x.device)
        for level in reversed(range(self.num_steps)):
            output = self.net(x, table.times[level], condition)
            x, log_variance = _denoised(table, level, x, output)
            if level > 0:
                x = x + (0.5 * log_variance).exp() * noise[self.num_steps - level].float()
        return x

    def position_loss(
        self,
        hidden: torch.Tensor,
        mean: torch.Tensor,
        log_std: torch.Tensor,
        noise: NoiseSource,
    ) -> torch.Tensor:
        """Mean of `level_loss` over N draws of the posterior, each with its own level and noise;
        fp32 [S]."""

        def level(generator: torch.Generator, positions: int) -> torch.Tensor:
            shape = (self.num_samples, positions)
            return torch.randint(
                DIFFUSION_STEPS, shape, generator=generator, device=generator.device
            )

        target = posterior_samples(mean, log_std, noise, self.num_samples)
        added = noise.whole("head", normal_noise(self.num_samples, self.latent_size))
        levels = noise.whole("time", level)
        return self.level_loss(hidden, target, added, levels).mean(dim=0)

    def level_loss(
        self, hidden: torch.Tensor, target: torch.Tensor, added: torch.Tensor, levels: torch.Tensor
    ) -> torch.Tensor:
        """Squared error of the noise, plus the bound in bits without gradient for the noise.

        Args:
            hidden: [S, d].
            target: latents [N, S, l].
            added: standard normal noise [N, S, l].
            levels: int64 [N, S] in 0..`DIFFUSION_STEPS` - 1.

        Returns:
            fp32 [N, S], both terms averaged over l.
        """
        table, levels = self._training.on(target.device), levels.to(target.device)
        signal, amount = (_at(part, levels) for part in (table.signal, table.noise))
        noisy = signal * target + amount * added
        output = self.net(noisy, levels, self.net.cond_embed(hidden))
        predicted, variance = output.chunk(2, dim=-1)
        squared = (predicted - added).square().mean(dim=-1)
        frozen = torch.cat([predicted.detach(), variance], dim=-1)
        return squared + _bound(table, levels, target, noisy, frozen)


def _at(table: torch.Tensor, levels: torch.Tensor | int) -> torch.Tensor:
    """A coefficient for each latent: levels [...], on the table's device, -> [..., 1]."""
    return table[levels][..., None]


def _denoised(
    table: DiffusionSchedule, levels: torch.Tensor | int, noisy: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log variance of p(x_{t-1} | x_t) from the network's output [..., 2l]."""
    predicted, fraction = output.chunk(2, dim=-1)
    signal = _at(table.signal, levels)
    start = noisy / signal - _at(table.noise, levels) / signal * predicted
    mean = (
        _at(table.posterior_of_start, levels) * start
        + _at(table.posterior_of_noisy, levels) * noisy
    )
    # The network's output in -1..1 interpolates between the smaller and the larger variance.
    share = (fraction + 1) / 2
    low = _at(table.log_posterior_variance, levels)
    return mean, share * _at(table.log_beta, levels) + (1 - share) * low


def _bound(
    table: DiffusionSchedule,
    levels: torch.Tensor,
    target: torch.Tensor,
    noisy: torch.Tensor,
    output: torch.Tensor,
) -> torch.Tensor:
    """One term of the variational bound, bits per dimension: KL(q(x_{t-1} | x_t, x_0) || p), or
    -log p(x_0 | x_1) at the first level."""
    true_mean = (
        _at(table.posterior_of_start, levels) * target
        + _at(table.posterior_of_noisy, levels) * noisy
    )
    true_log = _at(table.log_posterior_variance, levels)
    mean, log_variance = _denoised(table, levels, noisy, output)
    kl = 0.5 * (
        log_variance
        - true_log
        - 1
        + (true_log - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
    )
    first = -_level_log_probability(target, mean, 0.5 * log_variance)
    return torch.where(levels == 0, first.mean(dim=-1), kl.mean(dim=-1)) / math.log(2.0)


def _level_log_probability(
    x: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor
) -> torch.Tensor:
    """Log probability of the one of 256 levels that contains x; the outermost ones extend to
    infinity."""
    scale = (-log_std).exp()
    above = _normal_cdf(scale * (x - mean + HALF_LEVEL))
    below = _normal_cdf(scale * (x - mean - HALF_LEVEL))
    inside = (above - below).clamp(min=SMALLEST_PROBABILITY).log()
    lowest = above.clamp(min=SMALLEST_PROBABILITY).log()
    highest = (1 - below).clamp(min=SMALLEST_PROBABILITY).log()
    return torch.where(x < -EDGE, lowest, torch.where(x > EDGE, highest, inside))


def _normal_cdf(x: torch.Tensor) -> torch.Tensor:
    """The tanh approximation, which the released loss uses."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))
