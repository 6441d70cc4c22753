"""BrierLM: a likelihood-free score for both CALM and the discrete Transformer.

For two independent samples a and b of a model and the true n-gram y,

    Brier-n = E[1{a=y} + 1{b=y} - 1{a=b}]            (CALM paper, arXiv 2510.27688, section 4)

which lies in -1..1 and needs only samples. Two n-grams are equal when all of their n tokens are.
BrierLM = 100 · (Π_{n=1..4} max(0, Brier-n))^¼.

This module computes scores from given samples, and the standard error over blocks.
`evaluation.brier_tree` and `evaluation.brier_softmax` draw the samples from the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

NGRAM = 4
"""The longest n-gram of BrierLM."""

Alignment = Literal["patch", "all"]
"""Which n-grams are scored: those at the beginnings of patches, or all."""

_RESAMPLED_BLOCKS_AT_ONCE = 1 << 22


def brier_scores(sample_a: Tensor, sample_b: Tensor, target: Tensor) -> Tensor:
    """Brier-1..n from two independent samples, averaged over positions, not clamped.

    Args:
        sample_a: tokens ``[..., n]``; ``[..., :j]`` is the j-gram of a position.
        sample_b: tokens of the same shape, drawn independently of ``sample_a``.
        target: the true tokens, of the same shape.

    Returns:
        float64 ``[n]``, each value in -1..1.

    Raises:
        ValueError: the shapes differ, or there is no position.
    """
    if not sample_a.shape == sample_b.shape == target.shape:
        raise ValueError(
            "sample_a, sample_b and target must have the same shape; got "
            f"{tuple(sample_a.shape)}, {tuple(sample_b.shape)}, {tuple(target.shape)}"
        )
    if target.dim() == 0 or target.numel() == 0:
        raise ValueError(f"no position to score: the shape is {tuple(target.shape)}")
    hits = prefix_equal(sample_a, target) + prefix_equal(sample_b, target)
    scores = hits - prefix_equal(sample_a, sample_b)
    return scores.reshape(-1, target.shape[-1]).mean(0)


def brierlm(scores: Sequence[float] | np.ndarray | Tensor) -> float:
    """BrierLM in 0..100 from the four Brier-n; negative values are clamped to 0.

    Raises:
        ValueError: there are not exactly four scores.
    """
    if isinstance(scores, Tensor):
        scores = scores.detach().cpu()
    values = np.asarray(scores, dtype=np.float64)
    if values.shape != (NGRAM,):
        raise ValueError(f"BrierLM needs the scores Brier-1..{NGRAM}; got shape {values.shape}")
    return float(_brierlm_rows(values))


def scores_from_draws(draws: Tensor, target: Tensor) -> Tensor:
    """Unbiased Brier-1..n of each position, averaged over all pairs of m independent draws.

    Args:
        draws: tokens ``[m, positions, n]`` with m >= 2, independent along the first dimension.
        target: the true tokens ``[positions, n]``.

    Returns:
        float64 ``[positions, n]``.
    """
    if draws.shape[0] < 2 or draws.shape[1:] != target.shape:
        raise ValueError(
            "draws must be [m >= 2, positions, n] for a target [positions, n]; got "
            f"{tuple(draws.shape)} and {tuple(target.shape)}"
        )
    rates = [collision_rate(sizes) for _, sizes in prefix_groups(draws)]
    return 2 * prefix_equal(draws, target).mean(0) - torch.stack(rates, dim=-1)


def prefix_equal(left: Tensor, right: Tensor) -> Tensor:
    """1.0 where the first j tokens are all equal, else 0.0; float64 ``[..., n]`` for j = 1..n."""
    return (left == right).cumprod(-1).double()


def prefix_groups(draws: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For j = 1..n, find which of the draws ``[m, positions, n]`` agree in their first j tokens.

    Equal j-grams are found by sorting, without a loop over pairs.

    Yields:
        The group of each draw, ``[positions, m]`` with values in 0..m-1, and the size of each
        group, ``[positions, m]``, zero for unused group numbers.
    """
    num_draws, num_positions, length = draws.shape
    tokens = draws.permute(1, 0, 2).long()
    base = int(tokens.max()) + 1
    group = torch.zeros_like(tokens[..., 0])
    for j in range(length):
        ordered, where = (group * base + tokens[..., j]).sort(dim=1)
        is_new = torch.zeros_like(ordered)
        is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        group = torch.empty_like(ordered).scatter_(1, where, is_new.cumsum(1))
        sizes = group.new_zeros(num_positions, num_draws)
        yield group, sizes.scatter_add_(1, group, torch.ones_like(group))


def collision_rate(sizes: Tensor) -> Tensor:
    """Share of the ordered pairs of different draws that agree, float64 ``[positions]``.

    Args:
        sizes: sizes of the groups of equal draws, ``[positions, m]``, from `prefix_groups`.
    """
    num_draws = sizes.shape[1]
    return (sizes * (sizes - 1)).sum(1).double() / (num_draws * (num_draws - 1))


def ngram_starts(num_tokens: int, patch_size: int, alignment: Alignment = "patch") -> Tensor:
    """Start positions of the scored n-grams of a block, ascending ``[S]``.

    The first patch is never predicted, so the first start is ``patch_size``; the last leaves room
    for four tokens. ``patch`` takes the beginnings of patches, ``all`` every position. To be
    compared, a CALM and a Transformer must be scored on the same starts.
    """
    stride = patch_size if alignment == "patch" else 1
    return torch.tensor(range(patch_size, num_tokens - NGRAM + 1, stride), dtype=torch.long)


@dataclass(frozen=True)
class BrierEstimate:
    """Brier-1..4 and BrierLM over a set of blocks, with standard errors."""

    brier: list[float]
    brier_stderr: list[float] | None
    brierlm: float
    brierlm_stderr: float | None
    undefined: str | None
    """Why a standard error is None."""


def estimate_brierlm(
    block_scores: np.ndarray, *, seed: int = 0, resamples: int = 2000
) -> BrierEstimate:
    """BrierLM over blocks, and standard errors by bootstrap over whole blocks.

    Positions of one block depend on each other, so blocks are resampled. If a Brier-n is not
    positive, BrierLM is clamped and its standard error is undefined (None), as are all standard
    errors with fewer than two blocks.

    Args:
        block_scores: mean Brier-1..4 of each block ``[blocks, 4]``; all blocks have the same number
            of positions.
        seed: seed of the resampling.
        resamples: number of bootstrap resamples.

    Raises:
        ValueError: there is no block, or the second dimension is not 4.
    """
    values = np.asarray(block_scores, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] == 0 or values.shape[1] != NGRAM:
        raise ValueError(f"block_scores must be [blocks >= 1, {NGRAM}]; got {values.shape}")
    brier = values.mean(0)
    score = float(_brierlm_rows(brier))
    if len(values) < 2:
        return BrierEstimate(
            brier.tolist(), None, score, None, "one block: a standard error needs at least two"
        )
    resampled = _resampled_means(values, seed, resamples)
    # Means of resampled blocks vary by (n - 1) / n of what means of n blocks do.
    correction = (len(values) / (len(values) - 1)) ** 0.5
    brier_stderr = (correction * resampled.std(0, ddof=1)).tolist()
    clamped = [f"Brier-{n + 1} = {value:.3g}" for n, value in enumerate(brier) if value <= 0]
    if clamped:
        reason = f"{', '.join(clamped)}: BrierLM is clamped at 0 there"
        return BrierEstimate(brier.tolist(), brier_stderr, score, None, reason)
    stderr = correction * float(_brierlm_rows(resampled).std(ddof=1))
    return BrierEstimate(brier.tolist(), brier_stderr, score, stderr, None)


def _brierlm_rows(scores: np.ndarray) -> np.ndarray:
    """BrierLM of each row of ``[..., 4]``."""
    return 100 * np.prod(np.maximum(scores, 0.0), axis=-1) ** (1 / NGRAM)


def _resampled_means(values: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Means ``[resamples, n]`` over blocks drawn with replacement from ``values`` [blocks, n]."""
    rng = np.random.default_rng(seed)
    blocks = len(values)
    at_once = max(1, _RESAMPLED_BLOCKS_AT_ONCE // blocks)
    means = []
    for done in range(0, resamples, at_once):
        rows = min(at_once, resamples - done)
        counts = rng.multinomial(blocks, np.full(blocks, 1 / blocks), size=rows)
        means.append(counts @ values / blocks)
    return np.concatenate(means)
