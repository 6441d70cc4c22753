"""Who is at work in a run directory, and how its last start ended; needs no torch."""

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
"""Bytes of it."""
ENDED = "ended"
"""Key of environment.json, absent while a start is at work and where it was killed."""

FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"

# Whoever only looks whether a run is at work (`is_held`) holds its lock for an instant.
_TRIES, _BETWEEN_TRIES = 5, 0.04


def acquire_lock(run_dir: Path) -> int:
    """Hold the run directory; the kernel lets go of it however this process ends.

    Where the file system has no `flock`, by a `Lease`, which the next start sees to be stale.

    Returns:
        The descriptor that holds it while it is open, for `release_lock`.

    Raises:
        LaunchError: another run is at work in the directory.
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
            raise _is_at_work(run_dir, holder) from error
        except OSError as error:
            if error.errno not in NO_FLOCK:
                os.close(descriptor)
                raise
            try:
                _leases[descriptor] = Lease(run_dir)
            except HeldError as held:
                os.close(descriptor)
                raise _is_at_work(run_dir, str(held)) from held
            break
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())
    _held[descriptor] = _file_of(descriptor)
    return descriptor


def _is_at_work(run_dir: Path, holder: str) -> LaunchError:
    return LaunchError(
        f"run.dir: another run is at work in {run_dir} ({holder}); wait for it or end it, "
        "or use another run.dir"
    )


def release_lock(descriptor: int) -> None:
    """Let go of the run directory that `acquire_lock` holds."""
    _held.pop(descriptor, None)
    if (lease := _leases.pop(descriptor, None)) is not None:
        lease.release()
    os.close(descriptor)


def is_held(run_dir: Path) -> bool:
    """Whether a run is at work in the directory.

    Raises:
        OSError: it cannot be looked at.
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


# Descriptors of the run directories that this process holds, and the files that they are of.
_held: dict[int, tuple[int, int]] = {}
_leases: dict[int, Lease] = {}


def _release_in_child() -> None:
    """A child that outlives its rank must not keep the run directory from the restart."""
    for descriptor, file in _held.items():
        with contextlib.suppress(OSError):
            if _file_of(descriptor) == file:
                os.close(descriptor)
    _held.clear()
    # Its file is the parent's.
    _leases.clear()


os.register_at_fork(after_in_child=_release_in_child)


def _file_of(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def write_environment(run_dir: Path, environment: dict[str, Any]) -> None:
    """Write ``environment.json``: where and how a start came about."""
    text = json.dumps(environment, indent=2, ensure_ascii=False) + "\n"
    replace_text(run_dir / ENVIRONMENT_FILE, text)


@contextlib.contextmanager
def end_recorded(run_dir: Path, began: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Write into ``environment.json`` how the block ended: ``ended: {how, time, reason}``.

    Args:
        began: whether its start was recorded; otherwise the file tells of an earlier one.
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
        # A full disk must not hide why the run ended; what is there may be damaged.
        with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
            if began():
                environment = json.loads((run_dir / ENVIRONMENT_FILE).read_bytes())
                at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
                ended = {"how": how, "time": at, "reason": reason}
                write_environment(run_dir, {**environment, ENDED: ended})
