"""Errors that a user can mend.

Every tool ends with exit code 2 and the message of such an error, without a traceback. A message
names the field or file, the value found and the remedy. `shown` and `listed` keep it short, however
large what is found may be.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from typing import Any

LONGEST_MESSAGE = 8000
"""Characters of a message that are printed."""
_LONGEST_VALUE = 200
_MOST_NAMES = 10

EXIT_BAD_INPUT = 2
EXIT_PEER_LOST = 3
EXIT_DIVERGED = 4
EXIT_HUNG = 5
EXIT_UNREACHABLE = 6
# EX_TEMPFAIL of sysexits.h: not done, try again.
EXIT_STOPPED = 75


class UserError(ValueError):
    """A mistake in what the user gave: a recipe, a file, a command line, a launch."""


class RecipeError(UserError):
    """A recipe field is unknown, of the wrong type, or impossible together with another."""


class DataError(UserError):
    """A corpus, tokenizer or latent store is missing, damaged or does not fit."""


class UnreachableError(DataError):
    """Data could not be read for a reason that may pass: an object store did not answer for longer
    than downloads are tried again, or a reader process was killed.

    The only `UserError` that may be gone when the same command is started again: its exit code is
    one that schedulers act on.
    """


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or belongs to another model."""


class LaunchError(UserError):
    """The processes that were launched do not form the world that the recipe needs."""


class PeerLostError(RuntimeError):
    """Another process of the run died or stopped answering; the message names it."""


class HungError(RuntimeError):
    """A rank made no progress for too long; the message, which one rank prints, names it."""


class TrainingDivergedError(RuntimeError):
    """Loss or gradients stayed non-finite; going on would only waste the machines."""


class StoppedError(RuntimeError):
    """A signal asked the run to stop; it wrote a checkpoint and can go on."""


def is_lost_connection(error: Exception) -> bool:
    """Whether a collective of torch failed, as it does when another process died.

    Other errors of a call that reads and communicates are about what it read.
    """
    # gloo has no type of its own; and torch is not needed for errors.
    types = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in types or "gloo/transport" in str(error)


def plain_failure(error: DataError) -> DataError:
    """A `DataError` as ranks can send it to each other: its kind, as for the exit code, and its
    message, without what caused it."""
    return (UnreachableError if isinstance(error, UnreachableError) else DataError)(str(error))


def first_failure(failures: Sequence[DataError | None]) -> tuple[int, DataError] | None:
    """The failure to report of those that ranks have, and its rank: the first that another start
    would meet, too, since it has to be mended; else the first."""
    found = [(rank, error) for rank, error in enumerate(failures) if error is not None]
    return min(found, key=lambda pair: isinstance(pair[1], UnreachableError), default=None)


def shown(value: Any) -> str:
    """A value for a message: its ``repr``, cut where it is long or deeply nested."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = _LONGEST_VALUE
    brief.maxlevel = 3
    try:
        return brief.repr(value)
    except ValueError:
        # Python writes out no number of more than 4300 digits.
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else "a value"


def listed(names: Iterable[Any], limit: int = _MOST_NAMES) -> str:
    """Names for a message, joined by commas: the first ``limit``, and how many more there are."""
    given = [str(name) for name in names]
    words = [name if _is_short(name) else shown(name) for name in given[:limit]]
    more = f" and {len(given) - limit:,} more" if len(given) > limit else ""
    return ", ".join(words) + more


def shortened(message: str) -> str:
    """A message with no more characters than a person reads, and how many were left out."""
    if len(message) <= LONGEST_MESSAGE:
        return message
    return f"{message[:LONGEST_MESSAGE]} … ({len(message) - LONGEST_MESSAGE:,} more characters)"


def _is_short(name: str) -> bool:
    return len(name) <= _LONGEST_VALUE and name.isprintable()
