"""The interface of a generative head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import nn

Draw = Callable[[torch.Generator, int], torch.Tensor]
"""(generator, positions) -> noise [n, positions, ...]."""


class NoiseSource(Protocol):
    """Random numbers of a training step for this process's positions [S]."""

    def chunks(
        self, kind: str, draw: Draw
    ) -> Iterator[tuple[int, int, Callable[[], torch.Tensor]]]:
        """Yield (start, stop, function that draws noise [n, stop - start, ...]) until all positions
        are covered; chunks can be drawn in any order, and concurrently.

        Args:
            kind: name of the noise; different kinds are independent.
            draw: draws the noise from a generator.
        """

    def whole(self, kind: str, draw: Draw) -> torch.Tensor:
        """All chunks concatenated, [n, S, ...]."""

    def keys(self, kind: str) -> torch.Tensor:
        """A key of a counter-based generator for each position, int64 [S]."""


class Head(nn.Module, ABC):
    """A module after the backbone that processes each position independently, in its own engine."""

    @abstractmethod
    def layers_from_zero(self, init: str) -> Iterable[nn.Linear]:
        """The layers whose weights start at zero with ``model.init``."""


class GenerativeHead(Head):
    """A head that maps a hidden state of the backbone to samples of the next latent.

    N is the number of samples, S the number of positions, d the hidden and l the latent size.
    """

    @abstractmethod
    def draw_noise(
        self, generator: torch.Generator, num_samples: int, positions: int
    ) -> torch.Tensor:
        """All the noise that `sample` needs, on the generator's device; S is the second-to-last
        dimension."""

    @abstractmethod
    def sample(self, hidden: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """hidden [S, d], noise from `draw_noise` -> latent samples [N, S, l]."""

    @abstractmethod
    def position_loss(
        self,
        hidden: torch.Tensor,
        mean: torch.Tensor,
        log_std: torch.Tensor,
        noise: NoiseSource,
    ) -> torch.Tensor:
        """Training loss of each position, fp32 [S].

        Args:
            hidden: [S, d].
            mean, log_std: [S, l], the posterior of the patch to predict.
            noise: the random numbers of this step.
        """

    def use_kernel(self, kernel: str) -> None:
        """Select the implementation of the energy score, ``training.energy_kernel``.

        Raises:
            NotImplementedError: this head has no energy score, or supports only torch's.
        """
        if kernel != "torch":
            raise NotImplementedError(f"{type(self).__name__}: no energy kernel {kernel!r}")

    def forward(
        self,
        hidden: torch.Tensor,
        mean: torch.Tensor,
        log_std: torch.Tensor,
        noise: NoiseSource,
        weight: torch.Tensor,
    ) -> torch.Tensor:
        """Weighted sum of `position_loss`, a scalar, so that the shards of a batch add up.

        Args:
            weight: [S], zero for positions that predict nothing.
        """
        return (self.position_loss(hidden, mean, log_std, noise) * weight).sum()


def normal_noise(num_samples: int, size: int) -> Draw:
    """A function that draws standard normal noise [num_samples, positions, size], position by
    position."""

    def draw(generator: torch.Generator, positions: int) -> torch.Tensor:
        shape = (positions, num_samples, size)
        return torch.randn(shape, generator=generator, device=generator.device).transpose(0, 1)

    return draw


def posterior_samples(
    mean: torch.Tensor,
    log_std: torch.Tensor,
    noise: NoiseSource,
    num_samples: int,
    kind: str = "posterior",
) -> torch.Tensor:
    """N = ``num_samples`` draws from the posterior [S, l], fp32 [N, S, l]; ``kind`` names their
    noise."""
    eps = noise.whole(kind, normal_noise(num_samples, mean.shape[-1]))
    return mean.float() + eps * log_std.float().exp()
