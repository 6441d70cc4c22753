"""The lock of a run directory, and the record of how its last start ended; needs no torch."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from calm_dist.errors import LaunchError, StoppedError
from calm_dist.files import NO_FLOCK, replace_text
from calm_dist.redact import redact
from calm_dist.runs.lease import HeldError, Lease, is_leased

LOCK_FILE = ".lock"
ENVIRONMENT_FILE = "environment.json"
LARGEST_ENVIRONMENT = 1 << 20
"""Most bytes of the file."""
ENDED = "ended"
"""Key of environment.json; absent while a run is going on, and if it was killed."""

FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"

# `is_held`, which checks for a running process, holds the lock for an instant: try several times.
_TRIES, _BETWEEN_TRIES = 5, 0.04


def acquire_lock(run_dir: Path) -> int:
    """Lock the run directory; the kernel releases the lock however this process ends.

    If the file system has no `flock`, a `Lease` is used, which the next start recognizes as stale.

    Returns:
        The descriptor that holds the lock while it is open, for `release_lock`.

    Raises:
        LaunchError: another run is using the directory.
    """
    descriptor = os.open(run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    for last in [False] * _TRIES + [True]:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if not last:
                time.sleep(_BETWEEN_TRIES)
                continue
            holder = os.read(descriptor, 100).decode(errors="replace").strip()
            os.close(descriptor)
            raise _in_use(run_dir, holder) from error
        except OSError as error:
            if error.errno not in NO_FLOCK:
                os.close(descriptor)
                raise
            try:
                _leases[descriptor] = Lease(run_dir)
            except HeldError as held:
                os.close(descriptor)
                raise _in_use(run_dir, str(held)) from held
            break
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())
    _held[descriptor] = _file_of(descriptor)
    return descriptor


def _in_use(run_dir: Path, holder: str) -> LaunchError:
    return LaunchError(
        f"run.dir: another run is using {run_dir} ({holder}); wait for it or end it, "
        "or use another run.dir"
    )


def release_lock(descriptor: int) -> None:
    """Release a run directory locked by `acquire_lock`."""
    _held.pop(descriptor, None)
    if (lease := _leases.pop(descriptor, None)) is not None:
        lease.release()
    os.close(descriptor)


def is_held(run_dir: Path) -> bool:
    """Whether a run is using the directory.

    Raises:
        OSError: the lock file cannot be opened.
    """
    try:
        descriptor = os.open(run_dir / LOCK_FILE, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        return is_leased(run_dir)
    finally:
        os.close(descriptor)
    return False


# Descriptors of the run directories locked by this process, and the identities of their files.
_held: dict[int, tuple[int, int]] = {}
_leases: dict[int, Lease] = {}


def _release_in_child() -> None:
    """Drop the locks in a child: if it outlives its rank, it must not block the restart."""
    for descriptor, file in _held.items():
        with contextlib.suppress(OSError):
            if _file_of(descriptor) == file:
                os.close(descriptor)
    _held.clear()
    # The lease file belongs to the parent.
    _leases.clear()


os.register_at_fork(after_in_child=_release_in_child)


def _file_of(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def write_environment(run_dir: Path, environment: dict[str, Any]) -> None:
    """Write ``environment.json``, the record of a start."""
    text = json.dumps(environment, indent=2, ensure_ascii=False) + "\n"
    replace_text(run_dir / ENVIRONMENT_FILE, text)


@contextlib.contextmanager
def end_recorded(run_dir: Path, began: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Record in ``environment.json`` how this context ended: ``ended: {how, time, reason}``.

    Args:
        began: whether this start was recorded; otherwise the file describes an earlier one and is
            left alone.
    """
    how, reason = FINISHED, None
    try:
        yield
    except (StoppedError, KeyboardInterrupt) as stopped:
        how, reason = STOPPED, str(stopped) or "Ctrl-C"
        raise
    except BaseException as error:
        how, reason = FAILED, redact(f"{type(error).__name__}: {error}")[:500]
        raise
    finally:
        # A full disk or a damaged file must not hide why the run ended.
        with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
            if began():
                environment = json.loads((run_dir / ENVIRONMENT_FILE).read_bytes())
                at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
                ended = {"how": how, "time": at, "reason": reason}
                write_environment(run_dir, {**environment, ENDED: ended})
