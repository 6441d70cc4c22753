"""External requests to stop: the run writes a checkpoint and ends with its own exit code.

Schedulers send SIGTERM when they withdraw a job's machines and, on request, SIGUSR1 or SIGUSR2
some time before.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Records whether one of `STOP_SIGNALS` was received. The trainers check after each step; once
    any rank was asked to stop, all ranks stop after the same step."""

    def __init__(self) -> None:
        self.received: str | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Record the signals inside the context instead of dying of them; main thread only."""
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
        """The message of a run that stops after ``step``."""
        return (
            f"stopped after step {step} ({self.received or 'asked by another rank'}), checkpoint "
            "written; start the same command again to continue"
        )

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
