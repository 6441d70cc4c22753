"""Progress of long jobs: a bar on a terminal, otherwise log lines at growing intervals."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Self, TextIO, TypeVar

from tqdm import tqdm

from calm_dist.log import NOTE, forgiving

_log = logging.getLogger(__name__)

TERMINAL = "CALM_TERMINAL"
"""Environment variable with the path of a terminal: bars go there although stderr goes to a log.
The quickstart sets it."""

_FIRST_LINE = 10.0
"""Seconds until the first log line."""
_LAST_INTERVAL = 600.0
_BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}  {rate_noinv_fmt}  {remaining} left"
_UNBOUNDED_BAR = "{desc} {n_fmt}  {rate_noinv_fmt}"

T = TypeVar("T")


def progress(items: Iterable[T], total: int | None, *, label: str, unit: str) -> Iterator[T]:
    """Yield ``items`` while showing how many of ``total`` are done, the rate and the time left.

    ``total`` is None if it is not known.
    """
    with Meter(total, label=label, unit=unit) as meter:
        for item in items:
            yield item
            meter.advance()


class Meter:
    """The progress of a job: a bar at the bottom of a terminal, or lines in a log.

    Args:
        total: units of the whole job; None if it is not known.
        label: what is being done.
        unit: what is counted, in the plural.
        done: units that an earlier start completed.
        lines: whether to write lines if there is no terminal.
    """

    def __init__(
        self, total: int | None, *, label: str, unit: str, done: int = 0, lines: bool = True
    ) -> None:
        self._total, self._label, self._unit = total, label, unit
        self._first = self._done = done
        self._lines = lines
        self._start = self._shown = time.monotonic()
        self._own_terminal: TextIO | None = None
        self._replaced: tuple[TextIO, TextIO] | None = None
        screen = self._screen()
        self._bar: tqdm[None] | None = None
        if screen is not None:
            # A run that ends with an error must not leave half a line behind either.
            atexit.register(self.close)
            self._bar = tqdm(
                total=total,
                initial=done,
                desc=label,
                unit=f" {unit}",
                file=screen,
                leave=False,
                # Some terminals do not know their width.
                dynamic_ncols=(wide := os.get_terminal_size(screen.fileno()).columns > 0),
                ncols=None if wide else 80,
                bar_format=_UNBOUNDED_BAR if total is None else _BAR,
            )

    def _screen(self) -> TextIO | None:
        """The stream of the bar; None for no bar."""
        if isinstance(sys.stderr, _AboveBars):
            return sys.stderr.screen
        if sys.stderr.isatty():
            screen, self._replaced = sys.stderr, (sys.stdout, sys.stderr)
            sys.stdout = _AboveBars(sys.stdout, screen)
            sys.stderr = _AboveBars(sys.stderr, screen)
            return screen
        path = os.environ.get(TERMINAL)
        if not path:
            return None
        try:
            self._own_terminal = forgiving(path)
        except OSError:
            return None
        return self._own_terminal

    def advance(self, units: int = 1) -> None:
        """Count ``units`` more as done."""
        self._done += units
        if self._bar is not None:
            self._bar.update(units)
        if self._bar is not None or not self._lines:
            return
        now = time.monotonic()
        # A job of hours needs no line every ten seconds.
        interval = min(max(_FIRST_LINE, (now - self._start) / 10), _LAST_INTERVAL)
        if now - self._shown >= interval:
            self._shown = now
            _log.log(NOTE, self._line(now - self._start))

    def _line(self, seconds: float) -> str:
        rate = (self._done - self._first) / seconds
        if self._total is None:
            return f"{self._label}  {self._done} {self._unit}  {rate:.3g} {self._unit}/s"
        share = self._done / max(self._total, 1)
        left = duration((self._total - self._done) / rate)
        return (
            f"{self._label}  {self._done}/{self._total} {self._unit}  {share:.0%}  "
            f"{rate:.3g} {self._unit}/s  {left} left"
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            atexit.unregister(self.close)
        if self._replaced is not None:
            sys.stdout, sys.stderr = self._replaced
            self._replaced = None
        if self._own_terminal is not None:
            self._own_terminal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _AboveBars:
    """stdout or stderr while ``screen`` shows bars: writes whole lines above them."""

    def __init__(self, stream: TextIO, screen: TextIO) -> None:
        self._stream, self.screen = stream, screen
        self._line = ""

    def write(self, text: str) -> int:
        whole, newline, self._line = (self._line + text).rpartition("\n")
        if newline:
            with tqdm.external_write_mode(file=self.screen):
                self._stream.write(whole + newline)
                self._stream.flush()
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def duration(seconds: float) -> str:
    """A time in its two largest units: 42s, 7m05s, 3h20m, 12d4h."""
    whole = max(0, int(seconds))
    minutes, hours = whole // 60, whole // 3600
    if hours >= 48:
        return f"{hours // 24}d{hours % 24}h"
    if hours:
        return f"{hours}h{minutes % 60:02}m"
    return f"{minutes}m{whole % 60:02}s" if minutes else f"{whole}s"
