"""What the package says while it works: the logger ``calm_dist``, and how the tools show it.

A program that uses the package as a library configures `logging` as it likes; the tools call
`show_on_console`.
"""

from __future__ import annotations

import logging
import sys

from calm_dist.redact import redact

NOTE = 25
"""Level between INFO, a run's own account, and WARNING: what a user may not expect."""

logging.addLevelName(NOTE, "NOTE")


class _Console(logging.Handler):
    """INFO on stdout, all above on stderr, as plain lines; secrets are masked."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        # Looked up each time: whoever captures the output replaces them. An error, such as that of
        # a closed pipe, is the caller's, as it is that of `print`.
        stream = sys.stderr if record.levelno > logging.INFO else sys.stdout
        print(f"{prefix}{redact(record.getMessage())}", file=stream, flush=True)


def show_on_console() -> None:
    """Print what the package logs; may be called again."""
    logger = logging.getLogger("calm_dist")
    if any(isinstance(handler, _Console) for handler in logger.handlers):
        return
    logger.addHandler(_Console())
    logger.setLevel(logging.INFO)
    # Libraries add handlers to the root, which would print every line once more.
    logger.propagate = False
