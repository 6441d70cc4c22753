"""A launch that cannot work, or a rank that dies, ends with a message that names it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launches import (
    TIMEOUT_SECONDS,
    data_parallel,
    free_port,
    start_rank,
    training_records,
)

BAD_INPUT, PEER_LOST = 2, 3


@pytest.fixture(scope="module", autouse=True)
def ranks_0_and_2(
    tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., list[str]]
) -> Iterator[list[subprocess.Popen[str]]]:
    """Of four; started first, because they wait for the others while the other tests run."""
    # Long enough for both to meet on a busy machine.
    overrides = data_parallel(
        tiny, tmp_path_factory.mktemp("missing") / "run", health__timeout_seconds=30.0
    )
    port = free_port()
    ranks = [start_rank(rank, 4, port, overrides) for rank in (0, 2)]
    yield ranks
    for rank in ranks:
        rank.kill()
        rank.wait()


def test_port_in_use_is_named(tmp_path: Path, tiny: Callable[..., list[str]]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start_rank(0, 2, port, data_parallel(tiny, tmp_path / "run"))
        output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == BAD_INPUT, output[-3000:]
    assert f"127.0.0.1:{port}" in output and "MASTER_PORT" in output
    assert "Traceback" not in output


def test_dead_peer_is_named(tmp_path: Path, tiny: Callable[..., list[str]]) -> None:
    run_dir = tmp_path / "run"
    overrides = data_parallel(tiny, run_dir, training__steps=100_000)
    port = free_port()
    ranks = [start_rank(rank, 2, port, overrides) for rank in (0, 1)]
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while 3 not in training_records(run_dir) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(ranks[1].pid, signal.SIGKILL)
    output, _ = ranks[0].communicate(timeout=TIMEOUT_SECONDS)
    ranks[1].communicate()
    assert ranks[0].returncode == PEER_LOST, output[-3000:]
    assert "rank 1 (" in output and "died or stopped answering" in output
    assert "Traceback" not in output


def test_wrong_number_of_ranks_names_the_field(
    tmp_path: Path, tiny: Callable[..., list[str]]
) -> None:
    overrides = tiny(tmp_path / "run", "calm")
    process = start_rank(0, 3, free_port(), overrides)
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == BAD_INPUT, output[-3000:]
    assert "parallel.world_size" in output and "Traceback" not in output


def test_missing_ranks_are_named(ranks_0_and_2: list[subprocess.Popen[str]]) -> None:
    outputs = [process.communicate(timeout=TIMEOUT_SECONDS)[0] for process in ranks_0_and_2]
    for process, output in zip(ranks_0_and_2, outputs, strict=True):
        assert process.returncode == PEER_LOST, output[-3000:]
    assert "ranks 1, 3 did not connect" in outputs[0]
    assert "Traceback" not in outputs[0]
