"""Copies of a state that a forked writer reads while the training changes the state itself."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

# Of <bits/mman-linux.h>; Python's mmap module has them, but only for its own mappings.
_MADV_DONTFORK, _MADV_DOFORK, _MADV_POPULATE_WRITE = 10, 11, 23
# Sharing less than this with a child costs less than the call that prevents it.
_SMALLEST_BYTES = 64 * 1024
_ALIGNMENT = 64
# Touched at once; what maps other memory of the process waits that long.
_PIECE_BYTES = 4 * 1024**2


class Staging:
    """Host memory that copies are made into, one set at a time; kept for the next set.

    Where there is no memory for them, nothing is copied: a forked child then sees the tensors as
    they were, for which the kernel copies what this process changes.

    Memory is slow only when it is touched first (0.7 to 3 s/GB, against 0.1 s/GB for the copy),
    which `touch` does beforehand, and shared, so that a fork need not copy its page table.
    """

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._used = 0

    def reserve(self, bytes_needed: int, tensors: int) -> None:
        """Forget all copies, and make room for as many bytes in as many tensors."""
        bytes_needed += tensors * _ALIGNMENT
        if self._memory is None or len(self._memory) < bytes_needed:
            try:
                # Anonymous and shared with children; bytes of an older one live on in its copies.
                self._memory = mmap.mmap(-1, max(bytes_needed, 1))
            except OSError:
                self._memory = None
        self._used = 0

    def touch(self) -> None:
        """Have the kernel find the memory, in a thread."""
        if self._memory is not None and sys.platform.startswith("linux"):
            threading.Thread(
                target=_touch, args=(self._memory,), name="touch memory", daemon=True
            ).start()

    @property
    def has_copies(self) -> bool:
        """Whether children need the copies alone."""
        return self._memory is not None

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a host tensor, with a storage that is no larger; or itself."""
        if self._memory is None:
            return tensor.detach()
        if tensor.numel() == 0:
            return tensor.detach().clone()
        flat = torch.frombuffer(
            self._memory, dtype=tensor.dtype, count=tensor.numel(), offset=self._used
        )
        self._used += -(-flat.nbytes // _ALIGNMENT) * _ALIGNMENT
        return flat.view(tensor.shape).copy_(tensor.detach())


@contextmanager
def not_forked(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Children forked inside do not have the host memory of these tensors, and must not use it.

    Otherwise the kernel would copy every page of them that this process writes to, until the child
    ends: one to two seconds per gigabyte, which the next step of the training would spend.
    """
    # Other systems give other meanings to the numbers.
    if not sys.platform.startswith("linux"):
        yield
        return
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu")
    # Several tensors can be views of one.
    sizes = {s.data_ptr(): s.nbytes() for s in storages if s.nbytes() >= _SMALLEST_BYTES}
    ranges = [_whole_pages(start, size) for start, size in sizes.items()]
    for start, length in ranges:
        _advise(start, length, _MADV_DONTFORK)
    try:
        yield
    finally:
        for start, length in ranges:
            _advise(start, length, _MADV_DOFORK)


def _touch(memory: mmap.mmap) -> None:
    size = len(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for offset in range(0, size, _PIECE_BYTES):
        # A kernel before 5.14 does not know it; then the first copies do.
        if not _advise(start + offset, min(_PIECE_BYTES, size - offset), _MADV_POPULATE_WRITE):
            return


def _whole_pages(start: int, size: int) -> tuple[int, int]:
    """Address and length of the memory pages that lie in a range to their ends."""
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    return first, (start + size) // mmap.PAGESIZE * mmap.PAGESIZE - first


def _advise(start: int, length: int, advice: int) -> bool:
    """Whether the kernel took it; without it all is slower and no less right."""
    address = ctypes.c_void_p(start)
    return _libc.madvise(address, ctypes.c_size_t(length), ctypes.c_int(advice)) == 0


_libc = ctypes.CDLL(None)
