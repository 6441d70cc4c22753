"""The package's logger, ``calm_dist``, and how the tools show its records.

A program that uses the package as a library configures `logging` as it likes; the tools call
`show_on_console`.
"""

from __future__ import annotations

import logging
import sys

from calm_dist.redact import redact

NOTE = 25
"""Level between INFO (the normal course of a run) and WARNING: what a user may not expect."""

logging.addLevelName(NOTE, "NOTE")


class _Console(logging.Handler):
    """Prints INFO on stdout and higher levels on stderr, as plain lines with secrets masked."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        # Looked up each time, because code that captures output replaces the streams. An error,
        # such as a closed pipe, goes to the caller, as with `print`.
        stream = sys.stderr if record.levelno > logging.INFO else sys.stdout
        print(f"{prefix}{redact(record.getMessage())}", file=stream, flush=True)


def show_on_console() -> None:
    """Print the package's log records; may be called repeatedly."""
    logger = logging.getLogger("calm_dist")
    if any(isinstance(handler, _Console) for handler in logger.handlers):
        return
    logger.addHandler(_Console())
    logger.setLevel(logging.INFO)
    # Libraries add handlers to the root logger, which would print every line again.
    logger.propagate = False
