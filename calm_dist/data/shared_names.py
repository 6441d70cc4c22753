"""Names under which the processes of one run share Streaming's memory on a node.

Streaming 0.13.0 numbers its shared memory and lock files 0, 1, 2, … by what it finds in use. Two
runs that start together take the same number, and leftovers of a killed run block the next one.
Here every run draws a random number of its own and holds a lock file while it lives. The kernel
releases the lock when the process dies in any way, and the next run removes the leftovers of
unlocked numbers.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from calm_dist.compat.streaming import (
    BARRIER_FILELOCK,
    CACHE_FILELOCK,
    LOCALS,
    SHM_TO_CLEAN,
    SharedArray,
    SharedScalar,
    World,
    dataset_module,
    patient_attaching,
    shared_path,
)
from calm_dist.compat.streaming import SharedMemory as StreamingSharedMemory
from calm_dist.errors import DataError, UnreachableError
from calm_dist.files import NO_FLOCK

_OUR_NAMES = ("failed_shard", "hashed", "busy_until")


def scratch_directory() -> Path:
    """This user's directory for files that the processes of a node share."""
    path = Path(tempfile.gettempdir()) / f"calm_dist_{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


class RunNumber:
    """A number that no other run uses, the same on all ranks of this run on a node.

    Every rank must make one. The first rank of each node holds the lock file while it lives and
    removes the run's files at exit; each process removes the shared memory that it created.
    """

    def __init__(self, world: World) -> None:
        drawn = [secrets.randbits(48)]
        if dist.is_initialized():
            dist.broadcast_object_list(drawn, src=0)
        # Several nodes may be simulated on one machine, so each needs its own number.
        self.value: int = drawn[0] + world.node
        if world.is_local_leader:
            remove_leftovers()
            # Never closed: the kernel releases the lock when the process ends.
            _lock(_lock_path(self.value))
            atexit.register(_remove_files, self.value)

    def shared_scalar(self, name: str) -> SharedScalar:
        """An int64, initially 0, that all processes of this run on this node share."""
        assert name in _OUR_NAMES
        with patient_attaching():
            return SharedScalar(np.int64, shared_path(self.value, name))

    def shared_array(self, name: str, size: int) -> SharedArray:
        """An array of ``size`` such numbers."""
        assert name in _OUR_NAMES
        with patient_attaching():
            return SharedArray(size, np.int64, shared_path(self.value, name))

    def tell_failure(self, error: DataError) -> None:
        """Tell all readers on this node why one of them fails; only the first error is kept."""
        path = _failure_path(self.value)
        # If this cannot be written, the others know only that there was a failure.
        with suppress(OSError), path.open("x", encoding="utf-8") as file:
            json.dump([isinstance(error, UnreachableError), str(error)], file)

    def failure(self) -> DataError | None:
        """The error passed to `tell_failure` by any reader of this node, or None."""
        try:
            unreachable, message = json.loads(_failure_path(self.value).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return (UnreachableError if unreachable else DataError)(message)

    @contextmanager
    def used_by_streaming(self) -> Iterator[None]:
        """Make a StreamingDataset constructed in this context use this number."""

        def get_shm_prefix(*_: Any, **__: Any) -> tuple[int, StreamingSharedMemory]:
            name = shared_path(self.value, LOCALS)
            return self.value, StreamingSharedMemory(name=name, size=4)

        original = dataset_module.get_shm_prefix
        dataset_module.get_shm_prefix = get_shm_prefix
        try:
            with patient_attaching():
                yield
        finally:
            dataset_module.get_shm_prefix = original


def remove_leftovers() -> None:
    """Remove shared memory and lock files of dead runs on this node."""
    for path in scratch_directory().glob("run_*.lock"):
        lock = _lock(path, wait=False)
        if lock is not None:
            number = int(path.stem.removeprefix("run_"))
            _remove_segments(number)
            _remove_files(number)
            os.close(lock)


def _lock_path(number: int) -> Path:
    return scratch_directory() / f"run_{number}.lock"


def _failure_path(number: int) -> Path:
    return scratch_directory() / f"run_{number}.failure"


def _lock(path: Path, wait: bool = True) -> int | None:
    """A descriptor that holds the lock on ``path``, or None if another process holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # Another run may have removed the file between the two calls.
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
            # Without locks, dead runs cannot be recognized, so nothing is removed.
            if wait:
                return descriptor
        os.close(descriptor)
        if not wait:
            return None


def _remove_segments(number: int) -> None:
    for name in (*SHM_TO_CLEAN, *_OUR_NAMES):
        try:
            segment = SharedMemory(shared_path(number, name))
        except FileNotFoundError:
            continue
        segment.close()
        segment.unlink()


def _remove_files(number: int) -> None:
    for name in (BARRIER_FILELOCK, CACHE_FILELOCK):
        (Path(tempfile.gettempdir()) / shared_path(number, name)).unlink(missing_ok=True)
    _failure_path(number).unlink(missing_ok=True)
    _lock_path(number).unlink(missing_ok=True)
