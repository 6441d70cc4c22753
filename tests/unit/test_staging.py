"""Copies for a forked writer, and memory that a child is not given."""

from __future__ import annotations

import errno
import faulthandler
import os
import resource
import signal
import threading
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from calm_dist.compat import megatron_cpu
from calm_dist.parallel.launch import ALONE, join_world
from calm_dist.parallel.processes import hurry, stand_back
from calm_dist.training.checkpoint import forks
from calm_dist.training.checkpoint import staging as staging_module
from calm_dist.training.checkpoint.staging import Staging, not_forked
from calm_dist.training.checkpoint.tensor_files import TensorWriter

AUTOGROUP = Path("/proc/self/autogroup").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_copy_stays_as_it_was(dtype: torch.dtype) -> None:
    whole = torch.arange(24).reshape(4, 6).to(dtype)
    sources = [whole, whole[:, 1:3].T, whole[1, 2], torch.empty(0, 3, dtype=dtype)]
    expected = [source.clone() for source in sources]
    staging = Staging()
    staging.reserve(sum(source.nbytes for source in sources), len(sources))
    copies = [staging.copy(source) for source in sources]
    whole.zero_()
    for copy, source in zip(copies, expected, strict=True):
        assert torch.equal(copy, source)
        # All of a storage is written with a tensor.
        assert copy.untyped_storage().nbytes() == source.nbytes


def test_the_memory_is_used_again() -> None:
    staging, addresses = Staging(), set()
    for size in (1000, 1000, 10):
        staging.reserve(size * 4, 1)
        addresses.add(staging.copy(torch.ones(size)).data_ptr())
    assert len(addresses) == 1
    staging.reserve(8000, 1)
    assert torch.equal(staging.copy(torch.ones(2000)), torch.ones(2000))


def test_memory_is_touched_beforehand() -> None:
    faults = {}
    for beforehand in (False, True):
        staging, tensor = Staging(), torch.ones(2**24)
        staging.reserve(tensor.nbytes, 1)
        if beforehand:
            staging.touch()
            for thread in threading.enumerate():
                if thread.name == "touch memory":
                    thread.join()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        copy = staging.copy(tensor)
        faults[beforehand] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        assert torch.equal(copy, tensor)
    # 16,384 pages.
    assert faults[False] > 10_000 and faults[True] < 1_000


def test_without_memory_there_are_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: int) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(staging_module.mmap, "mmap", refused)
    staging, tensor = Staging(), torch.ones(3)
    staging.reserve(12, 1)
    assert not staging.has_copies
    assert staging.copy(tensor).data_ptr() == tensor.data_ptr()


def test_a_child_that_stands_back_says_so_until_it_is_heard() -> None:
    """Four at once; Linux takes one such wish every 0.1 s from those without privileges."""
    pids = []
    for _ in range(4):
        if (pid := os.fork()) == 0:
            stand_back()
            text = Path("/proc/self/autogroup").read_text() if AUTOGROUP else "nice 19"
            os._exit(0 if text.strip().endswith("nice 19") and os.nice(0) == 19 else 3)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4


def read_in_a_child(tensor: torch.Tensor) -> int:
    """How a forked child ends that reads the middle of a tensor: its wait status."""
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()
        os._exit(0 if tensor.flatten()[tensor.numel() // 2].item() == 1.0 else 3)
    return os.waitpid(pid, 0)[1]


def test_children_do_not_have_what_is_not_forked() -> None:
    big, view, small = torch.ones(1 << 20), torch.ones(1 << 20)[5:900_000], torch.ones(8)
    with not_forked([big, view, big[3:], small]):
        assert os.WTERMSIG(read_in_a_child(big)) == signal.SIGSEGV
        assert os.WTERMSIG(read_in_a_child(view)) == signal.SIGSEGV
        assert read_in_a_child(small) == 0
        assert big.sum() == 1 << 20
    assert read_in_a_child(big) == read_in_a_child(view) == 0


@pytest.mark.skipif(not AUTOGROUP, reason="this kernel does not group processes by session")
def test_a_child_that_is_waited_for_stands_back_no_more() -> None:
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        stand_back()
        os.write(told, b"1")
        signal.pause()
    try:
        assert os.read(ready, 1) == b"1"
        group = Path(f"/proc/{child}/autogroup")
        assert group.read_text().split()[-1] == "19"
        hurry(child)
        assert group.read_text().split()[-1] == "0"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_what_a_forked_writer_reads_is_kept_until_it_has_ended(tmp_path: Path) -> None:
    """On GPUs these are copies in pinned memory, which a child shares: memory that is free again
    would get the next batch while the child still writes it."""
    megatron_cpu.install()
    join_world(ALONE, torch.device("cpu"), 60.0)
    state = {"weight": ShardedTensor.from_rank_offsets("weight", torch.arange(4.0))}
    (tmp_path / "tensors").mkdir()
    writer, calls = TensorWriter(), AsyncCallsQueue()
    forks.schedule(calls, writer.plan(state, tmp_path / "tensors", True, lambda: None))
    ((_, _, (_, tensors)),) = writer._strategy.in_use
    ((_, copy),) = tensors
    assert torch.equal(copy, torch.arange(4.0))
    calls.maybe_finalize_async_calls(blocking=True)
    assert writer._strategy.in_use is None
    assert writer.ended(wait=True)
