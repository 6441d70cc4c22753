"""Brier-1..4 of models with probabilities on one block: the Transformer, and a CALM whose head
predicts tokens.

E[1{a=y}] is P(y) itself, and P(a=b) is estimated along sampled paths, which run as branches after
the block (`evaluation.brier_tree`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from calm_dist.evaluation.brier import NGRAM
from calm_dist.evaluation.brier_tree import (
    StepCache,
    StepFunction,
    cache_size,
    next_step,
    steps_at_once,
)
from calm_dist.inference.softmax import draw_from_softmax

_ELEMENTS_IN_CACHE, _ELEMENTS_AT_ONCE = 1 << 19, 1 << 26
"""Logits that are worked on at a time, on CPUs and on other devices."""

_LEAST = -40.0
"""Logits so far below the largest are raised to this: all words together then weigh less than the
rounding of the sum. MKL's exponential takes 10 times as long where its result is not a normal
number."""

_SMALLEST_PRODUCT = 1 / 8
"""A sampled path whose product c_1 · ... · c_n is smaller than this continues with a probability in
proportion to it. Large, since a pass for one path costs nearly as much as one for many, and the
paths' noise is small beside that of a block's text."""


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
class _Paths:
    """Sampled beginnings of n-grams that go on.

    Attributes:
        number: which of all paths, ``[b]``; those of a start follow one another.
        product: c_1 · ... · c_n, or what it counts as, float64 ``[b]``.
        step: the known tokens of the current step ``[b, k]``.
        outputs: the outputs of the step before it ``[b, ...]``; None if ``step`` is whole.
    """

    number: Tensor
    product: Tensor
    step: Tensor
    outputs: Tensor | None

    def split(self, size: int) -> Iterator[_Paths]:
        for first in range(0, len(self.number), size):
            part = slice(first, first + size)
            outputs = None if self.outputs is None else self.outputs[part]
            yield _Paths(self.number[part], self.product[part], self.step[part], outputs)


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
    generator = torch.Generator(device).manual_seed(seed)
    collision = torch.zeros(len(starts) * num_draws, NGRAM, dtype=torch.float64, device=device)

    nats = torch.empty(len(steps) - 1, patch_size, device=device)
    logits = token_logits(outputs[:-1], steps[1:, :0])
    normalizers, agreement = _measured(logits)
    nats[:, 0] = normalizers - _at(logits, steps[1:, 0])
    before = starts // patch_size - 1
    # The paths of a start share their first distribution.
    number = torch.arange(len(collision), device=device)
    product = agreement[before].double().repeat_interleave(num_draws)
    collision[:, 0] = product
    lives, product = _survivors(product, generator)
    rows = before[number[lives] // num_draws]
    first = _drawn(logits, rows, generator)
    paths = _Paths(number[lives], product, first, outputs[rows] if patch_size > 1 else None)
    for k in range(1, patch_size):
        logits = token_logits(outputs[:-1], steps[1:, :k])
        nats[:, k] = _measured(logits)[0] - _at(logits, steps[1:, k])
    # Logits of the block are as large as those of all paths of a pass, and no longer needed.
    del logits, outputs
    for part in paths.split(steps_at_once(len(steps))):
        cache.truncate(len(steps))
        _follow(
            model,
            token_logits,
            cache,
            part,
            collision,
            begin=(starts // patch_size).repeat_interleave(num_draws),
            num_steps=len(steps),
            patch_size=patch_size,
            generator=generator,
        )
    offsets = torch.arange(NGRAM, device=device)
    likelihood = -nats.flatten()[starts[:, None] - patch_size + offsets].double()
    means = collision.unflatten(0, (-1, num_draws)).mean(1)
    return SoftmaxScores(2 * likelihood.cumsum(-1).exp() - means, nats.flatten())


def _follow(
    model: StepFunction,
    token_logits: TokenLogits,
    cache: StepCache,
    paths: _Paths,
    collision: Tensor,
    *,
    begin: Tensor,
    num_steps: int,
    patch_size: int,
    generator: torch.Generator,
) -> None:
    """Continue paths after their first token, and write the products of their longer n-grams to
    ``collision`` ``[all paths, 4]``.

    ``begin`` ``[all paths]`` are the steps at which they begin; the block has ``num_steps``.
    """
    number, product, step, outputs = paths.number, paths.product, paths.step, paths.outputs
    lineage: list[Tensor] = []
    for n in range(1, NGRAM):
        if step.shape[1] == patch_size:
            lineage.append(torch.eye(len(number), dtype=torch.bool, device=number.device))
            outputs = next_step(model, cache, num_steps, begin[number], step, lineage)
            step = step[:, :0]
        assert outputs is not None
        logits = token_logits(outputs, step)
        product = product * _measured(logits)[1].double()
        collision[number, n] = product
        if n == NGRAM - 1:
            return
        lives, product = _survivors(product, generator)
        if len(lives) == 0:
            return
        step = torch.cat([step[lives], _drawn(logits, lives, generator)], dim=1)
        number, lineage = number[lives], [level[lives] for level in lineage]
        outputs = outputs[lives] if step.shape[1] < patch_size else None
        del logits  # before those of the next step are made


def _survivors(product: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of the paths that continue ``[s]``, and the weighted products of those ``[s]``."""
    chance = (product / _SMALLEST_PRODUCT).clamp(max=1)
    lives = (_uniform(len(product), generator) < chance).nonzero()[:, 0]
    return lives, (product / chance)[lives]


def _rows_at_once(logits: Tensor) -> int:
    on_cpu = logits.device.type == "cpu"
    return max(1, (_ELEMENTS_IN_CACHE if on_cpu else _ELEMENTS_AT_ONCE) // logits.shape[-1])


def _measured(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of logits ``[b, V]``: the logarithm of the sum of exponentials, and Σ p²; fp32
    ``[b]``. The probabilities of a few rows exist at a time."""
    normalizers, agreement = [], []
    for part in logits.split(_rows_at_once(logits)):
        largest = part.amax(-1, keepdim=True)
        weights = (part - largest).float().clamp_(min=_LEAST).exp_()
        total = weights.sum(-1)
        normalizers.append(largest[:, 0].float() + total.log())
        agreement.append(weights.square_().sum(-1) / total.square())
    return torch.cat(normalizers), torch.cat(agreement)


def _drawn(logits: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
    """A token ``[b, 1]`` from p² / Σ p² for each of the given ``rows`` ``[b]`` of logits."""
    uniform = _uniform(len(rows), generator)
    drawn = [
        draw_from_softmax(logits[some].float(), 1 / 2, at)
        for some, at in zip(
            rows.split(_rows_at_once(logits)), uniform.split(_rows_at_once(logits)), strict=True
        )
    ]
    return torch.cat(drawn)[:, None]


def draw_tokens(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a token from the softmax of each row of logits ``[b, V]``; ``[b, 1]``."""
    return draw_from_softmax(logits.float(), 1.0, _uniform(len(logits), generator))[:, None]


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    """Random numbers in [0, 1), float64 ``[count]`` on the generator's device."""
    return torch.rand(count, dtype=torch.float64, generator=generator, device=generator.device)


def _at(logits: Tensor, target: Tensor) -> Tensor:
    """The logit of the ``target`` ``[b]`` of each row ``[b, V]``."""
    return logits.gather(-1, target[:, None].long())[:, 0].float()
