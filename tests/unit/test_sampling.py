"""Likelihood-free temperature against the distributions that it must have.

Chi-square tests reject at 1e-4 and the seeds are fixed: a correct sampler passes for almost every
seed, a wrong exponent fails by a wide margin (see `test_the_test_can_fail`).
"""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare

from calm_dist.errors import UserError
from calm_dist.evaluation import sampling

PROBABILITIES = np.array([0.45, 0.3, 0.15, 0.1])
PATCHES = np.array([[7, 1], [7, 2], [3, 1], [0, 0]])
DRAWS = 6000
LEVEL = 1e-4


def sampler(seed: int, probabilities: np.ndarray = PROBABILITIES) -> sampling.DrawFunction:
    rng = np.random.default_rng(seed)
    return lambda count: PATCHES[rng.choice(len(probabilities), count, p=probabilities)]


def p_value(samples: list[sampling.Patch], expected: np.ndarray) -> float:
    counts = Counter(samples)
    observed = [counts[tuple(patch)] for patch in PATCHES[: len(expected)].tolist()]
    assert sum(observed) == len(samples)
    return float(chisquare(observed, expected / expected.sum() * len(samples)).pvalue)


@pytest.mark.parametrize("temperature", [1.0, 0.8, 0.5, 0.4, 1 / 3])
def test_exact_samples_follow_the_power(temperature: float) -> None:
    draw, rng = sampler(1), np.random.default_rng(2)
    samples = [sampling.sample_exact(draw, temperature, rng) for _ in range(DRAWS)]
    assert p_value(samples, PROBABILITIES ** (1 / temperature)) > LEVEL


def test_the_test_can_fail() -> None:
    draw, rng = sampler(1), np.random.default_rng(2)
    samples = [sampling.sample_exact(draw, 0.4, rng) for _ in range(DRAWS)]
    for temperature in (0.5, 0.36):
        assert p_value(samples, PROBABILITIES ** (1 / temperature)) < LEVEL


@pytest.mark.parametrize("n", [2, 3])
def test_pool_has_its_enumerated_distribution(n: int) -> None:
    """All 3^4 pools of four draws, the fallback included, give the exact finite-pool mixture."""
    probabilities, pool_size = np.array([0.6, 0.3, 0.1]), 4
    expected = np.zeros(3)
    for outcome in itertools.product(range(3), repeat=pool_size):
        counts = np.bincount(outcome, minlength=3)
        level = n
        while not (counts >= level).any():
            level -= 1
        ways = np.array([np.prod(np.arange(c - level + 1, c + 1)) if c >= level else 0
                         for c in counts], dtype=float)  # fmt: skip
        expected += np.prod(probabilities[list(outcome)]) * ways / ways.sum()
    draw, rng = sampler(3, probabilities), np.random.default_rng(4)
    samples = [
        sampling.sample_from_pool(draw, 1 / n, rng, pool_size=pool_size) for _ in range(DRAWS)
    ]
    assert p_value(samples, expected) > LEVEL
    # A finite pool is biased, and this test would see the exact distribution.
    assert p_value(samples, probabilities**n) < LEVEL


def test_a_large_pool_comes_near_the_power() -> None:
    draw, rng = sampler(5), np.random.default_rng(6)
    samples = [sampling.sample_from_pool(draw, 0.5, rng, pool_size=2000) for _ in range(2000)]
    assert p_value(samples, PROBABILITIES**2) > LEVEL


def test_candidates_fall_back_to_fewer_agreements() -> None:
    pool = np.array([[5, 5], [1, 2], [5, 5], [1, 2], [9, 9], [1, 2]])
    at_two = sampling.pool_candidates(pool, 2)
    assert at_two.patches == [(5, 5), (1, 2)] and at_two.weights == [1, 3]
    at_three = sampling.pool_candidates(pool, 3)
    assert at_three.patches == [(1, 2)] and at_three.weights == [1] and at_three.level == 3
    at_four = sampling.pool_candidates(pool, 4)
    assert at_four.patches == [(1, 2)] and at_four.level == 3
    distinct = sampling.pool_candidates(pool[[0, 1, 4]], 3)
    assert len(distinct.patches) == 3 and distinct.weights == [1, 1, 1] and distinct.level == 1


def test_the_same_seeds_give_the_same_samples() -> None:
    runs = []
    for _ in range(2):
        draw, rng = sampler(7), np.random.default_rng(8)
        runs.append([sampling.sample_exact(draw, 0.6, rng) for _ in range(50)])
    assert runs[0] == runs[1]


def test_temperature_one_draws_once() -> None:
    sizes: list[int] = []

    def draw(count: int) -> np.ndarray:
        sizes.append(count)
        return PATCHES[:count]

    rng = np.random.default_rng(0)
    assert sampling.sample_exact(draw, 1.0, rng) == (7, 1)
    assert sampling.sample_from_pool(draw, 1.0, rng) == (7, 1)
    assert sizes == [1, 1]


def test_draws_are_limited() -> None:
    numbers = itertools.count()

    def never_twice(count: int) -> np.ndarray:
        return np.array([[next(numbers), 0] for _ in range(count)])

    with pytest.raises(UserError, match="1000 draws"):
        sampling.sample_exact(never_twice, 0.5, np.random.default_rng(0), max_draws=1000)
    assert next(numbers) == 1000


@pytest.mark.parametrize("temperature", [0.0, -1.0, 1.5, float("nan")])
def test_impossible_temperatures(temperature: float) -> None:
    with pytest.raises(UserError, match="temperature"):
        sampling.sample_exact(sampler(0), temperature, np.random.default_rng(0))
    with pytest.raises(UserError, match="temperature"):
        sampling.sample_from_pool(sampler(0), temperature, np.random.default_rng(0))


def test_pool_limits() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match="whole number"):
        sampling.sample_from_pool(sampler(0), 0.7, rng)
    with pytest.raises(UserError, match="at least 4"):
        sampling.sample_from_pool(sampler(0), 0.25, rng, pool_size=3)
