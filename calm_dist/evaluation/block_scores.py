"""What one held-out block of tokens says about a model: Brier-1..4 and the training losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from calm_dist.evaluation.brier import NGRAM
from calm_dist.evaluation.brier_tree import (
    cache_size,
    patches_per_ngram,
    scores_from_patches,
    scores_from_softmax,
)
from calm_dist.inference.generate import calm_recipe, decode_latents
from calm_dist.losses.energy import energy_score

if TYPE_CHECKING:
    from calm_dist.inference.load import LoadedModel

Block = Mapping[str, np.ndarray]
"""A sample of a data store."""

_SAMPLED_AT_ONCE = 1 << 24
"""Elements of noise and hidden states that one call of a head may hold (64 MiB in fp32)."""


@dataclass(frozen=True)
class BlockScores:
    """The scores of one block."""

    brier: Tensor
    """Unbiased Brier-1..4 of each n-gram start, float64 ``[S, 4]``."""
    means: dict[str, float]
    """Further measures, averaged over the block's tokens or patches."""


def score_transformer_block(
    model: LoadedModel, block: Block, starts: Tensor, samples: int, seed: int
) -> BlockScores:
    """Brier scores at ``starts`` [S], with ``samples`` sampled paths each, and cross entropy."""
    tokens = _tokens(block)
    result = scores_from_softmax(
        model.logits, model.new_cache, tokens, starts, num_draws=samples, seed=seed
    )
    return BlockScores(result.scores, {"cross_entropy": float(result.nats.double().mean())})


def score_calm_block(
    model: LoadedModel, block: Block, starts: Tensor, samples: int, seed: int
) -> BlockScores:
    """Brier scores at ``starts`` [S] from ``samples`` draws of each patch, and held-out losses.

    Starts between patches are scored by cutting the block into patches anew: from each offset
    0..K-1 the model sees whole patches from there on. Posteriors belong to the offset 0, so that
    the losses are measured there alone.

    Args:
        starts: where n-grams begin, in tokens, ascending; a multiple of K is among them.
    """
    patch_size = calm_recipe(model).patch_size
    tokens = _tokens(block)
    generator = torch.Generator().manual_seed(seed)

    def draw(hidden: Tensor, starts: Tensor, depth: int) -> Tensor:
        return _decode(model, draw_latents(model, hidden, samples, generator))

    brier = torch.empty(len(starts), NGRAM, dtype=torch.float64)
    means = {}
    for offset in (starts % patch_size).unique().tolist():
        shifted = tokens[offset:]
        at_offset = starts % patch_size == offset
        patches = starts[at_offset] // patch_size
        known = int(patches[-1]) + patches_per_ngram(patch_size) - 1
        context = shifted[: known * patch_size]
        cache = model.new_cache(1, cache_size(known, patch_size))
        # [known, d], patch p is predicted from p - 1
        hidden = model.hidden(context[None], torch.arange(known), None, cache)[0]
        latents = draw_latents(model, hidden, samples, generator)
        if offset == 0:
            means = _held_out_losses(model, block, latents, generator, seed)
        target = shifted[patch_size * patches[:, None] + torch.arange(NGRAM)]
        draws = _decode(model, latents)
        scores = scores_from_patches(model.hidden, cache, draw, draws, patches, target)
        brier[at_offset] = scores.cpu()
    return BlockScores(brier, means)


def draw_latents(
    model: LoadedModel, hidden: Tensor, samples: int, generator: torch.Generator
) -> Tensor:
    """Latents ``[N, S, l]`` of hidden states ``[S, d]``, N = ``samples`` for each.

    The noise is drawn chunk by chunk: the diffusion head takes that of all its steps at once.
    """
    head = model.head
    noise_of_one = head.draw_noise(torch.Generator(), 1, 1).numel()
    at_once = max(1, _SAMPLED_AT_ONCE // (samples * (noise_of_one + hidden.shape[-1])))
    latents = [
        head.sample(part, head.draw_noise(generator, samples, len(part)).to(part))
        for part in hidden.split(at_once)
    ]
    return torch.cat(latents, dim=1)


def _tokens(block: Block) -> Tensor:
    return torch.from_numpy(block["tokens"].astype(np.int64))


def _decode(model: LoadedModel, latents: Tensor) -> Tensor:
    """The most likely tokens ``[N, S, K]`` of latents ``[N, S, l]``."""
    return decode_latents(model, latents.flatten(0, 1)).reshape(*latents.shape[:2], -1)


def _held_out_losses(
    model: LoadedModel, block: Block, latents: Tensor, generator: torch.Generator, seed: int
) -> dict[str, float]:
    """Energy loss of all patches but the first, from draws ``[N, P-1, l]``, and reconstruction.

    The energy score is proper for samples of any head, and unbiased for two of them or more.
    """
    recipe = calm_recipe(model)
    tokens = _tokens(block)
    mean, log_std = (part.to(latents.device) for part in _posterior(model, block, tokens))
    score = energy_score(
        latents[: max(2, recipe.head.num_samples)],
        mean[1:],
        log_std[1:],
        beta=recipe.head.beta,
        num_draws=recipe.head.posterior_samples,
        seed=seed,
    )
    posterior_noise = torch.randn(mean.shape, generator=generator).to(mean)
    rebuilt = decode_latents(model, mean + posterior_noise * log_std.exp())
    patches = tokens.reshape(-1, recipe.patch_size)
    return {
        "energy_loss": -float(score.double().mean()),
        "reconstruction_accuracy": _share_equal(rebuilt, patches),
        "reconstruction_accuracy_mean": _share_equal(decode_latents(model, mean), patches),
    }


def _posterior(model: LoadedModel, block: Block, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log_std ``[P, l]``: as stored, or encoded now where the store has tokens only."""
    if "mean" in block:
        stored = [torch.from_numpy(block[name].astype(np.float32)) for name in ("mean", "log_std")]
        return stored[0], stored[1]
    assert model.autoencoder is not None
    mean, log_std = model.autoencoder.encode(tokens[None].to(model.device))
    return mean[0], log_std[0]


def _share_equal(left: Tensor, right: Tensor) -> float:
    return float((left == right.to(left.device)).double().mean())
