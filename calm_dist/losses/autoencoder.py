"""The variational loss of the autoencoder (section 2.2 of the paper) and its statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from calm_dist.losses.linear_cross_entropy import linear_cross_entropy


class AutoencoderSettings(Protocol):
    """The fields of `models.autoencoder.AutoencoderConfig` that the losses use."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def patch_size(self) -> int: ...
    @property
    def latent_size(self) -> int: ...
    @property
    def token_dropout(self) -> float: ...
    @property
    def ae_dropout(self) -> float: ...
    @property
    def replaced_token_id(self) -> int: ...
    @property
    def kl_weight(self) -> float: ...
    @property
    def kl_clamp(self) -> float: ...


class TokenAutoencoder(Protocol):
    """The part of `models.autoencoder.Autoencoder` that the losses use; see there."""

    @property
    def config(self) -> AutoencoderSettings: ...
    @property
    def output_weight(self) -> torch.Tensor: ...
    @property
    def decoder(self) -> Callable[[torch.Tensor], torch.Tensor]: ...
    def encode(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...
    def decode(self, latents: torch.Tensor) -> torch.Tensor: ...


class AutoencoderLoss(NamedTuple):
    """``total`` = K * cross_entropy + kl_weight * kl; all scalars, in nats."""

    total: torch.Tensor
    cross_entropy: torch.Tensor
    kl: torch.Tensor


class TrainingNoise(NamedTuple):
    """The random numbers of one training step for tokens [B, T], P = T/K patches."""

    token_keep: torch.Tensor  # bool [B, T]; False: replaced by `replaced_token_id`
    eps: torch.Tensor  # [B, P, l], standard normal
    latent_keep: torch.Tensor  # bool [B, P, l]; False: dropped from z


def draw_training_noise(
    model: TokenAutoencoder, tokens: torch.Tensor, generator: torch.Generator
) -> TrainingNoise:
    """Noise of one training step from a generator on the tokens' device."""
    config = model.config
    batch, length = tokens.shape
    latent_shape = (batch, length // config.patch_size, config.latent_size)
    device = tokens.device

    def keep(shape: tuple[int, ...], dropout: float) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device=device) >= dropout

    return TrainingNoise(
        token_keep=keep((batch, length), config.token_dropout),
        eps=torch.randn(latent_shape, generator=generator, device=device),
        latent_keep=keep(latent_shape, config.ae_dropout),
    )


def kl_per_dimension(mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, std²) || N(0, 1)) of each dimension, same shape as ``mean``, in nats."""
    return 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std)


def autoencoder_loss(
    model: TokenAutoencoder, tokens: torch.Tensor, noise: TrainingNoise
) -> AutoencoderLoss:
    """K·CE + kl_weight·KL, with the KL of every dimension clamped to at least ``kl_clamp``.

    Args:
        tokens: [B, T], the target, and the input before token dropout.
        noise: from `draw_training_noise`; an argument so that tests can fix it.
    """
    config = model.config
    inputs = torch.where(noise.token_keep, tokens, config.replaced_token_id)
    # Under autocast they are bf16, too coarse for the KL.
    mean, log_std = (part.float() for part in model.encode(inputs))
    z = mean + noise.eps * log_std.exp()
    z = z * noise.latent_keep / (1 - config.ae_dropout)  # inverted scaling
    hidden = model.decoder(z).flatten(0, -2)
    cross_entropy = linear_cross_entropy(hidden, model.output_weight, tokens.flatten())
    kl = kl_per_dimension(mean, log_std).clamp(min=config.kl_clamp).sum(-1).mean()
    total = config.patch_size * cross_entropy + config.kl_weight * kl
    return AutoencoderLoss(total, cross_entropy, kl)
