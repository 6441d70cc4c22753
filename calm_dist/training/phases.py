"""The current phase of a rank, so that messages about a hanging rank can name step and phase."""

from __future__ import annotations

import time

READING = ("look at the run directory", "open the data", "data")


class Phases:
    """The current phase of this rank's main thread, read by other threads.

    Attributes:
        step: training step of the phase, counted from 0; None before training.
        name: name of the phase: ``data``, ``forward and backward``, ``optimizer``, ``checkpoint``…
        since: `time.monotonic` of the last sign of progress.
        entered: number of phases entered so far. All ranks enter the same phases in the same order.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self.name = "start"
        self.since = time.monotonic()
        self.entered = 0

    @property
    def is_reading(self) -> bool:
        """Whether the phase may wait for a download."""
        return self.name in READING

    def enter(self, name: str, step: int | None = None) -> None:
        """Begin a new phase."""
        self.name, self.step = name, step
        self.entered += 1
        self.progress()

    def progress(self) -> None:
        """Record progress within a phase of several parts, such as micro-batches."""
        self.since = time.monotonic()
