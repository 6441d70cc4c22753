"""Likelihood-free temperature: draw patches from P(x)^(1/T) / Z using only samples of P.

CALM has no probabilities to sharpen, but its draws can be compared: n draws agree on x with
probability P(x)^n (arXiv 2510.27688, section 5). There are two methods:

* `sample_exact`: rejection. Exact at every T in (0, 1], but the number of draws has no bound.
* `sample_from_pool`: a pool of N draws, for T = 1/n. Cheap, and biased at a finite N. Only the
  decisive draws of the pool are made.

Both are written as coroutines, `exact_steps` and `pool_steps`, that ask for draws and for tokens of
draws (`Draw`, `Look`), so that the requests of several texts can be answered together.
`sample_exact` and `sample_from_pool` run one alone, with a function ``draw(count)`` that returns
independent samples of P: an array of tokens [count, K], or `Patches`, whose tokens are computed on
demand. Random choices come from a numpy generator.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from math import comb, floor, isinf
from typing import Any, Protocol, TypeVar

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


@dataclass(frozen=True)
class Draw:
    """A request for ``count`` more draws; the reply is K."""

    count: int


@dataclass(frozen=True)
class Look:
    """A request for tokens of draws, which are numbered 0, 1, ... in the order they were made.

    The reply has for each of ``rows`` its token at a position; without a position, its patch.
    """

    rows: list[int]
    position: int | None = None


_T = TypeVar("_T")
Asking = Generator["Draw | Look", Any, _T]
"""A coroutine that yields requests and returns a result."""

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
    """One exact sample of P(x)^(1/T) / Z by rejection; see `exact_steps`.

    Args:
        draw: independent samples of P.
        temperature: T in (0, 1].
        rng: random numbers for the coins.
        max_draws: number of draws after which to give up.

    Raises:
        UserError: the temperature is outside (0, 1], or ``max_draws`` draws gave no sample.
    """
    return _answered(exact_steps(temperature, rng, max_draws=max_draws), draw)


def exact_steps(
    temperature: float, rng: np.random.Generator, *, max_draws: int = DEFAULT_MAX_DRAWS
) -> Asking[Patch]:
    """With 1/T = n + a: n draws must agree on x, which happens with probability P(x)^n, and a coin
    of probability P(x)^a, tossed using only further draws (Bernoulli factory), must show heads.
    Otherwise the procedure starts again. T = 1 takes one draw.

    Raises:
        UserError: as `sample_exact`.
    """
    if max_draws < 1:
        raise UserError(f"max_draws {max_draws}: must be at least 1")
    whole, fraction = exponent_parts(temperature)
    draws = _OneByOne(temperature, max_draws)
    while True:
        candidate = yield from draws.next()
        agreeing = 1
        # The first draw that disagrees ends it: further draws could not change the result.
        while agreeing < whole and (yield from draws.next()) == candidate:
            agreeing += 1
        if agreeing < whole:
            continue
        if fraction == 0 or (yield from _coin(candidate, fraction, draws, rng)):
            return candidate


def _coin(
    candidate: Patch, power: float, draws: _OneByOne, rng: np.random.Generator
) -> Asking[bool]:
    """True with probability P(candidate)^power, 0 < power < 1.

    With q = 1 - P(candidate): P · Σ_i q^i Π_{j<=i} (1 - power/j) = P · (1 - q)^(power - 1), the
    binomial series.
    """
    step = 1
    while (yield from draws.next()) != candidate:
        if rng.random() < power / step:
            return False
        step += 1
    return True


class _OneByOne:
    """Single draws, made in batches."""

    def __init__(self, temperature: float, max_draws: int) -> None:
        self._temperature, self._max_draws = temperature, max_draws
        self._made = 0
        self._waiting: Iterator[Patch] = iter(())

    def next(self) -> Asking[Patch]:
        """The next draw.

        Raises:
            UserError: ``max_draws`` were made.
        """
        for patch in self._waiting:
            return patch
        at_once = 1 if self._temperature == 1 else _DRAWS_AT_ONCE
        count = min(at_once, self._max_draws - self._made)
        if count == 0:
            raise UserError(
                f"temperature {self._temperature:g}: no patch was accepted in {self._max_draws} "
                "draws (max_draws); raise the limit, the temperature, or sample from a pool"
            )
        yield Draw(count)
        self._waiting = iter((yield Look(list(range(self._made, self._made + count)))))
        self._made += count
        return next(self._waiting)


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
    everything = _Pool()

    def count_all() -> Asking[PoolCandidates]:
        yield from everything.add(list(range(len(pool))))
        classes, level = yield from everything.candidates(n)
        patches = [tuple(pool[members[0]].tolist()) for members in classes]
        return PoolCandidates(patches, [comb(len(members), level) for members in classes], level)

    return _answered(count_all(), lambda count: pool)


class _Pool:
    """Numbered draws of a pool, made on demand. They are compared token by token, so that only the
    first token of most draws is computed."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}
        self._patch_size = 0

    def __len__(self) -> int:
        return len(self._rows)

    def missing(self, members: set[int]) -> list[int]:
        return sorted(members - self._rows.keys())

    def add(self, members: list[int]) -> Asking[None]:
        """Make these draws."""
        if members:
            self._patch_size = yield Draw(len(members))
            made = len(self)
            self._rows.update((member, made + n) for n, member in enumerate(members))

    def patch(self, member: int) -> Asking[Patch]:
        """All tokens of a draw."""
        [patch] = yield Look([self._rows[member]])
        return patch

    def first_agreeing(self, groups: list[tuple[int, ...]]) -> Asking[tuple[int, ...] | None]:
        """The first of these groups of draws whose members are all equal."""
        for position in range(self._patch_size):
            tokens = yield from self._tokens({m for group in groups for m in group}, position)
            groups = [group for group in groups if len({tokens[m] for m in group}) == 1]
            if not groups:
                return None
        return groups[0]

    def begin_differently(self) -> Asking[bool]:
        """Whether no two draws have the same first token."""
        tokens = yield from self._tokens(set(self._rows), 0)
        return len(set(tokens.values())) == len(self)

    def candidates(self, n: int) -> Asking[tuple[list[list[int]], int]]:
        """Classes of equal draws with at least ``level`` members, ordered by their first member,
        and ``level``: n, or the size of the largest class if that is less."""
        classes = [sorted(self._rows)]
        singles: list[list[int]] = []
        for position in range(self._patch_size):
            tokens = yield from self._tokens({m for members in classes for m in members}, position)
            split: dict[tuple[int, int], list[int]] = {}
            for number, members in enumerate(classes):
                for member in members:
                    split.setdefault((number, tokens[member]), []).append(member)
            classes = [members for members in split.values() if len(members) > 1]
            singles += [members for members in split.values() if len(members) == 1]
        level = min(n, max(map(len, classes), default=1))
        return sorted(m for m in classes + singles if len(m) >= level), level

    def _tokens(self, members: set[int], position: int) -> Asking[dict[int, int]]:
        """The tokens of these draws at one position."""
        if not members:
            return {}
        ordered = sorted(members)
        found = yield Look([self._rows[member] for member in ordered], position)
        return dict(zip(ordered, found, strict=True))


def _answered(asking: Asking[_T], draw: DrawFunction) -> _T:
    """The result of a coroutine, which gets draws from a function."""
    places: list[tuple[Patches, int]] = []
    reply: Any = None
    while True:
        try:
            request = asking.send(reply)
        except StopIteration as done:
            return done.value
        if isinstance(request, Draw):
            drawn = draw(request.count)
            patches = KnownPatches(drawn) if isinstance(drawn, np.ndarray) else drawn
            places += [(patches, row) for row in range(request.count)]
            reply = patches.patch_size
        else:
            reply = _looked_at([places[row] for row in request.rows], request.position)


def _looked_at(places: list[tuple[Patches, int]], position: int | None) -> list[Any]:
    """The reply to a `Look`, from patches that were drawn in several pieces."""
    pieces: dict[int, tuple[Patches, list[int]]] = {}
    for patches, row in places:
        pieces.setdefault(id(patches), (patches, []))[1].append(row)
    found = {
        (key, row): value
        for key, (patches, rows) in pieces.items()
        for row, value in zip(
            rows,
            map(patches.patch, rows) if position is None else patches.tokens(rows, position),
            strict=True,
        )
    }
    return [found[id(patches), row] for patches, row in places]


def sample_from_pool(
    draw: DrawFunction,
    temperature: float,
    rng: np.random.Generator,
    *,
    pool_size: int = DEFAULT_POOL_SIZE,
) -> Patch:
    """One sample of P(x)^(1/T) / Z, approximated with a pool of N draws; see `pool_steps`.

    Raises:
        UserError: the temperature is not 1/n, or the pool is smaller than n.
    """
    return _answered(pool_steps(temperature, rng, pool_size=pool_size), draw)


def pool_steps(
    temperature: float, rng: np.random.Generator, *, pool_size: int = DEFAULT_POOL_SIZE
) -> Asking[Patch]:
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
        UserError: as `sample_from_pool`.
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
    pool = _Pool()
    if n == 1:
        yield from pool.add([0])
        return (yield from pool.patch(0))
    groups, count = _random_groups(pool_size, n, rng), _FIRST_GROUPS
    while True:
        looked_at = list(itertools.islice(groups, count))
        missing = pool.missing({member for group in looked_at for member in group})
        if 2 * (len(pool) + len(missing)) > pool_size:
            break
        yield from pool.add(missing)
        if looked_at and (found := (yield from pool.first_agreeing(looked_at))) is not None:
            return (yield from pool.patch(found[0]))
        if (yield from pool.begin_differently()):
            break
        count *= _GROUPS_GROW
    yield from pool.add(pool.missing(set(range(pool_size))))
    classes, level = yield from pool.candidates(n)
    weights = [comb(len(members), level) for members in classes]
    total = sum(weights)  # an exact integer: C(count, n) may not fit a float
    bounds = np.cumsum([weight / total for weight in weights])
    # As `rng.choice` with these weights, which takes ten times as long.
    chosen = int((bounds / bounds[-1]).searchsorted(rng.random(), "right"))
    return (yield from pool.patch(classes[chosen][0]))


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
