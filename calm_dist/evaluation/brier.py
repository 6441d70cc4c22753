"""BrierLM: a likelihood-free score for CALM and the discrete Transformer alike.

For two independent samples a and b of a model and the true n-gram y,

    Brier-n = E[1{a=y} + 1{b=y} - 1{a=b}]            (CALM paper, arXiv 2510.27688, section 4)

which is at most 1, at least -1, and needs samples only. An n-gram counts as equal when all of its
n tokens are. BrierLM = 100 · (Π_{n=1..4} max(0, Brier-n))^¼.

The expectation is taken in one of two ways, with the same value:

* `scores_from_draws`: from samples of any model, all pairs of m draws averaged.
* `scores_from_softmax`: from a model with a softmax. E[1{a=y}] is P(y) itself, and
  E[1{a=b}] = Σ_a P(a)² is estimated along sampled paths.

Both score the same n-grams, those that begin at a patch boundary, so their results compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

NGRAM = 4
"""The longest n-gram of BrierLM."""

_LOGITS_PER_FORWARD = 1 << 26
"""Elements of the logits that one forward may make (256 MiB in fp32)."""

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
            "sample_a, sample_b and target must have one shape; got "
            f"{tuple(sample_a.shape)}, {tuple(sample_b.shape)}, {tuple(target.shape)}"
        )
    if target.numel() == 0:
        raise ValueError(f"no position to score: the shape is {tuple(target.shape)}")
    hits = _prefix_equal(sample_a, target) + _prefix_equal(sample_b, target)
    scores = hits - _prefix_equal(sample_a, sample_b)
    return scores.reshape(-1, target.shape[-1]).mean(0)


def brierlm(scores: Sequence[float] | np.ndarray | Tensor) -> float:
    """BrierLM in 0..100 from the four Brier-n; each is raised to at least 0 before the product.

    Raises:
        ValueError: there are not exactly four scores.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.shape != (NGRAM,):
        raise ValueError(f"BrierLM needs the scores Brier-1..{NGRAM}; got shape {values.shape}")
    return float(_brierlm_rows(values))


def scores_from_draws(draws: Tensor, target: Tensor) -> Tensor:
    """Unbiased Brier-1..n of each position, all pairs of m independent draws averaged.

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
    hits = _prefix_equal(draws, target.expand_as(draws)).mean(0)
    return 2 * hits - _collision_rates(draws)


def _prefix_equal(left: Tensor, right: Tensor) -> Tensor:
    """1.0 where the first j tokens are all equal, ``[..., n]`` over j = 1..n."""
    return (left == right).cumprod(-1).double()


def _collision_rates(draws: Tensor) -> Tensor:
    """Share of the pairs of draws whose first j tokens agree: ``[m, positions, n]`` -> float64.

    Equal j-grams get equal numbers by sorting, and m(m-1) · rate is the sum of count² - count: no
    loop over the pairs.
    """
    num_draws, num_positions, length = draws.shape
    tokens = draws.permute(1, 0, 2).long()
    base = int(tokens.max()) + 1
    prefix = torch.zeros_like(tokens[..., 0])  # [positions, m], the number of the (j-1)-gram
    rates = []
    for j in range(length):
        ordered, where = (prefix * base + tokens[..., j]).sort(dim=1)
        is_new = torch.zeros_like(ordered)
        is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        prefix = torch.empty_like(ordered).scatter_(1, where, is_new.cumsum(1))
        counts = prefix.new_zeros(num_positions, num_draws)
        counts.scatter_add_(1, prefix, torch.ones_like(prefix))
        pairs = (counts * (counts - 1)).sum(1)
        rates.append(pairs.double() / (num_draws * (num_draws - 1)))
    return torch.stack(rates, dim=-1)


class LogitsFunction(Protocol):
    """A causal Transformer: tokens ``[B, T]`` -> next-token logits ``[B, T, V]``.

    ``positions`` are RoPE positions ``[T]`` (0, 1, ... if None), and ``mask`` ``[T, T]`` is True
    where the row may attend to the column (causal if None).
    """

    def __call__(
        self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor: ...


class SoftmaxScores(NamedTuple):
    """What one block of tokens says about a Transformer."""

    scores: Tensor
    """Unbiased Brier-1..4 of each start position, float64 ``[starts, 4]``."""
    nats: Tensor
    """Negative log-likelihood of the tokens 1..T-1 given those before them, ``[T-1]``."""


def aligned_starts(num_tokens: int, stride: int) -> Tensor:
    """Where scored n-grams begin: ``stride, 2·stride, ...``, as long as four tokens follow.

    With ``stride`` = K these are the beginnings of all patches but the first, which CALM never
    predicts.
    """
    return torch.tensor(range(stride, num_tokens - NGRAM + 1, stride), dtype=torch.long)


@torch.no_grad()
def scores_from_softmax(
    logits: LogitsFunction, tokens: Tensor, starts: Tensor, *, num_draws: int, seed: int
) -> SoftmaxScores:
    """Brier-1..4 of a Transformer at the given start positions of one block.

    The accuracy term is exact: the product of the teacher-forced probabilities of the true tokens.
    The collision term P(a=b) = Σ_a P(a)² is exact for n=1. For n>1 it is a sum over V^n paths, of
    which ``num_draws`` are drawn, token by token: with c_j = Σ p(· | a_1..a_{j-1})², the next
    token comes from p² / c_j (the model at temperature 1/2), and c_1 · ... · c_n is an unbiased
    estimate, since Π p_j² / c_j is the path's probability. Drawing from p itself and averaging
    P(a) has the same expectation and a larger variance. The paths of all start positions go
    through the model together, as branches behind the block (tree attention): three forwards for
    each set of draws.

    Args:
        logits: the model.
        tokens: one block, ``[T]``.
        starts: first tokens of the n-grams, ``[S]``, each in 1..T-4.
        num_draws: sampled paths for each start position, at least 1.
        seed: of the sampled paths.
    """
    block_logits = logits(tokens[None])[0].float()
    device = block_logits.device
    tokens, starts = tokens.to(device), starts.to(device)
    log_likelihood = _log_likelihood(block_logits[:-1], tokens[1:])  # of tokens 1..T-1
    offsets = torch.arange(NGRAM, device=device)
    accuracy = log_likelihood[starts[:, None] - 1 + offsets].double().cumsum(-1).exp()

    generator = torch.Generator(device).manual_seed(seed)
    first = block_logits[starts - 1]
    collision = torch.zeros_like(accuracy)
    per_forward = (tokens.numel() + (NGRAM - 1) * starts.numel()) * block_logits.shape[-1]
    rows_at_once = max(1, _LOGITS_PER_FORWARD // per_forward)
    for done in range(0, num_draws, rows_at_once):
        rows = min(rows_at_once, num_draws - done)
        collision += _path_collisions(logits, tokens, starts, first, rows, generator).sum(0)
    return SoftmaxScores(2 * accuracy - collision / num_draws, -log_likelihood)


def _path_collisions(
    logits: LogitsFunction,
    tokens: Tensor,
    starts: Tensor,
    first: Tensor,
    rows: int,
    generator: torch.Generator,
) -> Tensor:
    """Unbiased estimates of P(a=b) for 1..4-grams, float64 ``[rows, S, 4]``, rows independent.

    ``first`` holds the logits ``[S, V]`` of the first token of each start position.
    """
    num_starts = starts.numel()
    extended = tokens.expand(rows, -1)
    next_logits = first.expand(rows, -1, -1)
    estimate = torch.ones(rows, num_starts, dtype=torch.float64, device=starts.device)
    estimates = []
    for depth in range(NGRAM):
        if depth > 0:
            sharpened = (2 * next_logits).softmax(-1).flatten(0, 1)
            drawn = torch.multinomial(sharpened, 1, generator=generator).view(rows, num_starts)
            extended = torch.cat([extended, drawn], dim=1)
            positions, mask = branch_layout(tokens.numel(), starts, depth)
            next_logits = logits(extended, positions, mask)[:, -num_starts:].float()
        estimate = estimate * next_logits.softmax(-1).square().sum(-1).double()
        estimates.append(estimate)
    return torch.stack(estimates, dim=-1)


def branch_layout(num_tokens: int, starts: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """RoPE positions and attention mask of a block followed by branches.

    The sequence is the block (``num_tokens``), then the first token of every branch, then the
    second of every branch, ..., ``depth`` in all. A branch with start s replaces the tokens s,
    s+1, ... of the block: it sees the block's tokens before s and its own earlier tokens.

    Returns:
        positions ``[L]`` and mask ``[L, L]`` (True: may attend), L = num_tokens + depth · S.
    """
    device = starts.device
    num_starts = starts.numel()
    block = torch.arange(num_tokens, device=device)
    levels = torch.arange(depth, device=device)
    positions = torch.cat([block, (starts + levels[:, None]).reshape(-1)])

    block_sees = torch.cat(
        [
            block[:, None] >= block,
            block.new_zeros(num_tokens, depth * num_starts, dtype=torch.bool),
        ],
        dim=1,
    )
    prefix = (block < starts[:, None]).repeat(depth, 1)
    ancestors = torch.kron(
        (levels[:, None] >= levels).int(), torch.eye(num_starts, dtype=torch.int, device=device)
    ).bool()
    return positions, torch.cat([block_sees, torch.cat([prefix, ancestors], dim=1)])


def _log_likelihood(logits: Tensor, target: Tensor) -> Tensor:
    """Log probability of ``target`` ``[T]`` under ``logits`` ``[T, V]``."""
    return logits.gather(-1, target[:, None].long())[:, 0] - logits.logsumexp(-1)


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
    """BrierLM over blocks, and standard errors by bootstrap: whole blocks are drawn again.

    Positions of one block depend on each other, so the block is the unit. Where a Brier-n is not
    positive, BrierLM sits on its clamp and its standard error is undefined (None), as are all
    standard errors with fewer than two blocks.

    Args:
        block_scores: mean Brier-1..4 of each block ``[blocks, 4]``; blocks have equally many
            positions.
        seed: of the resampling.
        resamples: bootstrap resamples.

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
    brier_stderr = resampled.std(0, ddof=1).tolist()
    clamped = [f"Brier-{n + 1} = {value:.3g}" for n, value in enumerate(brier) if value <= 0]
    if clamped:
        reason = f"{', '.join(clamped)}: BrierLM is clamped at 0 there"
        return BrierEstimate(brier.tolist(), brier_stderr, score, None, reason)
    stderr = float(_brierlm_rows(resampled).std(ddof=1))
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
