"""One network device for all gloo groups of a process that tests fork for many short runs.

torch makes a device for every group, and with it a thread that wakes up 100 times a second for as
long as anything refers to the group: 100 idle groups take 8.5% of a core. A run on CPUs has about
20, and those of ended runs remain. Gloo's devices are made to be shared. The package itself does
not share one: a fork inherits the device without its thread, and waits for that thread at the
interpreter's exit. Forks of `warm.py` leave through `os._exit`.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from torch.distributed import ProcessGroupGloo, Store, distributed_c10d

# By process: a fork has no thread for its parent's device.
_devices: dict[int, list[ProcessGroupGloo.Device]] = {}


class _SharedDeviceGloo(ProcessGroupGloo):
    """A gloo group on the device that torch chose for the first one (`GLOO_SOCKET_IFNAME`)."""

    def __init__(
        self, store: Store, rank: int, size: int, timeout: timedelta, **others: Any
    ) -> None:
        process = os.getpid()
        if process not in _devices:
            super().__init__(store, rank, size, timeout=timeout, **others)
            _devices[process] = self.options._devices  # type: ignore[attr-defined]
            return
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = _devices[process]
        options._threads = 2 * len(options._devices)
        options._timeout = timeout
        # `enable_reconfigure`, in torch 2.14.
        for name, value in others.items():
            setattr(options, name, value)
        super().__init__(store, rank, size, options)


def share_device() -> None:
    """Make groups that are created from now on share one device."""
    distributed_c10d.ProcessGroupGloo = _SharedDeviceGloo  # type: ignore[misc]
