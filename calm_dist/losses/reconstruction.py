"""How well an autoencoder reconstructs tokens, and which latent dimensions it uses."""

from __future__ import annotations

import math
from typing import Any

import torch

from calm_dist.losses.autoencoder import TokenAutoencoder, kl_per_dimension

COLLAPSED_NATS = 0.05
ACTIVE_VARIANCE = 0.01
# Standard deviations of the noise under which reconstruction is measured: a language model's
# samples are never exact, so the decoder must tolerate errors. The posterior of the paper's
# autoencoder has a std of about 0.3.
NOISE_SIZES = (0.1, 0.3, 0.5, 1.0)
# Logits in memory at a time, for vocabularies of any size.
CHUNK_LOGITS = 1 << 24


class Reconstruction:
    """Sums over held-out blocks, from which `summary` computes the reported numbers.

    A dimension is *collapsed* if its KL to the prior, averaged over patches, is at most
    `COLLAPSED_NATS`. That average is an upper bound of the information about the patch that the
    dimension carries, so collapsed dimensions carry almost none. The clamp of the training loss is
    not a suitable threshold: KL below it costs nothing, so such a dimension may carry as much as
    the clamp (0.5 nats in the paper).

    A dimension is *active* if its mean varies over patches with a variance above `ACTIVE_VARIANCE`
    (Burda et al., arXiv 1509.00519). A dimension that is far from the prior but the same for every
    patch is neither.

    Attributes:
        latent_sums: float64 [4, l], sums over patches of KL, mean, mean², std.
        counts: int64 [4]: correct tokens with a sampled latent, and with the mean; tokens; blocks.
        right_under_noise: int64 [len(NOISE_SIZES)], correct tokens with the mean and noise of each
            size.
    """

    def __init__(self, latent_size: int, device: torch.device) -> None:
        self.latent_sums = torch.zeros(4, latent_size, dtype=torch.float64, device=device)
        self.counts = torch.zeros(4, dtype=torch.int64, device=device)
        self.right_under_noise = torch.zeros(len(NOISE_SIZES), dtype=torch.int64, device=device)

    @torch.no_grad()
    def add_block(self, model: TokenAutoencoder, tokens: torch.Tensor, eps: torch.Tensor) -> None:
        """Encode and decode one block without dropout.

        Args:
            model: on the device of the sums.
            tokens: [T]
            eps: [T/K, l] standard normal; the sampled latent is mean + eps * std, and under noise
                of size s it is mean + eps * s.
        """
        mean, log_std = (value[0] for value in model.encode(tokens[None]))
        std = log_std.exp()
        per_patch = (kl_per_dimension(mean, log_std), mean, mean.square(), std)
        self.latent_sums += torch.stack([value.double().sum(0) for value in per_patch])
        self.counts[0] += _tokens_right(model, mean + eps * std, tokens)
        self.counts[1] += _tokens_right(model, mean, tokens)
        self.counts[2] += len(tokens)
        self.counts[3] += 1
        for i, size in enumerate(NOISE_SIZES):
            self.right_under_noise[i] += _tokens_right(model, mean + eps * size, tokens)

    def summary(self, patch_size: int) -> dict[str, Any]:
        """The numbers of an evaluation record.

        ``kl_per_dim`` is in nats; ``mean_std`` is the average std of the posteriors; ``spread`` is
        the spread of their means: the root of their variance over patches, averaged over
        dimensions.
        """
        sampled, exact, tokens, blocks = self.counts.tolist()
        kl, mean, squared_mean, std = self.latent_sums.cpu() * patch_size / tokens
        # Rounding can make the variance of a constant negative.
        variance = (squared_mean - mean.square()).clamp(min=0)
        return {
            "token_accuracy": sampled / tokens,
            "token_accuracy_mean": exact / tokens,
            "token_accuracy_under_noise": {
                str(size): right / tokens
                for size, right in zip(NOISE_SIZES, self.right_under_noise.tolist(), strict=True)
            },
            "collapsed_dims": int((kl <= COLLAPSED_NATS).sum()),
            "active_dims": int((variance > ACTIVE_VARIANCE).sum()),
            "latent_size": len(kl),
            "kl_per_dim": kl.tolist(),
            "mean_std": float(std.mean()),
            "spread": math.sqrt(variance.mean()),
            "blocks": blocks,
        }


def _tokens_right(
    model: TokenAutoencoder, latents: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """How many of tokens [T] are the most likely ones given latents [T/K, l]."""
    size = model.config.patch_size
    patches = max(1, CHUNK_LOGITS // (size * model.config.vocab_size))
    parts = zip(latents.split(patches), tokens.split(patches * size), strict=True)
    return sum(
        ((model.decode(z[None])[0].argmax(-1) == part).sum() for z, part in parts),
        torch.zeros((), dtype=torch.int64, device=tokens.device),
    )
