"""Likelihood-free temperature against the distributions that it must have.

Chi-square tests reject at 1e-5. There are about thirty of them, so that a correct sampler fails one
for 3 in 10,000 choices of all seeds; a wrong exponent fails by a wide margin (see
`test_the_test_can_fail`).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from math import comb, factorial, prod

import numpy as np
import pytest
from scipy.stats import chisquare

from calm_dist.errors import UserError
from calm_dist.inference import sampling

PROBABILITIES = np.array([0.45, 0.3, 0.15, 0.1])
PATCHES = np.array([[7, 1], [7, 2], [3, 1], [0, 0]])
DRAWS = 6000
LEVEL = 1e-5


def sampler(seed: int, probabilities: np.ndarray = PROBABILITIES) -> Callable[[int], np.ndarray]:
    rng, bounds = np.random.default_rng(seed), probabilities.cumsum()
    # As `rng.choice`, which takes several times as long for few draws.
    return lambda count: PATCHES[bounds.searchsorted(rng.random(count) * bounds[-1], "right")]


def p_value(samples: list[sampling.Patch], expected: np.ndarray) -> float:
    counts = Counter(samples)
    observed = [counts[tuple(patch)] for patch in PATCHES[: len(expected)].tolist()]
    assert sum(observed) == len(samples)
    return float(chisquare(observed, expected / expected.sum() * len(samples)).pvalue)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.9, 2 / 3, 0.5, 0.4, 1 / 3])
def test_exact_samples_follow_the_power(temperature: float, seed: int) -> None:
    draw, rng = sampler(seed), np.random.default_rng(100 + seed)
    samples = [sampling.sample_exact(draw, temperature, rng) for _ in range(DRAWS)]
    assert p_value(samples, PROBABILITIES ** (1 / temperature)) > LEVEL


@pytest.mark.parametrize(("power", "expected"), [(0.1, 0.3**0.1), (0.5, 0.3**0.5), (0.9, 0.3**0.9)])
def test_the_coin_shows_a_power_of_the_probability(power: float, expected: float) -> None:
    """Thrown 20,000 times with draws alone; within 4.4 standard deviations (1e-5 by chance)."""
    draw, rng = sampler(11), np.random.default_rng(12)
    draws = sampling._OneByOne(power, 10**9)

    def heads_of(throws: int) -> sampling.Asking[int]:
        heads = 0
        for _ in range(throws):
            heads += yield from sampling._coin((7, 2), power, draws, rng)
        return heads

    heads = sampling._answered(heads_of(20_000), draw)
    assert abs(heads / 20_000 - expected) < 4.4 * (expected * (1 - expected) / 20_000) ** 0.5


def test_the_test_can_fail() -> None:
    draw, rng = sampler(1), np.random.default_rng(2)
    samples = [sampling.sample_exact(draw, 0.4, rng) for _ in range(DRAWS)]
    for temperature in (0.5, 0.36):
        assert p_value(samples, PROBABILITIES ** (1 / temperature)) < LEVEL


def finite_pool_distribution(probabilities: np.ndarray, pool_size: int, n: int) -> np.ndarray:
    """What a pool of N draws gives, summed over how often each symbol can occur in it.

    A symbol seen c times is chosen with weight C(c, n), or C(c, n-1) where none was seen n times,
    and so on.
    """
    result = np.zeros(len(probabilities))
    for others in itertools.product(range(pool_size + 1), repeat=len(probabilities) - 1):
        counts = (*others, pool_size - sum(others))
        if counts[-1] < 0:
            continue
        ways = factorial(pool_size) // prod(factorial(count) for count in counts)
        level = next(k for k in range(n, 0, -1) if max(counts) >= k)
        weights = np.array([comb(count, level) for count in counts], dtype=float)
        result += ways * np.prod(probabilities ** np.array(counts)) * weights / weights.sum()
    return result


THREE = np.array([0.6, 0.3, 0.1])


def test_finite_pool_distribution_of_one_by_one_pools() -> None:
    """The reference itself: all 3^4 pools of four draws, one after the other, through the code."""
    for n in (2, 3, 4):
        expected = np.zeros(3)
        for outcome in itertools.product(range(3), repeat=4):
            found = sampling.pool_candidates(PATCHES[list(outcome)], n)
            for patch, weight in zip(found.patches, found.weights, strict=True):
                symbol = PATCHES.tolist().index(list(patch))
                expected[symbol] += np.prod(THREE[list(outcome)]) * weight / sum(found.weights)
        assert finite_pool_distribution(THREE, 4, n) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("pool_size", [4, 7])
@pytest.mark.parametrize("n", [2, 3])
def test_pool_has_its_finite_distribution(n: int, pool_size: int, seed: int) -> None:
    draw, rng = sampler(seed, THREE), np.random.default_rng(100 + seed)
    samples = [
        sampling.sample_from_pool(draw, 1 / n, rng, pool_size=pool_size) for _ in range(DRAWS)
    ]
    assert p_value(samples, finite_pool_distribution(THREE, pool_size, n)) > LEVEL
    # A finite pool is biased, and this test would see the exact distribution.
    assert p_value(samples, THREE**n) < LEVEL


def test_a_pool_draws_what_decides() -> None:
    """At a collision rate of 0.46 some ten of 200 draws; all of them where none agree."""
    counts: list[int] = []

    def counted(count: int) -> np.ndarray:
        counts.append(count)
        return draw(count)

    draw, rng = sampler(0, THREE), np.random.default_rng(1)
    for _ in range(300):
        sampling.sample_from_pool(counted, 0.5, rng, pool_size=200)
    assert 8 * 300 <= sum(counts) < 12 * 300
    counts.clear()
    draw = lambda count: np.arange(count)[:, None] + 1000 * len(counts)  # noqa: E731
    sampling.sample_from_pool(counted, 0.5, rng, pool_size=200)
    assert sum(counts) == 200


@pytest.mark.parametrize("n", [2, 3])
def test_larger_pools_come_nearer_to_the_power(n: int) -> None:
    """Total variation to p^n / Z, from the enumerated distributions: no chance is involved."""
    exact = THREE**n / (THREE**n).sum()
    distances = [
        0.5 * np.abs(finite_pool_distribution(THREE, size, n) - exact).sum()
        for size in (4, 8, 16, 32, 64)
    ]
    assert all(later < 0.7 * earlier for earlier, later in itertools.pairwise(distances))
    assert distances[-1] < 0.15 * distances[0]


def test_a_large_pool_comes_near_the_power() -> None:
    draw, rng = sampler(5), np.random.default_rng(6)
    samples = [sampling.sample_from_pool(draw, 0.5, rng, pool_size=1000) for _ in range(1500)]
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
    # 10^9 draws that agree are never tried to the end.
    with pytest.raises(UserError, match="temperature 1e-09: no patch was accepted in 500 draws"):
        sampling.sample_exact(sampler(0), 1e-9, np.random.default_rng(0), max_draws=500)


def test_temperatures_as_exponents() -> None:
    assert sampling.exponent_parts(1.0) == (1, 0.0)
    assert [sampling.exponent_parts(1 / n) for n in (2, 3, 7, 49)] == [
        (2, 0.0), (3, 0.0), (7, 0.0), (49, 0.0)
    ]  # fmt: skip
    assert sampling.exponent_parts(0.4) == (2, pytest.approx(0.5))
    assert sampling.exponent_parts(0.9) == (1, pytest.approx(1 / 9))


@pytest.mark.parametrize("temperature", [0.0, -1.0, 1.5, float("nan"), float("inf"), 1e-310])
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


class Counted:
    """Patches that count how many of their tokens were asked for."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.asked, self.patch_size = array, set[tuple[int, int]](), array.shape[1]

    def __len__(self) -> int:
        return len(self.array)

    def tokens(self, rows: list[int], position: int) -> list[int]:
        self.asked |= {(row, position) for row in rows}
        return self.array[rows, position].tolist()

    def patch(self, row: int) -> tuple[int, ...]:
        self.asked |= {(row, position) for position in range(self.patch_size)}
        return tuple(self.array[row].tolist())


def counted(draw: Callable[[int], np.ndarray]) -> sampling.DrawFunction:
    return lambda count: Counted(draw(count))


@pytest.mark.parametrize("n", [2, 3])
def test_tokens_worked_out_when_needed_change_nothing(n: int) -> None:
    """The same seeds give the same patches as from arrays."""
    for seed in range(50):
        known, lazy = sampler(seed), sampler(seed)
        draws: list[sampling.DrawFunction] = [known, counted(lazy)]
        results = [
            sampling.sample_from_pool(draw, 1 / n, np.random.default_rng(seed), pool_size=9)
            for draw in draws
        ]
        assert results[0] == results[1]


def test_draws_that_differ_at_once_are_not_worked_out_further() -> None:
    """200 draws with other first tokens: those, and the rest of the one that is chosen."""
    made: list[Counted] = []

    def draw(count: int) -> Counted:
        first = np.arange(count) + 1000 * len(made)
        made.append(Counted(np.stack([first, first, first, first], axis=1)))
        return made[-1]

    sampling.sample_from_pool(draw, 0.5, np.random.default_rng(0), pool_size=200)
    assert sum(map(len, made)) == 200
    assert sum(len(patches.asked) for patches in made) == 200 + 3
