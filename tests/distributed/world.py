"""What the workers of this folder have in common: they join the world of their launch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def joined_world() -> Iterator[tuple[Any, Any]]:
    """The world and this rank's device, connected until the end of the block."""
    import torch.distributed as dist

    from calm_dist.compat import megatron_cpu
    from calm_dist.parallel.launch import join_world, read_world, select_device

    world = read_world()
    world.export()
    device = select_device(world, "auto")
    join_world(world, device, timeout_seconds=120.0)
    megatron_cpu.install()
    yield world, device
    dist.destroy_process_group()
