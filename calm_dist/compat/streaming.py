"""The parts of mosaicml-streaming 0.13.0 that this package uses, without unneeded imports.

Its package imports `vision`, which needs torchvision (the package index's build is for CUDA and
does not load with CPU torch), and `text`, `multimodal` and its own data loader, which import
transformers: half a second in every process. These modules are hidden during the import, and load
on first use afterwards, for all code in this process.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.shared_memory import SharedMemory as BuiltinSharedMemory
from types import ModuleType
from typing import Any

from calm_dist.errors import PeerLostError

_PACKAGES = ("streaming.vision", "streaming.text", "streaming.multimodal")
_LOADER = "streaming.base.dataloader"


@contextmanager
def _hidden() -> Iterator[None]:
    """While active, an import of `streaming` gets empty modules in place of the heavy ones."""
    absent = [name for name in (*_PACKAGES, _LOADER) if name not in sys.modules]
    for name in absent:
        sys.modules[name] = ModuleType(name)
    if _LOADER in absent:
        sys.modules[_LOADER].StreamingDataLoader = None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def _load_later(module: ModuleType, attributes: dict[str, str]) -> None:
    """Make attributes of a package that come from hidden modules load on first use."""
    for name in attributes:
        vars(module).pop(name, None)

    def load(name: str) -> Any:
        if name not in attributes:
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        source = importlib.import_module(attributes[name])
        value = source if source.__name__.endswith(f".{name}") else getattr(source, name)
        setattr(module, name, value)
        return value

    module.__getattr__ = load  # type: ignore[method-assign]


if "streaming" not in sys.modules:
    with _hidden():
        import streaming
        import streaming.base
    _load_later(
        streaming,
        {
            **{name.rpartition(".")[2]: name for name in _PACKAGES},
            "StreamingDataLoader": _LOADER,
        },
    )
    _load_later(streaming.base, {"dataloader": _LOADER, "StreamingDataLoader": _LOADER})

# Names with underscores are private to Streaming.
import streaming.base.dataset as dataset_module  # noqa: E402
import streaming.base.shared.memory as memory_module  # noqa: E402
from streaming.base import LocalDataset, MDSWriter, Stream, StreamingDataset  # noqa: E402
from streaming.base.constant import (  # noqa: E402
    BARRIER_FILELOCK,
    CACHE_FILELOCK,
    LOCALS,
    SHM_TO_CLEAN,
)
from streaming.base.dataset import _ShardState as ShardState  # noqa: E402
from streaming.base.format import Reader  # noqa: E402
from streaming.base.shared import SharedArray, SharedMemory, SharedScalar  # noqa: E402
from streaming.base.shared import _get_path as shared_path  # noqa: E402
from streaming.base.storage import CloudDownloader, CloudUploader, S3Downloader  # noqa: E402
from streaming.base.world import World  # noqa: E402

_LONGEST_WAIT = 60.0
"""Seconds to wait until the creating process has set the size of the shared memory."""

_LONGEST_PAUSE = 0.05
"""Seconds until a thread that reads ahead looks again whether it may, at the latest."""


class _Progress:
    """Of the reader in the main thread; it wakes the threads that read ahead."""

    moved = threading.Condition()

    @classmethod
    def has_moved(cls) -> None:
        with cls.moved:
            cls.moved.notify_all()

    @classmethod
    def pause(cls, seconds: float) -> None:
        """What the dataset does in place of `sleep`.

        Its two threads would each check 140 times a second whether the reader has caught up, which
        takes up to 14% of the CPU time of small trainings on a busy machine.
        """
        if threading.current_thread() is threading.main_thread():
            time.sleep(seconds)
            return
        with cls.moved:
            cls.moved.wait(_LONGEST_PAUSE)

    @classmethod
    def after_fork(cls) -> None:
        # A thread that is not in the child may hold it.
        cls.moved = threading.Condition()


dataset_module.sleep = _Progress.pause  # type: ignore[assignment]
os.register_at_fork(after_in_child=_Progress.after_fork)
reader_has_moved = _Progress.has_moved


class _PatientSharedMemory(BuiltinSharedMemory):
    """Shared memory that can be attached to while another process is creating it.

    After its creation and before its size is set, attaching fails with "cannot mmap an empty file".
    Streaming waits only 7 ms, which is not always enough on a busy node.

    Raises:
        PeerLostError: the memory is gone, because the process that had created it has ended.
    """

    def __init__(self, name: str | None = None, create: bool = False, size: int = 0) -> None:
        deadline = time.monotonic() + _LONGEST_WAIT
        while True:
            try:
                super().__init__(name, create, size)
                return
            except FileNotFoundError as error:
                raise PeerLostError(
                    f"the shared memory {name} is gone: the process of this node that had created "
                    "it has ended"
                ) from error
            except ValueError:
                if create or time.monotonic() > deadline:
                    raise
                self.close()
                time.sleep(0.001)


@contextmanager
def patient_attaching() -> Iterator[None]:
    """While active, Streaming attaches to shared memory with `_PatientSharedMemory`."""
    original = memory_module.BuiltinSharedMemory
    memory_module.BuiltinSharedMemory = _PatientSharedMemory  # type: ignore[misc]
    try:
        yield
    finally:
        memory_module.BuiltinSharedMemory = original  # type: ignore[misc]


__all__ = [
    "BARRIER_FILELOCK",
    "CACHE_FILELOCK",
    "LOCALS",
    "SHM_TO_CLEAN",
    "CloudDownloader",
    "CloudUploader",
    "LocalDataset",
    "MDSWriter",
    "Reader",
    "S3Downloader",
    "ShardState",
    "SharedArray",
    "SharedMemory",
    "SharedScalar",
    "Stream",
    "StreamingDataset",
    "World",
    "dataset_module",
    "memory_module",
    "patient_attaching",
    "reader_has_moved",
    "shared_path",
]
