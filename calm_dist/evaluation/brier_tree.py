"""Brier-n of a model on one block, with sampled continuations by tree attention.

The collision term of Brier-n, P(a=b) = Σ_a P(a)², depends on text that two samples share, which is
not the block's own text. So the model has to run further steps after every start position. The
steps of all start positions run together, as branches after the block, in a few forward passes
that take the block itself from a cache of keys and values.

* `scores_from_patches`: CALM, from draws of patches. If n-grams are longer than a patch, the
  patches on which draws agree are continued.
* `brier_softmax.scores_from_softmax`: models with probabilities, along sampled paths.

A forward pass has at most as many steps as the block (or `_STEPS_AT_ONCE`), which limits masks,
activations and logits to a few times those of the block itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from calm_dist.evaluation.brier import NGRAM, collision_rate, prefix_equal, prefix_groups

_STEPS_AT_ONCE = 256
"""Most steps in one forward pass of branches, unless the block has more."""


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
    return num_steps + (patches_per_ngram(patch_size) - 1) * steps_at_once(num_steps)


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
    at_once = steps_at_once(num_steps)
    yield from zip(
        starts[branches.start].split(at_once), branches.patches.split(at_once), strict=True
    )


def steps_at_once(num_steps: int) -> int:
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
        outputs = next_step(model, cache, num_steps, starts, steps, lineage)
    return outputs


def next_step(
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
