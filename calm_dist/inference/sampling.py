"""Likelihood-free temperature: draw patches from P(x)^(1/T) / Z using only samples of P.

CALM has no probabilities to sharpen, but its draws can be compared: n draws agree on x with
probability P(x)^n (arXiv 2510.27688, section 5). There are two methods:

* `sample_exact`: rejection. Exact at every T in (0, 1], but the number of draws has no bound.
* `sample_from_pool`: a pool of N draws, for T = 1/n. Cheap, and biased at a finite N. Only the
  decisive draws of the pool are made.

Both take a function ``draw(count)`` that returns independent samples of P: an array of tokens
[count, K], or `Patches`, whose tokens are computed on demand. They make their own random choices
with a numpy generator.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import comb, floor, isinf
from typing import Protocol

import numpy as np

from calm_dist.errors import UserError

Patch = tuple[int, ...]


class Patches(Protocol):
    """Independent draws of a patch."""

    @property
    def patch_size(self) -> int: ...

    def __len__(self) -> int: ...

    def tokens(self, rows: list[int], position: int) -> list[int]:
        """The tokens at one position of some of the draws."""

    def patch(self, row: int) -> Patch:
        """All tokens of a draw."""


@dataclass(frozen=True)
class KnownPatches:
    """`Patches` as an array [n, K]."""

    array: np.ndarray

    @property
    def patch_size(self) -> int:
        return self.array.shape[1]

    def __len__(self) -> int:
        return len(self.array)

    def tokens(self, rows: list[int], position: int) -> list[int]:
        """The tokens at one position of some of the draws."""
        return self.array[rows, position].tolist()

    def patch(self, row: int) -> Patch:
        """All tokens of a draw."""
        return tuple(self.array[row].tolist())


DrawFunction = Callable[[int], "np.ndarray | Patches"]

DEFAULT_MAX_DRAWS = 100_000
DEFAULT_POOL_SIZE = 200
_DRAWS_AT_ONCE = 64
# Number of groups of n draws examined first, and the factor by which it grows: making a few draws
# costs hardly less than making some more.
_FIRST_GROUPS, _GROUPS_GROW = 4, 4


def sample_exact(
    draw: DrawFunction,
    temperature: float,
    rng: np.random.Generator,
    *,
    max_draws: int = DEFAULT_MAX_DRAWS,
) -> Patch:
    """One exact sample of P(x)^(1/T) / Z by rejection.

    With 1/T = n + a: n draws must agree on x, which happens with probability P(x)^n, and a coin of
    probability P(x)^a, tossed using only further draws (Bernoulli factory), must show heads.
    Otherwise the procedure starts again. T = 1 takes one draw.

    Args:
        draw: independent samples of P.
        temperature: T in (0, 1].
        rng: random numbers for the coins.
        max_draws: number of draws after which to give up.

    Raises:
        UserError: the temperature is outside (0, 1], or ``max_draws`` draws gave no sample.
    """
    if max_draws < 1:
        raise UserError(f"max_draws {max_draws}: must be at least 1")
    whole, fraction = exponent_parts(temperature)
    draws = _one_by_one(draw, temperature, max_draws)
    while True:
        candidate = next(draws)
        # `all` stops at the first draw that disagrees: further draws could not change the result.
        agree = all(next(draws) == candidate for _ in range(whole - 1))
        if agree and (fraction == 0 or _coin(candidate, fraction, draws, rng)):
            return candidate


def _coin(candidate: Patch, power: float, draws: Iterator[Patch], rng: np.random.Generator) -> bool:
    """True with probability P(candidate)^power, 0 < power < 1.

    With q = 1 - P(candidate): P · Σ_i q^i Π_{j<=i} (1 - power/j) = P · (1 - q)^(power - 1), the
    binomial series.
    """
    step = 1
    while next(draws) != candidate:
        if rng.random() < power / step:
            return False
        step += 1
    return True


def _one_by_one(draw: DrawFunction, temperature: float, max_draws: int) -> Iterator[Patch]:
    """Yield single draws, made in batches; raise a `UserError` after ``max_draws``."""
    made = 0
    while made < max_draws:
        count = min(1 if temperature == 1 else _DRAWS_AT_ONCE, max_draws - made)
        made += count
        patches = _as_patches(draw(count))
        columns = [patches.tokens(list(range(count)), k) for k in range(patches.patch_size)]
        yield from zip(*columns, strict=True)
    raise UserError(
        f"temperature {temperature:g}: no patch was accepted in {max_draws} draws (max_draws); "
        "raise the limit, the temperature, or sample from a pool"
    )


@dataclass(frozen=True)
class PoolCandidates:
    """The patches of a pool that may be chosen, in order of first appearance."""

    patches: list[Patch]
    weights: list[int]
    """C(count, level) for each patch."""
    level: int
    """Each patch occurs at least this often: n, or less if no patch of the pool occurs n times."""


def pool_candidates(pool: np.ndarray, n: int) -> PoolCandidates:
    """The patches seen at least n times in ``pool`` ``[N, K]``, weighted by C(count, n).

    C(count, n) is the number of ways to pick n draws of the pool that agree on the patch. If no
    patch was seen n times, n - 1 is tried, and so on; at 1 every draw counts.
    """
    everything = _Pool(lambda count: pool)
    everything.add(list(range(len(pool))))
    classes, level = everything.candidates(n)
    patches = [everything.patch(members[0]) for members in classes]
    return PoolCandidates(patches, [comb(len(members), level) for members in classes], level)


class _Pool:
    """Numbered draws of a pool, made on demand. They are compared token by token, so that only the
    first token of most draws is computed."""

    def __init__(self, draw: DrawFunction) -> None:
        self._draw = draw
        self._places: dict[int, tuple[Patches, int]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def missing(self, members: set[int]) -> list[int]:
        return sorted(members - self._places.keys())

    def add(self, members: list[int]) -> None:
        """Make these draws."""
        if members:
            patches = _as_patches(self._draw(len(members)))
            self._places.update((m, (patches, row)) for row, m in enumerate(members))

    def patch(self, member: int) -> Patch:
        """All tokens of a draw."""
        patches, row = self._places[member]
        return patches.patch(row)

    def first_agreeing(self, groups: list[tuple[int, ...]]) -> tuple[int, ...] | None:
        """The first of these groups of draws whose members are all equal."""
        for position in range(self._patch_size):
            tokens = self._tokens({member for group in groups for member in group}, position)
            groups = [group for group in groups if len({tokens[m] for m in group}) == 1]
            if not groups:
                return None
        return groups[0]

    def begin_differently(self) -> bool:
        """Whether no two draws have the same first token."""
        return len(set(self._tokens(set(self._places), 0).values())) == len(self)

    def candidates(self, n: int) -> tuple[list[list[int]], int]:
        """Classes of equal draws with at least ``level`` members, ordered by their first member,
        and ``level``: n, or the size of the largest class if that is less."""
        classes = [sorted(self._places)]
        singles: list[list[int]] = []
        for position in range(self._patch_size):
            tokens = self._tokens({m for members in classes for m in members}, position)
            split: dict[tuple[int, int], list[int]] = {}
            for number, members in enumerate(classes):
                for member in members:
                    split.setdefault((number, tokens[member]), []).append(member)
            classes = [members for members in split.values() if len(members) > 1]
            singles += [members for members in split.values() if len(members) == 1]
        level = min(n, max(map(len, classes), default=1))
        return sorted(m for m in classes + singles if len(m) >= level), level

    @property
    def _patch_size(self) -> int:
        return next(iter(self._places.values()))[0].patch_size

    def _tokens(self, members: set[int], position: int) -> dict[int, int]:
        """The tokens of these draws at one position."""
        rows: dict[int, list[tuple[int, int]]] = {}
        made: dict[int, Patches] = {}
        for member in sorted(members):
            patches, row = self._places[member]
            made[id(patches)] = patches
            rows.setdefault(id(patches), []).append((member, row))
        return {
            member: token
            for key, pairs in rows.items()
            for (member, _), token in zip(
                pairs, made[key].tokens([row for _, row in pairs], position), strict=True
            )
        }


def _as_patches(drawn: np.ndarray | Patches) -> Patches:
    return KnownPatches(drawn) if isinstance(drawn, np.ndarray) else drawn


def sample_from_pool(
    draw: DrawFunction,
    temperature: float,
    rng: np.random.Generator,
    *,
    pool_size: int = DEFAULT_POOL_SIZE,
) -> Patch:
    """One sample of P(x)^(1/T) / Z, approximated with a pool of N draws, for T = 1/n.

    The distribution tends to the exact one for large N; at a finite N it is biased, and uniform
    over the draws if no patch is seen twice. T = 1 takes one draw.

    The weight of a patch, C(count, n), is the number of groups of n draws that agree on it. So a
    choice by weight is a uniform choice among all groups of the pool that agree, which is the same
    as taking the first agreeing group in a random order of all groups. Draws are made when the
    order reaches them: at a collision rate of 0.1, about 20 instead of 200. If half of the pool has
    not decided, or all draws begin differently, the rest are made, and the patch is chosen by
    weight over the whole pool. The result is the same, since no examined group agrees and the order
    of the others is still random.

    Raises:
        UserError: the temperature is not 1/n, or the pool is smaller than n.
    """
    n, fraction = exponent_parts(temperature)
    if fraction != 0:
        raise UserError(
            f"temperature {temperature:g}: a pool needs 1/T to be a whole number (1, 1/2, 1/3, "
            "...); choose such a temperature or the exact method"
        )
    if pool_size < n:
        raise UserError(
            f"pool_size {pool_size}: temperature {temperature:g} needs at least {n} draws"
        )
    pool = _Pool(draw)
    if n == 1:
        pool.add([0])
        return pool.patch(0)
    groups, count = _random_groups(pool_size, n, rng), _FIRST_GROUPS
    while True:
        looked_at = list(itertools.islice(groups, count))
        missing = pool.missing({member for group in looked_at for member in group})
        if 2 * (len(pool) + len(missing)) > pool_size:
            break
        pool.add(missing)
        if looked_at and (found := pool.first_agreeing(looked_at)) is not None:
            return pool.patch(found[0])
        if pool.begin_differently():
            break
        count *= _GROUPS_GROW
    pool.add(pool.missing(set(range(pool_size))))
    classes, level = pool.candidates(n)
    weights = [comb(len(members), level) for members in classes]
    total = sum(weights)  # an exact integer: C(count, n) may not fit a float
    chosen = int(rng.choice(len(classes), p=[weight / total for weight in weights]))
    return pool.patch(classes[chosen][0])


def _random_groups(size: int, n: int, rng: np.random.Generator) -> Iterator[tuple[int, ...]]:
    """Yield all groups of n of the numbers below ``size`` in random order. Exhausting it is only
    feasible for small numbers."""
    seen: set[tuple[int, ...]] = set()
    for _ in range(comb(size, n)):
        group = _random_group(size, n, rng)
        while group in seen:
            group = _random_group(size, n, rng)
        seen.add(group)
        yield group


def _random_group(size: int, n: int, rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(sorted(rng.choice(size, n, replace=False).tolist()))


def exponent_parts(temperature: float) -> tuple[int, float]:
    """n and a with 1/T = n + a, n >= 1 and 0 <= a < 1.

    Raises:
        UserError: the temperature is outside (0, 1], or its inverse is not finite.
    """
    if not 0 < temperature <= 1:
        raise UserError(
            f"temperature {temperature:g}: must lie in (0, 1]; CALM can sharpen its samples but "
            "not flatten them, and does not know the most likely patch to return at 0"
        )
    exponent = 1 / temperature
    if isinf(exponent):
        raise UserError(f"temperature {temperature:g}: too small, 1/T overflows; raise it")
    if abs(exponent - round(exponent)) < 1e-9 * exponent:
        return round(exponent), 0.0
    return floor(exponent), exponent - floor(exponent)
