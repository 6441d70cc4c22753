"""The chain head: draws the slots of a latent one after the other, each in one step from noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import nn

from calm_dist.heads import HeadRecipe
from calm_dist.losses.energy import energy_score_chunked
from calm_dist.models.heads.base import (
    GenerativeHead,
    NoiseSource,
    normal_noise,
    posterior_samples,
)
from calm_dist.models.heads.energy import LAYER_NORM_EPS, FinalLayer, HeadBlock


class ChainHead(GenerativeHead):
    """K energy heads that share their network; slot k is given the hidden state and slots 1..k-1.

    In training the earlier slots are drawn from the posterior (teacher forcing); in sampling they
    are the head's own. The loss is the sum of the slots' negative energy scores. w is the width.
    """

    def __init__(self, head: HeadRecipe, hidden_size: int, latent_size: int, slots: int) -> None:
        super().__init__()
        self.slots, self.slot_size = slots, latent_size // slots
        self.noise_size = head.noise_size
        self.num_samples = head.num_samples
        self.num_draws = head.posterior_samples
        self.beta = head.beta
        self.kernel = "torch"
        width = head.width or hidden_size
        self.views = nn.Linear(hidden_size, slots * width)
        self.from_earlier = nn.ModuleList(
            nn.Linear(k * self.slot_size, width, bias=False) for k in range(1, slots)
        )
        self.noise_embd = nn.Linear(head.noise_size, width)
        self.norm_condition = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.norm_noise = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp_blocks = nn.ModuleList(HeadBlock(width) for _ in range(head.num_mlp_layers))
        self.final_layer = FinalLayer(width, self.slot_size)

    def layers_from_zero(self, init: str) -> Iterable[nn.Linear]:
        """As in the energy head."""
        last = self.final_layer.linears[-1]
        assert isinstance(last, nn.Linear)
        return [last] if init == "released" else []

    def use_kernel(self, kernel: str) -> None:
        self.kernel = kernel

    def draw_noise(
        self, generator: torch.Generator, num_samples: int, positions: int
    ) -> torch.Tensor:
        """Uniform noise in [-0.5, 0.5) for all slots, [num_samples, positions, K * noise_size]."""
        shape = (num_samples, positions, self.slots * self.noise_size)
        return torch.rand(shape, generator=generator, device=generator.device) - 0.5

    def sample(self, hidden: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """hidden [S, d], noise [N, S, K * noise_size] -> latent samples [N, S, l]."""
        num_samples, positions = noise.shape[:2]
        views = self.views(hidden).unflatten(-1, (self.slots, -1))
        latent = hidden.new_empty(num_samples * positions, 0)
        of_slots = noise.to(hidden.dtype).flatten(0, 1).chunk(self.slots, dim=-1)
        for slot, of_slot in enumerate(of_slots):
            view = views[:, slot].repeat(num_samples, 1)
            if slot > 0:
                view = view + self.from_earlier[slot - 1](latent)
            made = self._network(self.norm_condition(view), of_slot[None])[0]
            latent = torch.cat([latent, made], dim=-1)
        return latent.unflatten(0, (num_samples, positions))

    def teacher_forced(
        self, hidden: torch.Tensor, latent: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Samples of every slot, given the earlier slots of ``latent``.

        Args:
            hidden: [S, d].
            latent: [S, l].
            noise: [N, S, K * noise_size].

        Returns:
            [N, S * K, l / K]; the slots of a position are adjacent.
        """
        views = self.views(hidden).unflatten(-1, (self.slots, -1))
        conditions = [views[:, 0]]
        for slot, linear in enumerate(self.from_earlier, start=1):
            conditions.append(views[:, slot] + linear(latent[:, : slot * self.slot_size]))
        condition = self.norm_condition(torch.stack(conditions, dim=1).flatten(0, 1))
        return self._network(condition, noise.unflatten(-1, (self.slots, -1)).flatten(1, 2))

    def position_loss(
        self,
        hidden: torch.Tensor,
        mean: torch.Tensor,
        log_std: torch.Tensor,
        noise: NoiseSource,
    ) -> torch.Tensor:
        """Sum over slots of the negative energy score of N samples against M draws, fp32 [S]."""

        def head_noise(generator: torch.Generator, positions: int) -> torch.Tensor:
            return self.draw_noise(generator, self.num_samples, positions)

        with torch.no_grad():
            before = posterior_samples(mean, log_std, noise, 1, kind="before")[0].to(hidden.dtype)
        samples = self.teacher_forced(hidden, before, noise.whole("head", head_noise))
        mean, log_std = (
            part.unflatten(-1, (self.slots, -1)).flatten(0, 1) for part in (mean, log_std)
        )
        score = self._score(samples, mean, log_std, noise)
        return -score.unflatten(0, (-1, self.slots)).sum(dim=-1)

    def _score(
        self, samples: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor, noise: NoiseSource
    ) -> torch.Tensor:
        """Energy score of each slot of each position [S * K]."""
        if self.kernel == "triton":
            # Imported on demand: triton comes only with torch for GPUs.
            from calm_dist.losses.energy_kernel import fused_energy_score

            keys = torch.stack([noise.keys(f"posterior {k}") for k in range(self.slots)], dim=-1)
            return fused_energy_score(
                samples, mean, log_std, keys.flatten(), num_draws=self.num_draws, beta=self.beta
            )
        return energy_score_chunked(samples, mean, log_std, self._draws(noise), self.beta)

    def _draws(self, noise: NoiseSource) -> Iterator[tuple[int, int, Callable[[], torch.Tensor]]]:
        """The noise of the posterior's draws in chunks; the slots of a position are adjacent."""

        def cut(draw: Callable[[], torch.Tensor]) -> torch.Tensor:
            # [M, s, l] -> [M, s * K, l / K]
            return draw().unflatten(-1, (self.slots, -1)).flatten(1, 2)

        size = normal_noise(self.num_draws, self.slots * self.slot_size)
        for start, stop, draw in noise.chunks("posterior", size):
            yield start * self.slots, stop * self.slots, partial(cut, draw)

    def _network(self, condition: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """condition [n, w], noise [N, n, noise_size] -> samples of a slot [N, n, l / K]."""
        x = self.norm_noise(self.noise_embd(noise.to(condition.dtype)))
        for block in self.mlp_blocks:
            x = block(x, condition)
        return self.final_layer(x)
