"""Reader processes: the shared memory that their batches need, and detection of their death.

Private parts of torch's DataLoader (2.13) are used only here.
"""

from __future__ import annotations

import errno
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info

from calm_dist.data.download import busy
from calm_dist.data.store import StoreMeta
from calm_dist.errors import DataError, UnreachableError

SHARED_MEMORY = Path("/dev/shm")
PREFETCHED = 2
"""Batches that each reader process prefetches; torch's default."""
_REMEDY = (
    "enlarge it (docker run --shm-size=…, or mount -o remount,size=… /dev/shm), use fewer "
    "data.num_workers, or data.num_workers=0, which reads in the training process"
)
# A socket's path has at most 107 bytes; multiprocessing appends pymp-12345678/listener-12345678.
_LONGEST_TEMPORARY = 107 - len("/pymp-12345678/listener-12345678")
_POLL_SECONDS = 2.0
_TIMED_OUT = "timed out after"


def batch_bytes(meta: StoreMeta, batch_size: int) -> int:
    """Bytes of one batch as readers deliver it: int64 tokens, fp32 latents."""
    latents = 2 * 4 * meta.num_patches * meta.latent_size if meta.latent_size else 0
    return batch_size * (8 + 8 * meta.block_size + latents)


def check_shared_memory(
    metas: Sequence[StoreMeta], batch_size: int, num_workers: int, num_ranks: int
) -> None:
    """Check that the node's shared memory has room for the prefetched batches of its readers and
    for the order of an epoch, which Streaming puts there.

    Args:
        metas: descriptions of the stores, whose blocks have the same size.
        batch_size: blocks per batch of a rank.
        num_workers: reader processes per rank.
        num_ranks: ranks on this node.

    Raises:
        DataError: there is not enough room.
    """
    batches = PREFETCHED * num_workers * num_ranks
    needed = 8 * sum(meta.num_blocks for meta in metas)
    if metas:
        needed += batches * batch_bytes(metas[0], batch_size)
    if (free := _free_bytes()) is None or free >= needed:
        return
    raise DataError(
        f"data.num_workers={num_workers}: the {batches} batches that readers prefetch on this "
        f"node and the order of an epoch need {needed / 1e6:,.1f} MB in {SHARED_MEMORY}, which "
        f"has {free / 1e6:,.1f} MB free; {_REMEDY}"
    )


def check_socket_path() -> None:
    """Check that torch can make its socket for batches of reader processes, which lies in TMPDIR.

    Raises:
        DataError: the path of TMPDIR is too long for it; readers would fail while training waits.
    """
    directory = tempfile.gettempdir()
    if (length := len(os.fsencode(directory))) > _LONGEST_TEMPORARY:
        raise DataError(
            f"TMPDIR={directory}: has {length} characters; sockets of reader processes allow "
            f"{_LONGEST_TEMPORARY}; set a shorter TMPDIR, or data.num_workers=0"
        )


def _free_bytes() -> int | None:
    try:
        room = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return room.f_bavail * room.f_frsize


def hand_over(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Move a batch of a reader process into shared memory, for the training process.

    Otherwise torch does so in a thread of the reader, where a failure silently loses the batch, or
    the kernel kills the reader (SIGBUS).

    Raises:
        DataError: there is no room.
    """
    if get_worker_info() is None:
        return batch
    needed = sum(tensor.nbytes for tensor in batch.values())
    free = _free_bytes()
    try:
        if free is not None and free < needed:
            raise RuntimeError(f"{free / 1e6:,.1f} MB are free")
        return {name: tensor.share_memory_() for name, tensor in batch.items()}
    except RuntimeError as error:
        raise DataError(
            f"{SHARED_MEMORY}: no room for a batch of {needed / 1e6:,.1f} MB ({error}); {_REMEDY}"
        ) from error


def poll_seconds(timeout_seconds: float) -> float:
    """Timeout of the DataLoader: how often it checks whether its processes are alive."""
    return min(_POLL_SECONDS, timeout_seconds)


def batches_of(loader: DataLoader, timeout_seconds: float) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of a loader; the death of a reader process is noticed within seconds.

    Args:
        loader: with ``timeout=poll_seconds(…)`` if it has reader processes.
        timeout_seconds: longest time for a batch while no download is under way.

    Raises:
        UnreachableError: a reader process was killed, for example by the system when memory is
            short.
        DataError: a reader process died for lack of shared memory, or timed out.
    """
    iterator = _iterator(loader)
    while True:
        waiting_since = time.monotonic()
        while True:
            try:
                batch = next(iterator)
                break
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                _check_readers(iterator, error)
                if _TIMED_OUT not in str(error):
                    raise
                if busy.until() > time.monotonic():
                    waiting_since = time.monotonic()
                if time.monotonic() - waiting_since >= timeout_seconds:
                    raise DataError(
                        f"data store: a reader process gave nothing in {timeout_seconds:.0f} s; "
                        "data.num_workers=0 reads in the training process"
                    ) from error
        yield batch


def end_readers(loader: DataLoader) -> None:
    """End the reader processes of a loader, which torch keeps for another epoch; may be called
    again. One that is in a download is waited for 5 seconds, then ended."""
    # Absent in a loader that reads in this process.
    if (iterator := loader._iterator) is not None:
        iterator._shutdown_workers()  # type: ignore[attr-defined]
        loader._iterator = None


def _iterator(loader: DataLoader) -> Any:
    """torch's iterator without its SIGCHLD handler, which interrupts the main thread anywhere with
    an exception when a reader dies."""
    if threading.current_thread() is not threading.main_thread():
        return _start(loader)
    before = signal.getsignal(signal.SIGCHLD)
    try:
        return _start(loader)
    finally:
        signal.signal(signal.SIGCHLD, before)


def _start(loader: DataLoader) -> Any:
    try:
        return iter(loader)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DataError(
            f"{SHARED_MEMORY}: no room for the queues of reader processes ({error.strerror}); "
            f"{_REMEDY}"
        ) from error


def _check_readers(iterator: Any, error: Exception) -> None:
    """Raise an error if a reader process is dead."""
    for worker in getattr(iterator, "_workers", ()):
        if not isinstance(error, RuntimeError):
            # Its connection may break shortly before its exit code is known.
            worker.join(0.5)
        if worker.exitcode in (None, 0):
            continue
        how = f"code {worker.exitcode}"
        if worker.exitcode < 0:
            how = signal.Signals(-worker.exitcode).name
        said = f"data store: a reader process died (process {worker.pid}, {how})"
        if worker.exitcode == -signal.SIGBUS:
            raise DataError(f"{said}: {SHARED_MEMORY} is full; {_REMEDY}") from error
        raise UnreachableError(
            f"{said}; the system may have killed it for lack of memory: use fewer "
            "data.num_workers, or 0, which reads in the training process; start the same command "
            "again to continue"
        ) from error
