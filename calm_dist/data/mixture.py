"""How stores are mixed: the stretches of a training within which blocks are drawn in one order.

A stretch is an epoch, that is, as many global batches as the blocks of all stores make, or the part
of one up to a step at which weights change or a store has been read as often as it may be. Each
store gives a fixed number of the blocks of a stretch, in proportion to the weights, so what has
been read is known exactly where a stretch ends. Stretches are a function of the stores' sizes,
weights, limits, the global batch size and the seed alone.

With weights or limits, a store's share of a stretch is seldom the whole store, so that draws of
their own for each stretch would repeat some of its blocks and leave out others. There, each store
is read in passes: permutations of its blocks, one after the other, and each stretch continues where
the one before it stopped. Without either, a stretch is an epoch and draws its own blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from calm_dist.errors import DataError
from calm_dist.randomness import key_seed

Weight = float | Sequence[tuple[int, float]]
"""A constant weight, or the weight from each of several steps on; zero before the first."""


@dataclass(frozen=True)
class Stretch:
    """Steps within which blocks are drawn in one order.

    Attributes:
        number: from which the order is drawn; Streaming's epoch.
        first: its first step, counted from 0.
        steps: its length.
        counts: blocks of each store in it.
    """

    number: int
    first: int
    steps: int
    counts: tuple[int, ...]

    @property
    def end(self) -> int:
        """The step after its last one."""
        return self.first + self.steps


@dataclass(frozen=True)
class Start:
    """Where an order begins: at a step, with a number, after blocks of each store were read."""

    step: int = 0
    number: int = 0
    read: tuple[int, ...] = ()


@dataclass
class Mixture:
    """The stretches of a training.

    Args:
        sizes: blocks of each store.
        weights: of each store, relative to the others; None: in proportion to the sizes.
        most_epochs: how often each store may be read; its share then goes to the others.
        global_batch_size: blocks per step.
        seed: of the order.
        start: where the first stretch begins.
        passes: whether stores are read in passes; otherwise Streaming draws the blocks of each
            stretch, as it did for all mixtures in earlier versions.
    """

    sizes: tuple[int, ...]
    weights: tuple[Weight, ...] | None
    most_epochs: tuple[float | None, ...]
    global_batch_size: int
    seed: int
    start: Start = Start()
    passes: bool = False
    _stretches: list[Stretch] = field(default_factory=list, init=False, repr=False)
    _ended: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        read = self.start.read + (0,) * (len(self.sizes) - len(self.start.read))
        self._read = np.array(read, np.int64)
        self._initially_read = self._read.copy()
        self._most = np.array(
            [
                np.iinfo(np.int64).max if most is None else int(most * size)
                for most, size in zip(self.most_epochs, self.sizes, strict=True)
            ]
        )
        self._spent = np.zeros(len(self.sizes), bool)
        changes = {0} if self.weights is None else {s for w in self.weights for s in _steps(w)}
        self._changes = sorted(changes)

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch."""
        return sum(self.sizes) // self.global_batch_size

    def at(self, step: int) -> Stretch:
        """The stretch of a step.

        Raises:
            DataError: every store has been read as often as it may be before that step.
        """
        if not self.has(step):
            end = self._stretches[-1].end if self._stretches else self.start.step
            raise DataError(
                f"data.path: with their max_epochs, the stores give data for {end} steps; raise "
                "max_epochs, add a store, or lower training.steps"
            )
        low, high = 0, len(self._stretches) - 1
        while low < high:
            middle = (low + high) // 2
            if self._stretches[middle].end <= step:
                low = middle + 1
            else:
                high = middle
        return self._stretches[low]

    def until(self, step: int) -> list[Stretch]:
        """The stretches that begin at a step or before; all, if the data ends before."""
        self._extend(step)
        return [stretch for stretch in self._stretches if stretch.first <= step]

    def has(self, step: int) -> bool:
        """Whether there is data for a step."""
        self._extend(step)
        return bool(self._stretches) and step < self._stretches[-1].end

    def numbered(self, number: int) -> Stretch:
        """The stretch of this number, which must exist."""
        while len(self._stretches) <= number - self.start.number:
            self.at(self._stretches[-1].end if self._stretches else self.start.step)
        return self._stretches[number - self.start.number]

    def blocks_of(self, stretch: Stretch) -> list[list[np.ndarray]]:
        """The blocks of a stretch, if stores are read in passes: for each store, the numbers in it
        of those that each pass gives, int64, ascending."""
        read = self._initially_read.copy()
        for earlier in self._stretches[: stretch.number - self.start.number]:
            read += np.array(earlier.counts)
        return [
            [self._of_pass(store, *part) for part in _by_pass(int(first), count, size)]
            for store, (first, count, size) in enumerate(
                zip(read, stretch.counts, self.sizes, strict=True)
            )
        ]

    def _of_pass(self, store: int, number: int, begin: int, end: int) -> np.ndarray:
        """The blocks at positions ``begin`` to ``end`` of a pass, ascending."""
        size = self.sizes[store]
        if end - begin == size:
            return np.arange(size)
        rng = np.random.default_rng(key_seed(self.seed, "pass", store, number))
        return np.sort(rng.permutation(size)[begin:end])

    def read_at(self, step: int) -> list[float]:
        """Blocks of each store read before a step; within a stretch, in proportion."""
        read = self._initially_read.astype(float)
        if step > self.start.step:
            self.at(step - 1)
        for stretch in self._stretches:
            part = min(1.0, max(0.0, (step - stretch.first) / stretch.steps))
            if not part:
                break
            read += part * np.array(stretch.counts)
        return [float(blocks) for blocks in read]

    def weights_at(self, step: int) -> list[float]:
        """The weights at a step, of stores that may still be read."""
        if self.weights is None:
            return [float(size) for size in self.sizes]
        return [_weight_at(weight, step) for weight in self.weights]

    def changes_until(self, step: int) -> list[int]:
        """The steps from which other weights apply, up to the one before ``step``."""
        return [change for change in self._changes if change < step]

    def restarted(self, step: int, other: Mixture) -> Mixture:
        """Another mixture, of the same stores and perhaps further ones, that follows this one: its
        order begins at a step, and what was read by then counts."""
        read = tuple(int(np.ceil(blocks)) for blocks in self.read_at(step))
        self._extend(step)
        # Those of this mixture beyond the step were never used, but their number may have been.
        number = self.start.number + sum(stretch.first <= step for stretch in self._stretches)
        return replace(other, start=Start(step, number, read))

    def _extend(self, step: int) -> None:
        """Compute the stretches up to that of a step."""
        while not self._ended and (not self._stretches or self._stretches[-1].end <= step):
            first = self._stretches[-1].end if self._stretches else self.start.step
            stretch = self._next(first)
            if stretch is None:
                self._ended = True
            else:
                self._read += np.array(stretch.counts)
                self._stretches.append(stretch)

    def _next(self, first: int) -> Stretch | None:
        number = self.start.number + len(self._stretches)
        later = [change for change in self._changes if change > first]
        longest = min(self.steps_per_epoch, later[0] - first if later else self.steps_per_epoch)
        while True:
            weights = np.where(self._spent, 0.0, self.weights_at(first))
            if not weights.any():
                return None
            shares = weights / weights.sum()
            with np.errstate(divide="ignore", invalid="ignore"):
                left = np.maximum(self._most - self._read, 0)
                room = np.where(shares > 0, left / (shares * self.global_batch_size), np.inf)
            steps = int(min(longest, room.min()))
            while steps and (self._counts(weights, steps) > left).any():
                steps -= 1
            if steps:
                return Stretch(number, first, steps, tuple(map(int, self._counts(weights, steps))))
            # Less than its part of one step is left of it.
            self._spent[int(room.argmin())] = True

    def _counts(self, weights: np.ndarray, steps: int) -> np.ndarray:
        """Blocks of each store in a stretch, as Streaming computes them for a whole epoch."""
        size = steps * self.global_batch_size
        if self.weights is None:
            # Exactly: rounding would take a block of one store twice and none of another.
            sizes = [int(weight) for weight in weights]
            counts = np.array([size * one // sum(sizes) for one in sizes], np.int64)
        else:
            counts = (size * (weights / weights.sum())).astype(np.int64)
        rng = np.random.default_rng(self.seed)
        taking = np.flatnonzero(weights)
        counts[rng.choice(taking, size - counts.sum(), False)] += 1
        return counts

    def identity(self) -> dict[str, Any]:
        """What fixes the order, besides the stores, as plain values."""
        weights = self.weights
        values: dict[str, Any] = {
            "weights": None if weights is None else [_plain(weight) for weight in weights],
            "global_batch_size": self.global_batch_size,
            "seed": self.seed,
        }
        # Absent in the states of earlier versions.
        if self.passes:
            values["order"] = "passes"
        if any(most is not None for most in self.most_epochs):
            values["max_epochs"] = list(self.most_epochs)
        if self.start != Start():
            values["start"] = {**asdict(self.start), "read": list(self.start.read)}
        return values

    @classmethod
    def of_state(cls, state: dict[str, Any], sizes: Sequence[int]) -> Mixture:
        """The mixture whose `identity` a state holds, of stores of these sizes."""
        weights, start = state.get("weights"), state.get("start")
        return cls(
            tuple(sizes),
            None if weights is None else tuple(map(_from_plain, weights)),
            tuple(state.get("max_epochs") or [None] * len(sizes)),
            state["global_batch_size"],
            state["seed"],
            Start()
            if start is None
            else Start(start["step"], start["number"], tuple(start["read"])),
            state.get("order") == "passes",
        )


def _by_pass(first: int, count: int, size: int) -> list[tuple[int, int, int]]:
    """Where ``count`` blocks that follow the first ``first`` ones lie: number of each pass, and the
    positions in it from which and up to which they are."""
    end = first + count
    return [
        (number, max(first - number * size, 0), min(end - number * size, size))
        for number in range(first // size, -(-end // size))
        if count
    ]


def _steps(weight: Weight) -> list[int]:
    return [0] if isinstance(weight, int | float) else [step for step, _ in weight]


def _weight_at(weight: Weight, step: int) -> float:
    if isinstance(weight, int | float):
        return float(weight)
    return next((float(value) for first, value in reversed(weight) if first <= step), 0.0)


def _plain(weight: Weight) -> Any:
    return weight if isinstance(weight, int | float) else [list(pair) for pair in weight]


def _from_plain(weight: Any) -> Weight:
    return weight if isinstance(weight, int | float) else [(step, value) for step, value in weight]
