"""How BrierLM grows with training FLOPs, by kind of model, and where two kinds would
cross.

For each kind, the best run of every budget (of several seeds, their mean) is a point. A power law
BrierLM = s · FLOPs^a is fitted by weighted least squares in logarithms. Errors come from 4,000 fits
to points drawn within their own errors: normal, with the variance of the blocks' error plus that of
the seeds' mean. The exponent's error does not include that the best run was chosen by its score.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calm_dist.errors import UserError

DRAWS = 4000
_SAME_BUDGET = 0.05
"""Relative difference of FLOPs up to which two runs had the same budget."""


@dataclass(frozen=True)
class Score:
    """The score of one run, or the mean of its seeds."""

    flops: float
    brierlm: float
    error: float
    """Standard error over blocks and seeds."""


@dataclass(frozen=True)
class Growth:
    """A power law and fits to points drawn within the errors."""

    label: str
    points: tuple[Score, ...]
    exponent: float
    exponent_error: float
    draws: np.ndarray
    """[4000, 2]: exponent and logarithm of the scale."""
    scale: float
    """Logarithm of BrierLM at one FLOP."""

    def at(self, flops: float) -> tuple[float, float]:
        """BrierLM of the fit at a budget, and its standard error."""
        drawn = np.exp(self.draws[:, 1] + self.draws[:, 0] * math.log(flops))
        return math.exp(self.scale + self.exponent * math.log(flops)), float(drawn.std())


@dataclass(frozen=True)
class Crossing:
    """Where two power laws cross."""

    chance: float
    """Share of the drawn fits that cross."""
    low: float
    """FLOPs: the 16th percentile over all drawn fits; infinite for those that do not cross."""
    middle: float
    """The median."""
    high: float
    """The 84th percentile."""
    then_ahead: bool
    """Whether the first is ahead beyond the crossing, in most of the fits that cross."""


def score(flops: float, values: Sequence[float], block_error: float, spread: float) -> Score:
    """The mean of seeds; ``spread`` is the standard deviation of seeds, assumed where there is
    one."""
    deviation = statistics.stdev(values) if len(values) > 1 else spread
    error = math.hypot(block_error, deviation / math.sqrt(len(values)))
    return Score(flops, statistics.mean(values), error)


def best_by_budget(scores: Sequence[Score]) -> tuple[Score, ...]:
    """The best score of each budget, by growing budget."""
    best: list[Score] = []
    for one in sorted(scores, key=lambda s: s.flops):
        if best and one.flops < best[-1].flops * (1 + _SAME_BUDGET):
            best[-1] = max(best[-1], one, key=lambda s: s.brierlm)
        else:
            best.append(one)
    return tuple(best)


def fit(label: str, points: Sequence[Score]) -> Growth:
    """The power law of these points.

    Raises:
        UserError: fewer than two budgets, or a score that has no logarithm.
    """
    if len(points) < 2:
        raise UserError(f"growth of {label}: {len(points)} budgets; at least 2 are needed")
    if any(point.brierlm <= 0 for point in points):
        raise UserError(f"growth of {label}: a BrierLM of 0 has no logarithm; leave its run out")
    logs = np.log([point.flops for point in points])
    values = np.array([point.brierlm for point in points])
    errors = np.array([max(point.error, 1e-9 * point.brierlm) for point in points])
    # A negative draw has no logarithm; the bound is far below any point that is worth fitting.
    noise = np.random.default_rng(0).normal(size=(DRAWS, len(points)))
    drawn = np.maximum(values + errors * noise, values / 100)
    rows = np.log(np.vstack([values, drawn])).T
    exponents, scales = np.polyfit(logs, rows, 1, w=values / errors)
    draws = np.stack([exponents[1:], scales[1:]], 1)
    return Growth(
        label, tuple(points), float(exponents[0]), float(exponents[1:].std()), draws,
        float(scales[0]),
    )  # fmt: skip


def crossing(one: Growth, other: Growth, after: float | None = None) -> Crossing:
    """Where one overtakes the other beyond ``after`` FLOPs, by default the largest measured
    budget."""
    # Independent errors: otherwise both would use the same draws.
    others = other.draws[np.random.default_rng(1).permutation(DRAWS)]
    faster, behind = one.draws[:, 0] - others[:, 0], others[:, 1] - one.draws[:, 1]
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        where = np.exp(behind / faster)
    if after is None:
        after = max(point.flops for point in (*one.points, *other.points))
    crosses = where > after
    then_ahead = bool(np.median(faster[crosses]) > 0) if crosses.any() else False
    where = np.where(crosses, where, np.inf)
    low, middle, high = np.quantile(where, (0.16, 0.5, 0.84), method="lower")
    chance = float(np.isfinite(where).mean())
    return Crossing(chance, float(low), float(middle), float(high), then_ahead)
