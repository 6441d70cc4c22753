"""Text as the latents of an autoencoder, and back: one vector for K tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from calm_dist.errors import DataError
from calm_dist.models.autoencoder import Autoencoder
from calm_dist.text.tokenizer import Tokenizer

_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, BadZipFile)
"""What numpy raises for a file that is not in .npz format, or lacks an array."""
_PATCHES_AT_ONCE = 256
"""Patches that are encoded, or whose logits are in memory, at a time."""


@dataclass(frozen=True)
class TextVectors:
    """The posterior of each patch of a text, float32.

    Attributes:
        mean, log_std: [P, l]; a sample is ``mean + exp(log_std) * normal``.
    """

    mean: np.ndarray
    log_std: np.ndarray

    def sample(self, seed: int) -> np.ndarray:
        """A draw from the posteriors, float32 [P, l]."""
        noise = np.random.default_rng(seed).standard_normal(self.mean.shape, np.float32)
        return self.mean + np.exp(self.log_std) * noise

    def save(self, file: str | Path) -> None:
        """Write an .npz file of ``mean`` and ``log_std``."""
        with Path(file).open("wb") as stream:
            np.savez(stream, mean=self.mean, log_std=self.log_std)

    @staticmethod
    def load(file: str | Path) -> TextVectors:
        """Read a file that `save` or numpy wrote; without ``log_std`` it is -inf, no noise.

        Raises:
            DataError: the file is missing, damaged, or has no ``mean`` [P, l] of numbers.
        """
        try:
            with np.load(file, allow_pickle=False) as found:
                mean = found["mean"].astype(np.float32)
                log_std = (
                    found["log_std"].astype(np.float32)
                    if "log_std" in found
                    else np.full_like(mean, -np.inf)
                )
        except _DAMAGED as error:
            raise DataError(
                f"{file}: cannot be read as vectors ({error}); give an .npz file with an array "
                '"mean" [patches, latent size]'
            ) from error
        is_finite = np.isfinite(mean).all() and (log_std < np.inf).all()
        if mean.ndim != 2 or log_std.shape != mean.shape or not is_finite:
            raise DataError(
                f"{file}: mean {mean.shape}, log_std {log_std.shape}; both must be [patches, "
                "latent size], the mean finite, and log_std finite or -inf"
            )
        return TextVectors(mean, log_std)


@torch.no_grad()
def encode_text(autoencoder: Autoencoder, tokenizer: Tokenizer, text: str) -> TextVectors:
    """The vectors of a text; its first patch is filled with begin tokens, as in generation.

    Each patch is encoded on its own, so the memory does not grow with the text.

    Raises:
        DataError: the tokenizer has more entries than the autoencoder.
    """
    _check_vocabulary(autoencoder, tokenizer)
    tokens = tokenizer.encode(text)
    tokens = [tokenizer.begin_id] * (-len(tokens) % autoencoder.patch_size) + tokens
    if not tokens:
        empty = np.empty((0, autoencoder.config.latent_size), np.float32)
        return TextVectors(empty, empty)
    device = autoencoder.output_weight.device
    pieces = torch.tensor([tokens]).split(_PATCHES_AT_ONCE * autoencoder.patch_size, dim=1)
    encoded = [autoencoder.encode(piece.to(device)) for piece in pieces]
    mean, log_std = (torch.cat(parts, dim=1) for parts in zip(*encoded, strict=True))
    return TextVectors(mean[0].float().cpu().numpy(), log_std[0].float().cpu().numpy())


@torch.no_grad()
def decode_vectors(autoencoder: Autoencoder, tokenizer: Tokenizer, latents: np.ndarray) -> str:
    """The text of latents [P, l]: the most likely tokens, without the begin tokens.

    Raises:
        DataError: the latents are of another size, or the tokenizer has more entries than the
            autoencoder.
    """
    _check_vocabulary(autoencoder, tokenizer)
    size = autoencoder.config.latent_size
    if latents.ndim != 2 or latents.shape[1] != size:
        raise DataError(f"vectors {latents.shape}: the autoencoder's are [patches, {size}]")
    tokens: list[int] = []
    whole = torch.from_numpy(latents).to(autoencoder.output_weight)
    for part in whole.split(_PATCHES_AT_ONCE):
        logits = autoencoder.decode(part[None])[0, :, : tokenizer.vocab_size]
        tokens += logits.argmax(-1).tolist()
    return tokenizer.decode(tokens)


def _check_vocabulary(autoencoder: Autoencoder, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > autoencoder.config.vocab_size:
        raise DataError(
            f"tokenizer {tokenizer.path}: {tokenizer.vocab_size} entries, but the autoencoder has "
            f"{autoencoder.config.vocab_size}; give the tokenizer that it was trained with"
        )
