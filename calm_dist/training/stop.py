"""Requests from outside to stop: the run writes a checkpoint and ends with an exit code of its own.

Schedulers send SIGTERM when they take a job's machines away, and SIGUSR1 or SIGUSR2 some time
before they do, where they are asked to.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Whether one of `STOP_SIGNALS` has come. The trainers ask after each step, and all ranks stop
    after the same one as soon as any rank was asked to."""

    def __init__(self) -> None:
        self.received: str | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note the signals inside the block, in the main thread, instead of dying of them."""
        before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self.received is not None

    def message(self, step: int) -> str:
        """What is said when a run stops after ``step``."""
        return (
            f"stopped after step {step} ({self.received or 'asked by another rank'}), checkpoint "
            "written; start the same command again to go on"
        )

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
