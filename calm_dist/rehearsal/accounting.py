"""What a rehearsal counts: bytes of live tensors, and what a step launches. Needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field, fields

# Multiple of bytes in which torch's caching allocator hands out memory.
ALLOCATION_BYTES = 512


class MemoryLedger:
    """Bytes of live allocations by label, now and at the peak since `restart`."""

    def __init__(self) -> None:
        self._live: dict[Hashable, tuple[int, str]] = {}
        self._by_label: Counter[str] = Counter()
        self.now = 0
        self.peak = 0
        self.at_peak: dict[str, int] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._live

    def add(self, key: Hashable, size: int, label: str) -> None:
        """Count an allocation of ``size`` bytes, rounded up as the allocator does."""
        size = -(-size // ALLOCATION_BYTES) * ALLOCATION_BYTES
        self._live[key] = size, label
        self._by_label[label] += size
        self.now += size
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, dict(self._by_label)

    def remove(self, key: Hashable) -> None:
        """Count a release."""
        size, label = self._live.pop(key)
        self._by_label[label] -= size
        self.now -= size

    def relabel(self, key: Hashable, label: str) -> None:
        """Change the label of an allocation, if it is a live one."""
        if key in self._live:
            size, old = self._live[key]
            self._live[key] = size, label
            self._by_label[old] -= size
            self._by_label[label] += size

    def relabel_all(self, label: str) -> None:
        """Change the label of everything that is live."""
        for key in list(self._live):
            self.relabel(key, label)

    def restart(self) -> None:
        """Forget the peak: the next one is at least what is live now."""
        self.peak, self.at_peak = self.now, dict(self._by_label)


@dataclass(frozen=True)
class KernelOrigin:
    """A part of the model or of the step that launches kernels."""

    name: str
    backward: bool = False


@dataclass(frozen=True)
class Wait:
    """A place at which the host waits for the device."""

    what: str
    where: str
    """``file:line`` of the innermost frame, then of the package's own."""


@dataclass(frozen=True)
class Collective:
    """A kind of communication in a process group."""

    operation: str
    group: str


@dataclass
class EventCounts:
    """What one step, or a part of it, does on a rank."""

    kernels: Counter[KernelOrigin] = field(default_factory=Counter)
    waits: Counter[Wait] = field(default_factory=Counter)
    calls: Counter[Collective] = field(default_factory=Counter)
    bytes: Counter[Collective] = field(default_factory=Counter)

    def combined(self, other: EventCounts, mine: float, theirs: float) -> EventCounts:
        """``mine`` times these counts plus ``theirs`` times the others, without zeros."""
        result = EventCounts()
        for name in (one.name for one in fields(self)):
            ours, others = getattr(self, name), getattr(other, name)
            for key in dict.fromkeys([*ours, *others]):
                value = mine * ours[key] + theirs * others[key]
                if value:
                    getattr(result, name)[key] = value
        return result


@dataclass(frozen=True)
class StepCounts:
    """What a step does: once, and for each of its micro-batches."""

    each: EventCounts
    once: EventCounts

    def step(self, micro_batches: int) -> EventCounts:
        """Counts of a step of that many micro-batches."""
        return self.once.combined(self.each, 1, micro_batches)


def separate(one: EventCounts, size: int, other: EventCounts, other_size: int) -> StepCounts:
    """Separate the work of a step from that of a micro-batch, given two steps of different numbers
    of micro-batches, in which the work grows with their number."""
    difference = other_size - size
    each = other.combined(one, 1 / difference, -1 / difference)
    return StepCounts(each, one.combined(each, 1, -size))
