"""Errors that a user can fix.

Every tool ends with exit code 2 and the message of such an error, without a traceback. A message
names the field or file, the value found and the remedy. `shown` and `listed` keep it short, however
large the value is.
"""

from __future__ import annotations

import errno
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any

LONGEST_MESSAGE = 8000
"""Characters printed of a message."""
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
    """A mistake in the user's input: a recipe, a file, a command line, a launch."""


class RecipeError(UserError):
    """A recipe field is unknown, has the wrong type, or conflicts with another."""


class DataError(UserError):
    """A corpus, tokenizer or latent store is missing, damaged or does not fit."""


class UnreachableError(DataError):
    """Data could not be read for a reason that may pass: an object store did not answer for as
    long as downloads are retried, a mounted file system failed, or a reader process was killed.

    The only `UserError` that may disappear when the same command is started again, hence its own
    exit code, which schedulers act on.
    """


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or belongs to another model."""


class LaunchError(UserError):
    """The launched processes do not form the world that the recipe needs."""


class PeerLostError(RuntimeError):
    """Another process of the run died or stopped answering; the message names it."""


class HungError(RuntimeError):
    """A rank made no progress for too long; one rank prints the message, which names it."""


class TrainingDivergedError(RuntimeError):
    """Loss or gradients stayed non-finite; continuing would only waste the machines."""


class StoppedError(RuntimeError):
    """A signal asked the run to stop; it wrote a checkpoint and can continue from it."""


def is_lost_connection(error: Exception) -> bool:
    """Whether a torch collective failed, as it does when another process died.

    Any other error of a call that reads and communicates is about what it read.
    """
    # gloo has no error type of its own; names of types avoid an import of torch.
    types = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in types or "gloo/transport" in str(error)


_LOST_MOUNT = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ESHUTDOWN,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EREMOTEIO,
}


def is_lost_mount(error: BaseException | None) -> bool:
    """Whether a file could not be used as when a mounted file system (NFS, Lustre, FUSE) loses its
    server, which another start may find again. A broken local disk gives the same error EIO."""
    return isinstance(error, OSError) and error.errno in _LOST_MOUNT


def unreadable(what: Any, error: BaseException | None, message: str) -> DataError:
    """The error for a file that cannot be read: an `UnreachableError` about ``what`` if its mount
    was lost, otherwise a `DataError` with ``message``, which names file, cause and remedy."""
    if not is_lost_mount(error):
        return DataError(message)
    return UnreachableError(
        f"{what}: cannot be read ({getattr(error, 'strerror', None)}); check the file system and "
        "its mount, then start the same command again"
    )


def plain_failure(error: DataError) -> DataError:
    """A `DataError` that ranks can send to each other: the type, which decides the exit code, and
    the message, without the cause."""
    return (UnreachableError if isinstance(error, UnreachableError) else DataError)(str(error))


def first_failure(failures: Sequence[DataError | None]) -> tuple[int, DataError] | None:
    """The failure to report among those of all ranks, with its rank: the first that another start
    would meet too, since it has to be fixed; otherwise the first."""
    found = [(rank, error) for rank, error in enumerate(failures) if error is not None]
    return min(found, key=lambda pair: isinstance(pair[1], UnreachableError), default=None)


def shown(value: Any) -> str:
    """A value for a message: its ``repr``, shortened if it is long or deeply nested."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = _LONGEST_VALUE
    brief.maxlevel = 3
    try:
        return brief.repr(value)
    except ValueError:
        # Python refuses to print numbers of more than 4300 digits.
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else "a value"


def listed(names: Iterable[Any], limit: int = _MOST_NAMES) -> str:
    """Names for a message, joined by commas: the first ``limit`` and the number of the others."""
    given = [str(name) for name in names]
    words = [name if _is_short(name) else shown(name) for name in given[:limit]]
    more = f" and {len(given) - limit:,} more" if len(given) > limit else ""
    return ", ".join(words) + more


def shortened(message: str) -> str:
    """A message cut to `LONGEST_MESSAGE` characters, with the number of those left out."""
    if len(message) <= LONGEST_MESSAGE:
        return message
    return f"{message[:LONGEST_MESSAGE]} … ({len(message) - LONGEST_MESSAGE:,} more characters)"


def _is_short(name: str) -> bool:
    return len(name) <= _LONGEST_VALUE and name.isprintable()
