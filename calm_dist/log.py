"""The package's logger, ``calm_dist``, and how the tools show its records.

A program that uses the package as a library configures `logging` as it likes; the tools call
`show_on_console`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from typing import Any, TextIO

from calm_dist.redact import redact

NOTE = 25
"""Level between INFO (the normal course of a run) and WARNING: what a user may not expect."""

logging.addLevelName(NOTE, "NOTE")


class _Console(logging.Handler):
    """Prints INFO on stdout and higher levels on stderr, as plain lines with secrets masked."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        # Looked up each time, because code that captures output replaces the streams. An error,
        # such as a closed pipe, goes to the caller, as with `print`; see `outlive_console`.
        stream = sys.stderr if record.levelno > logging.INFO else sys.stdout
        print(f"{prefix}{redact(record.getMessage())}", file=stream, flush=True)


class _Forgiving(io.FileIO):
    """An open file; what cannot be written to it is dropped without an error."""

    def write(self, data: Any) -> int:
        written = None
        with contextlib.suppress(OSError):
            # None stands for a full pipe that is not to be waited for.
            written = super().write(data)
        return len(data) if written is None else written


_outlives = False


def outlive_console() -> None:
    """From now on, drop what stdout and stderr refuse, whoever prints it.

    For trainings: neither a ``tee`` that has gone nor a full disk with the log may end one or
    change its exit code, nor a closed terminal whose SIGHUP does not reach it (``setsid``).
    Streams that lead elsewhere, as in tests, stay.
    """
    global _outlives
    _outlives = True
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            # The process was started with the descriptor closed.
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and _leads_to(stream, number):
            setattr(sys, name, forgiving(number, stream.encoding, stream.errors))


def outlives_console() -> bool:
    """Whether `outlive_console` was called."""
    return _outlives


def forgiving(
    file: int | str, encoding: str = "utf-8", errors: str | None = "backslashreplace"
) -> TextIO:
    """A text stream to a path or a descriptor, which it does not close. It writes whole lines, and
    drops those that cannot be written.

    Raises:
        OSError: the path cannot be opened.
    """
    buffer = io.BufferedWriter(_Forgiving(file, "w", closefd=isinstance(file, str)))
    return io.TextIOWrapper(buffer, encoding=encoding, errors=errors, line_buffering=True)


def _leads_to(stream: TextIO, number: int) -> bool:
    with contextlib.suppress(OSError):
        stream.flush()
    try:
        return stream.fileno() == number
    except io.UnsupportedOperation:
        return False


def show_on_console() -> None:
    """Print the package's log records; may be called repeatedly."""
    logger = logging.getLogger("calm_dist")
    if any(isinstance(handler, _Console) for handler in logger.handlers):
        return
    logger.addHandler(_Console())
    logger.setLevel(logging.INFO)
    # Libraries add handlers to the root logger, which would print every line again.
    logger.propagate = False
