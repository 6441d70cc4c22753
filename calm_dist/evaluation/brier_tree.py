"""Brier-n of a model on one block, with sampled continuations by tree attention.

The collision term of Brier-n, P(a=b) = Σ_a P(a)², depends on text that two samples share, which is
not the block's own text. So the model has to run further steps after every start position. The
steps of all start positions run together, as branches after the block, in a few forward passes
that take the block itself from a cache of keys and values.

* `scores_from_patches`: CALM, from draws of patches. If n-grams are longer than a patch, the
  patches on which draws agree are continued.
* `scores_from_softmax`: models with probabilities. E[1{a=y}] is P(y) itself, and P(a=b) is
  estimated along sampled paths.

A forward pass has at most as many steps as the block (or `_STEPS_AT_ONCE`), which limits masks,
activations and logits to a few times those of the block itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from calm_dist.evaluation.brier import NGRAM, collision_rate, prefix_equal, prefix_groups

_STEPS_AT_ONCE = 512
"""Most steps in one forward pass of branches, unless the block has more."""


# Rows of weights that are converted to double precision at a time.
_ROWS_DRAWN = 64

_SMALLEST_PRODUCT = 1 / 64
"""A sampled path whose product c_1 · ... · c_n is smaller than this continues with a probability in
proportion to it."""


class StepFunction(Protocol):
    """A causal model over steps of tokens: ``[1, n·K]`` -> outputs ``[1, n, ...]``.

    A step is a token for a Transformer (outputs: next-token logits), and a patch for a CALM
    (outputs: hidden states). ``positions`` are RoPE positions ``[n]``. ``mask`` ``[n, held + n]``
    is True where the row may attend to the column, whose order is the steps in the ``cache``, then
    the new ones; None: causal. The new steps are added to the cache.
    """

    def __call__(
        self, tokens: Tensor, positions: Tensor, mask: Tensor | None, cache: Any
    ) -> Tensor: ...


class StepCache(Protocol):
    """Keys and values that a `StepFunction` has computed for one text."""

    def truncate(self, steps: int) -> None:
        """Forget all but the first ``steps``."""


class DrawFunction(Protocol):
    """Draws of next patches: hidden states ``[b, d]`` -> tokens ``[m, b, K]``, m >= 2.

    The m draws are independent of each other and of all other calls. ``starts`` ``[b]`` are the
    patches at which the n-grams begin, and ``depth``, at least 1, is the number of patches of the
    n-gram that the hidden state has already seen.
    """

    def __call__(self, hidden: Tensor, starts: Tensor, depth: int) -> Tensor: ...


class TokenLogits(Protocol):
    """Logits ``[b, V]`` of the next token of a step, from the outputs ``[b, ...]`` of the step
    before it and the tokens of the step that are known ``[b, k]``."""

    def __call__(self, outputs: Tensor, previous: Tensor) -> Tensor: ...


class SoftmaxScores(NamedTuple):
    """Scores of a model with probabilities on one block of tokens."""

    scores: Tensor
    """Unbiased Brier-1..4 of each start position, float64 ``[starts, 4]``."""
    nats: Tensor
    """Negative log-likelihood of tokens K..T-1 given the preceding tokens, ``[T-K]``."""


@dataclass(frozen=True)
class _Branches:
    """The b beginnings of n-grams on which draws agree, ordered by their start."""

    start: Tensor
    """Index of the n-gram's start position among all starts, ``[b]``."""
    patches: Tensor
    """The patches on which they agree, ``[b, depth, K]``."""
    weight: Tensor
    """Estimate of the probability that two samples agree on it, float64 ``[b]``."""


def patches_per_ngram(patch_size: int) -> int:
    """Number of patches that the longest n-gram touches if it begins at a patch."""
    return -(-NGRAM // patch_size)


@torch.no_grad()
def scores_from_patches(
    hidden: StepFunction,
    cache: StepCache,
    draw: DrawFunction,
    draws: Tensor,
    starts: Tensor,
    target: Tensor,
) -> Tensor:
    """Unbiased Brier-1..4 of a CALM at the given patches of one block.

    Sample a of an n-gram's accuracy term consists of the a-th draws of consecutive patches, each
    given the true ones before it. It equals the true n-gram with the model's probability.

    The collision term averages all pairs of the m draws of the first patch. A group of c draws
    that agree on a whole patch is a share c(c-1)/(m(m-1)) of the pairs; its patch replaces the
    true one, m fresh draws continue it, and so on until four tokens are covered. Patches of four
    or more tokens need no continuation. This is the released estimator, generalised from two to
    any number m of draws.

    Args:
        hidden: the model's hidden states.
        cache: holds at least the patches before the last start, and has `cache_size` slots.
        draw: continues a branch.
        draws: tokens ``[m >= 2, P, K]``; ``[:, p-1]`` are independent draws of patch p given the
            true patches before it.
        starts: patches at which the n-grams begin, ascending ``[S]``, each at least 1; ``draws``
            must cover all patches of their four tokens.
        target: the true n-grams, ``[S, 4]``.

    Returns:
        float64 ``[S, 4]``.
    """
    patch_size = draws.shape[-1]
    starts, target = starts.to(draws.device), target.to(draws.device)
    patches = starts[:, None] + torch.arange(patches_per_ngram(patch_size), device=draws.device)
    samples = draws[:, patches - 1].flatten(2)[..., :NGRAM]  # [m, S, 4]
    hits = prefix_equal(samples, target).mean(0)
    return 2 * hits - _patch_collisions(hidden, cache, draw, draws[:, starts - 1], starts)


def cache_size(num_steps: int, patch_size: int) -> int:
    """Number of cache slots needed to score a block of ``num_steps``."""
    return num_steps + (patches_per_ngram(patch_size) - 1) * _steps_at_once(num_steps)


def _patch_collisions(
    hidden: StepFunction, cache: StepCache, draw: DrawFunction, first: Tensor, starts: Tensor
) -> Tensor:
    """Unbiased estimates of P(a=b) for 1..4-grams, float64 ``[S, 4]``.

    ``first`` holds the draws ``[m, S, K]`` of the first patch of each start.
    """
    num_starts, patch_size = first.shape[1:]
    collision = torch.zeros(num_starts, NGRAM, dtype=torch.float64, device=first.device)
    branches = _Branches(
        torch.arange(num_starts, device=first.device),
        first.new_empty(num_starts, 0, patch_size),
        torch.ones(num_starts, dtype=torch.float64, device=first.device),
    )
    num_steps = int(starts.max())  # no branch sees more of the block
    draws = first
    for depth in range(patches_per_ngram(patch_size)):
        if depth > 0:
            branches = _agreed(branches, draws)
            if len(branches.start) == 0:
                break
            draws = torch.cat(
                [
                    draw(_branch_outputs(hidden, cache, num_steps, begin, patches), begin, depth)
                    for begin, patches in _portions(branches, starts, num_steps)
                ],
                dim=1,
            )
        known = depth * patch_size
        needed = draws[..., : NGRAM - known]
        rates = torch.stack([collision_rate(sizes) for _, sizes in prefix_groups(needed)], dim=-1)
        columns = slice(known, known + needed.shape[-1])
        collision[:, columns].index_add_(0, branches.start, branches.weight[:, None] * rates)
    return collision


def _agreed(branches: _Branches, draws: Tensor) -> _Branches:
    """Branches for the continuations ``[m, b, K]`` on which at least two of the m draws agree."""
    num_draws = draws.shape[0]
    *_, (group, sizes) = prefix_groups(draws)
    numbers = torch.arange(num_draws, device=draws.device).expand_as(group)
    member = torch.zeros_like(group).scatter_(1, group, numbers)  # any one draw of each group
    parent, found = (sizes > 1).nonzero(as_tuple=True)
    count = sizes[parent, found].double()
    patch = draws[member[parent, found], parent]
    return _Branches(
        branches.start[parent],
        torch.cat([branches.patches[parent], patch[:, None]], dim=1),
        branches.weight[parent] * count * (count - 1) / (num_draws * (num_draws - 1)),
    )


def _portions(
    branches: _Branches, starts: Tensor, num_steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield start patches ``[n]`` and known patches ``[n, depth, K]`` for each forward pass."""
    at_once = _steps_at_once(num_steps)
    yield from zip(
        starts[branches.start].split(at_once), branches.patches.split(at_once), strict=True
    )


def _steps_at_once(num_steps: int) -> int:
    """Most branches after a block of ``num_steps`` that may take a step together."""
    return max(num_steps, _STEPS_AT_ONCE)


def _branch_outputs(
    model: StepFunction, cache: StepCache, num_steps: int, starts: Tensor, branches: Tensor
) -> Tensor:
    """The model's outputs at the last step of each branch, ``[b, ...]``.

    Args:
        cache: holds the block; its first ``num_steps`` steps are kept.
        starts: the step of the block at which each branch begins, ``[b]``.
        branches: tokens of the branches' steps, ``[b, depth, K]``.
    """
    cache.truncate(num_steps)
    lineage: list[Tensor] = []
    own = torch.eye(len(starts), dtype=torch.bool, device=starts.device)
    for steps in branches.unbind(1):
        lineage.append(own)
        outputs = _next_step(model, cache, num_steps, starts, steps, lineage)
    return outputs


def _next_step(
    model: StepFunction,
    cache: StepCache,
    num_steps: int,
    starts: Tensor,
    steps: Tensor,
    lineage: list[Tensor],
) -> Tensor:
    """Outputs ``[b, ...]`` at one more step ``[b, K]`` of every branch.

    A branch with start s replaces the block's steps s, s+1, ...: it sees the block's steps before s
    and its own earlier steps. The cache holds ``num_steps`` of the block, then all branches level
    by level.

    Args:
        lineage: for each level, the last being the new one, which of the steps of that level belong
            to a branch: bool ``[b, steps of that level]``.
    """
    of_block = torch.arange(num_steps, device=starts.device) < starts[:, None]
    mask = torch.cat([of_block, *lineage], dim=1)
    return model(steps.reshape(1, -1), starts + len(lineage) - 1, mask, cache)[0]


def _of_a_transformer(outputs: Tensor, previous: Tensor) -> Tensor:
    return outputs


@torch.no_grad()
def scores_from_softmax(
    model: StepFunction,
    new_cache: Callable[[int, int], StepCache],
    tokens: Tensor,
    starts: Tensor,
    *,
    num_draws: int,
    seed: int,
    patch_size: int = 1,
    token_logits: TokenLogits = _of_a_transformer,
) -> SoftmaxScores:
    """Brier-1..4 at the given start positions of one block, for models with probabilities: the
    Transformer, and a CALM whose head predicts tokens.

    The accuracy term is exact: the product of the teacher-forced probabilities of the true tokens.
    The collision term P(a=b) = Σ_a P(a)² is exact for n=1. For n>1 it is a sum over V^n paths,
    estimated from ``num_draws`` paths that are drawn token by token: with
    c_j = Σ p(· | a_1..a_{j-1})², the next token is drawn from p² / c_j (the model at temperature
    1/2), and c_1 · ... · c_n is an unbiased estimate, since Π p_j² / c_j is the path's probability.
    Drawing from p itself and averaging P(a) has the same expectation and a larger variance. The
    paths go through the model together, as branches after the block.

    Most paths of a model that is unsure have products near zero. One below ``_SMALLEST_PRODUCT``
    continues with probability product / ``_SMALLEST_PRODUCT``, and then counts as
    ``_SMALLEST_PRODUCT``; otherwise its longer n-grams count as 0. The expectation is the same.

    Args:
        model: runs in steps of ``patch_size`` tokens.
        new_cache: called with a number of texts and of steps; returns an empty cache.
        tokens: one block, ``[T]``.
        starts: first tokens of the n-grams, ``[S]``, in 1..T-4, each at the beginning of a step
            other than the first.
        num_draws: sampled paths for each start position, at least 1.
        seed: seed of the sampled paths.
        patch_size: K.
        token_logits: logits of the tokens of a step, one after the other.
    """
    steps = tokens.reshape(-1, patch_size)
    cache = new_cache(1, cache_size(len(steps), patch_size))
    outputs = model(tokens[None], torch.arange(len(steps)), None, cache)[0]
    device = outputs.device
    steps, starts = steps.to(device), starts.to(device)
    # For tokens K..T-1, in order.
    log_likelihood = torch.stack(
        [
            _log_likelihood(token_logits(outputs[:-1], steps[1:, :k]).float(), steps[1:, k])
            for k in range(patch_size)
        ],
        dim=-1,
    ).flatten()
    offsets = torch.arange(NGRAM, device=device)
    accuracy = log_likelihood[starts[:, None] - patch_size + offsets].double().cumsum(-1).exp()

    generator = torch.Generator(device).manual_seed(seed)
    at_once = max(1, _steps_at_once(len(steps)) // num_draws)
    means = torch.cat(
        [
            _path_collisions(
                model,
                token_logits,
                cache,
                outputs,
                part,
                num_draws=num_draws,
                patch_size=patch_size,
                generator=generator,
            )
            for part in (starts // patch_size).split(at_once)
        ]
    )
    return SoftmaxScores(2 * accuracy - means, -log_likelihood)


def _path_collisions(
    model: StepFunction,
    token_logits: TokenLogits,
    cache: StepCache,
    block_outputs: Tensor,
    starts: Tensor,
    *,
    num_draws: int,
    patch_size: int,
    generator: torch.Generator,
) -> Tensor:
    """Unbiased estimates of P(a=b) for 1..4-grams, means over ``num_draws`` paths from each start,
    float64 ``[S, 4]``.

    ``starts`` ``[S]`` are steps; ``block_outputs`` are the outputs at the block's steps
    ``[P, ...]``.
    """
    num_steps = len(block_outputs)
    outputs = block_outputs[starts - 1]
    cache.truncate(num_steps)
    count = len(starts) * num_draws
    collision = torch.zeros(count, NGRAM, dtype=torch.float64, device=starts.device)
    # The paths that go on: their numbers, their rows of the outputs, which all paths of a start
    # share at first, and their products or what these count as.
    path = torch.arange(count, device=starts.device)
    row = path // num_draws
    product = torch.ones(count, dtype=torch.float64, device=starts.device)
    lineage: list[Tensor] = []
    step = starts.new_empty(len(starts), 0)
    for n in range(NGRAM):
        chances = token_logits(outputs, step).float().softmax(-1)
        # Products of rows need no tensor of squares.
        agreement = torch.bmm(chances[:, None], chances[:, :, None]).flatten()
        product = product * agreement.double()[row]
        collision[path, n] = product
        if n == NGRAM - 1:
            break
        chance = (product / _SMALLEST_PRODUCT).clamp(max=1)
        lives = _uniform(len(path), generator) < chance
        if not bool(lives.any()):
            break
        product, path, row = (product / chance)[lives], path[lives], row[lives]
        lineage = [level[lives] for level in lineage]
        outputs, step = outputs[row], step[row]
        step = torch.cat([step, draw_columns(chances[row].square(), generator)], dim=1)
        row = torch.arange(len(path), device=starts.device)
        if step.shape[1] == patch_size:
            lineage.append(torch.eye(len(path), dtype=torch.bool, device=starts.device))
            outputs = _next_step(model, cache, num_steps, starts[path // num_draws], step, lineage)
            step = step[:, :0]
    return collision.unflatten(0, (-1, num_draws)).mean(1)


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    """Random numbers in [0, 1), float64 ``[count]`` on the generator's device."""
    return torch.rand(count, dtype=torch.float64, generator=generator, device=generator.device)


def draw_columns(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one column of each row of ``weights`` ``[b, V]``, in proportion to weight; ``[b, 1]``.

    `torch.multinomial` draws a random number for every weight; this draws one for each row.
    """
    uniform = _uniform(len(weights), generator)[:, None]
    drawn = []
    for part, at in zip(weights.split(_ROWS_DRAWN), uniform.split(_ROWS_DRAWN), strict=True):
        bounds = part.double().cumsum(-1)
        # right=True skips bounds equal to the number, so a column of weight zero is never drawn.
        drawn.append(torch.searchsorted(bounds, at * bounds[:, -1:], right=True))
    return torch.cat(drawn).clamp_(max=weights.shape[-1] - 1)


def _log_likelihood(logits: Tensor, target: Tensor) -> Tensor:
    """Log probability of ``target`` ``[T]`` under ``logits`` ``[T, V]``."""
    return logits.gather(-1, target[:, None].long())[:, 0] - logits.logsumexp(-1)
