"""Scores of a model on one held-out block of tokens: Brier-1..4 and the training losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from calm_dist.evaluation.brier import NGRAM, prefix_groups
from calm_dist.evaluation.brier_softmax import draw_tokens, scores_from_softmax
from calm_dist.evaluation.brier_tree import (
    DrawFunction,
    cache_size,
    patches_per_ngram,
    scores_from_patches,
)
from calm_dist.inference.generate import calm_recipe, decode_latents
from calm_dist.losses.energy import energy_score

if TYPE_CHECKING:
    from calm_dist.inference.loading import LoadedModel

Block = Mapping[str, np.ndarray]
"""A sample of a data store."""

_SAMPLED_AT_ONCE = 1 << 24
"""Elements of noise and hidden states that one call of a head may hold (64 MiB in fp32)."""

_RECONSTRUCTED_PATCHES = 64
"""Patches of a block, evenly spaced, whose reconstruction is measured. All of them would take
longer than the scores: each is decoded twice, to all of its tokens."""


@dataclass(frozen=True)
class BlockScores:
    """The scores of one block."""

    brier: Tensor
    """Unbiased Brier-1..4 of each n-gram start, float64 ``[S, 4]``."""
    means: dict[str, float]
    """Other measures, averaged over the block's tokens or patches."""
    brier_of_samples: Tensor | None = None
    """The same scores from draws alone, for a CALM with known probabilities."""
    released: Tensor | None = None
    """Brier-1..4 as the released code estimates them, from two draws of each patch: of each of its
    n-gram starts, float64 ``[S', 4]``."""


def score_softmax_block(
    model: LoadedModel, block: Block, starts: Tensor, samples: int, seed: int
) -> BlockScores:
    """Brier scores at ``starts`` [S] of a model with probabilities, and cross entropy.

    Each start uses ``samples`` sampled paths. A CALM is also scored from as many draws of each
    patch, like a CALM that draws latents. See `score_latent_block` for starts between patches.
    """
    patch_size = model.recipe.model.patch_size
    tokens = _tokens(block)
    generator = torch.Generator(model.device).manual_seed(seed)
    brier = torch.empty(len(starts), NGRAM, dtype=torch.float64)
    of_samples = torch.empty_like(brier) if model.kind == "calm" else None
    nats = torch.empty(0)
    for offset, at_offset in _cuts(starts, patch_size):
        # The padding of a last patch that the block cuts is in no n-gram.
        shifted = F.pad(tokens[offset:], (0, (offset - len(tokens)) % patch_size))
        result = scores_from_softmax(
            model.outputs, model.new_cache, shifted, starts[at_offset] - offset,
            num_draws=samples, seed=seed, patch_size=patch_size, token_logits=model.token_logits,
        )  # fmt: skip
        brier[at_offset] = result.scores.cpu()
        if offset == 0:
            nats = result.nats
        if of_samples is not None:

            def draw(hidden: Tensor, starts: Tensor, depth: int) -> Tensor:
                return draw_patches(model, hidden, samples, generator)

            context = _Context(model, shifted, starts[at_offset] // patch_size)
            of_samples[at_offset] = context.scores(draw, draw(context.hidden, context.patches, 0))
    return BlockScores(brier, {"cross_entropy": float(nats.double().mean())}, of_samples)


def score_latent_block(
    model: LoadedModel,
    block: Block,
    starts: Tensor,
    samples: int,
    seed: int,
    *,
    released: bool = False,
) -> BlockScores:
    """Brier scores at ``starts`` [S] from ``samples`` draws of each patch, and held-out losses.

    To score starts between patches, the block is cut into patches again from each offset 0..K-1.
    Posteriors belong to offset 0, so the losses are measured only there.

    Args:
        starts: first tokens of the n-grams, ascending; at least one is a multiple of K.
        released: also estimate as the released code does, from the first two draws.
    """
    patch_size = calm_recipe(model).patch_size
    tokens = _tokens(block)
    generator = torch.Generator().manual_seed(seed)

    def draw(hidden: Tensor, starts: Tensor, depth: int) -> Tensor:
        return decode_draws(model, draw_latents(model, hidden, samples, generator))

    def draw_two(hidden: Tensor, starts: Tensor, depth: int) -> Tensor:
        return decode_draws(model, draw_latents(model, hidden, 2, generator))

    brier = torch.empty(len(starts), NGRAM, dtype=torch.float64)
    means, of_two = {}, None
    for offset, at_offset in _cuts(starts, patch_size):
        context = _Context(model, tokens[offset:], starts[at_offset] // patch_size)
        latents = draw_latents(model, context.hidden, samples, generator)
        draws = decode_draws(model, latents, context.following)
        if offset == 0:
            means = _held_out_losses(model, block, latents, generator, seed)
        if offset == 0 and released:
            of_two = context.scores(draw_two, draws[:2])
            if patch_size < NGRAM:
                # The released code leaves out the last start, though its four tokens are known.
                of_two = of_two[:-1]
        brier[at_offset] = context.scores(draw, draws)
    return BlockScores(brier, means, released=of_two)


def _cuts(starts: Tensor, patch_size: int) -> Iterator[tuple[int, Tensor]]:
    """Yield each offset of the cut into patches, and which of the starts then begin a patch."""
    for offset in (starts % patch_size).unique().tolist():
        yield offset, starts % patch_size == offset


class _Context:
    """The context of a CALM before the patches of a block at which n-grams begin.

    Attributes:
        hidden: [known, d]; patch p is predicted from p - 1.
        following: the tokens of the patch after each [known, K], -1 beyond the block.
        patches: the patches at which n-grams begin, ascending [S].
    """

    def __init__(self, model: LoadedModel, tokens: Tensor, patches: Tensor) -> None:
        patch_size = calm_recipe(model).patch_size
        known = int(patches[-1]) + patches_per_ngram(patch_size) - 1
        self.patches = patches
        self._model = model
        self._cache = model.new_cache(1, cache_size(known, patch_size))
        context = tokens[: known * patch_size]
        self.hidden = model.hidden(context[None], torch.arange(known), None, self._cache)[0]
        # An n-gram may end before its last patch, which the block then cuts.
        after = tokens[patch_size : (known + 1) * patch_size]
        padded = F.pad(after, (0, known * patch_size - len(after)), value=-1)
        self.following = padded.view(known, -1).to(model.device)
        self._target = tokens[patch_size * patches[:, None] + torch.arange(NGRAM)]

    def scores(self, draw: DrawFunction, draws: Tensor) -> Tensor:
        """Unbiased Brier-1..4 [S, 4], on the CPU, from draws [N, known, K] of the patches after
        the known ones."""
        scores = scores_from_patches(
            self._model.hidden, self._cache, draw, draws, self.patches, self._target
        )
        return scores.cpu()


def draw_patches(
    model: LoadedModel, hidden: Tensor, samples: int, generator: torch.Generator
) -> Tensor:
    """Draw tokens ``[N, S, K]`` of the patches after hidden states ``[S, d]`` with a head that
    predicts tokens; N = ``samples``."""
    at_once = max(1, _SAMPLED_AT_ONCE // (samples * (model.recipe.model.vocab_size or 1)))
    drawn = []
    for part in hidden.split(at_once):
        same = part.repeat(samples, 1)
        tokens = torch.empty(len(same), 0, dtype=torch.long, device=hidden.device)
        for _ in range(calm_recipe(model).patch_size):
            drawn_now = draw_tokens(model.token_logits(same, tokens), generator)
            tokens = torch.cat([tokens, drawn_now], dim=1)
        drawn.append(tokens.unflatten(0, (samples, -1)))
    return torch.cat(drawn, dim=1)


def draw_latents(
    model: LoadedModel, hidden: Tensor, samples: int, generator: torch.Generator
) -> Tensor:
    """Latents ``[N, S, l]`` of hidden states ``[S, d]``, N = ``samples`` for each.

    The noise is drawn chunk by chunk, since the diffusion head needs the noise of all its steps at
    once.
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


def decode_draws(model: LoadedModel, latents: Tensor, target: Tensor | None = None) -> Tensor:
    """The tokens ``[N, S, K]`` of draws of latents ``[N, S, l]`` that Brier scores depend on.

    A token counts only if it is in the n-gram that begins with its patch, and those before it equal
    the ``target``'s ``[S, K]`` or another draw's. In place of the others, whose logits are not
    computed, stands V plus the number of the draw, which equals nothing.
    """
    decoder, count = model.decoder, len(latents)
    patches = decoder.patch_hidden(latents.flatten(0, 1))
    numbers = torch.arange(count, device=latents.device)[:, None, None]
    absent = (model.recipe.model.vocab_size or 0) + numbers
    tokens = absent.repeat(1, latents.shape[1], decoder.patch_size)
    counts = torch.ones(tokens.shape[:2], dtype=torch.bool, device=latents.device)
    for place in range(min(decoder.patch_size, NGRAM)):
        rows = counts.flatten().nonzero()[:, 0]
        if len(rows) == 0:
            break
        states = decoder.token_hidden(patches[rows], place)
        tokens.flatten(0, 1)[rows, place] = decoder.tokens(states)
        *_, (group, sizes) = prefix_groups(tokens[..., : place + 1])
        counts &= (sizes.gather(1, group) > 1).T | _begins(tokens, target, place + 1)
    return tokens


def _begins(tokens: Tensor, target: Tensor | None, length: int) -> Tensor:
    """Whether draws ``[N, S, K]`` begin as the target ``[S, K]`` does; bool ``[N, S]``."""
    if target is None:
        return torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return (tokens[..., :length] == target[:, :length]).all(-1)


def _held_out_losses(
    model: LoadedModel, block: Block, latents: Tensor, generator: torch.Generator, seed: int
) -> dict[str, float]:
    """Energy loss of all patches but the first, from draws ``[N, P-1, l]``, and the share of tokens
    reconstructed in at most ``_RECONSTRUCTED_PATCHES`` of the P patches.

    The energy score is proper for samples of any head, and unbiased for two or more samples.
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
    rebuilt_from = torch.arange(0, len(mean), -(-len(mean) // _RECONSTRUCTED_PATCHES))
    mean, log_std = (part[rebuilt_from.to(part.device)] for part in (mean, log_std))
    posterior_noise = torch.randn(mean.shape, generator=generator).to(mean)
    rebuilt = decode_latents(model, mean + posterior_noise * log_std.exp())
    patches = tokens.reshape(-1, recipe.patch_size)[rebuilt_from]
    return {
        "energy_loss": -float(score.double().mean()),
        "reconstruction_accuracy": _share_equal(rebuilt, patches),
        "reconstruction_accuracy_mean": _share_equal(decode_latents(model, mean), patches),
    }


def _posterior(model: LoadedModel, block: Block, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log_std ``[P, l]``: stored, or encoded now if the store has only tokens."""
    if "mean" in block:
        stored = [torch.from_numpy(block[name].astype(np.float32)) for name in ("mean", "log_std")]
        return stored[0], stored[1]
    assert model.autoencoder is not None
    mean, log_std = model.autoencoder.encode(tokens[None].to(model.device))
    return mean[0], log_std[0]


def _share_equal(left: Tensor, right: Tensor) -> float:
    return float((left == right.to(left.device)).double().mean())
