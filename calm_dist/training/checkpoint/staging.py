"""Copies of a state, which a forked writer reads while the training changes the state itself."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

# From <bits/mman-linux.h>; Python's mmap module applies them only to its own mappings.
_MADV_DONTFORK, _MADV_DOFORK, _MADV_POPULATE_WRITE = 10, 11, 23
# Sharing less than this with a child costs less than the call that prevents it.
_SMALLEST_BYTES = 64 * 1024
_ALIGNMENT = 64
# Bytes touched at once; other threads that map memory must wait for each such call.
_PIECE_BYTES = 4 * 1024**2


class Staging:
    """Host memory for copies of tensors, one set at a time; reused for the next set.

    If there is no memory for them, nothing is copied: a forked child then sees the original tensors
    unchanged, because the kernel copies every page that this process changes.

    Memory is slow only at the first touch (0.7 to 3 s/GB, compared with 0.1 s/GB for the copy),
    which `touch` does in advance. It is shared, so that a fork need not copy its page table.
    """

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._used = 0

    def reserve(self, bytes_needed: int, tensors: int) -> None:
        """Discard all copies, and make room for ``bytes_needed`` bytes in ``tensors`` tensors."""
        bytes_needed += tensors * _ALIGNMENT
        if self._memory is None or len(self._memory) < bytes_needed:
            try:
                # Anonymous and shared with children; copies keep an older mapping alive.
                self._memory = mmap.mmap(-1, max(bytes_needed, 1))
            except OSError:
                self._memory = None
        self._used = 0

    def touch(self) -> None:
        """Make the kernel allocate the memory, in a thread."""
        if self._memory is not None and sys.platform.startswith("linux"):
            threading.Thread(
                target=_touch, args=(self._memory,), name="touch memory", daemon=True
            ).start()

    @property
    def has_copies(self) -> bool:
        """Whether children need only the copies."""
        return self._memory is not None

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a host tensor, with no larger storage; the tensor itself if there is no
        memory."""
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
    """Children forked in this context do not get the host memory of these tensors and must not use
    it.

    Otherwise, until the child ends, the kernel would copy every page of them that this process
    writes to: one to two seconds per gigabyte, added to the next step of the training.
    """
    # On other systems the numbers have other meanings.
    if not sys.platform.startswith("linux"):
        yield
        return
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu")
    # Several tensors may share a storage.
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
        # Kernels before 5.14 do not support it; then the first copies touch the memory.
        if not _advise(start + offset, min(_PIECE_BYTES, size - offset), _MADV_POPULATE_WRITE):
            return


def _whole_pages(start: int, size: int) -> tuple[int, int]:
    """Address and length of the memory pages that lie completely inside a range."""
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    return first, (start + size) // mmap.PAGESIZE * mmap.PAGESIZE - first


def _advise(start: int, length: int, advice: int) -> bool:
    """Whether the kernel accepted the advice; without it everything is slower, but correct."""
    address = ctypes.c_void_p(start)
    return _libc.madvise(address, ctypes.c_size_t(length), ctypes.c_int(advice)) == 0


_libc = ctypes.CDLL(None)
