"""A signal to one rank: all write a checkpoint after the same step and end with code 75."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launches import (
    TIMEOUT_SECONDS,
    data_parallel,
    free_port,
    run_jobs,
    start_rank,
    training_records,
)

from calm_dist.runs.listing import describe

STOPPED = 75


def wait_for_steps(run_dir: Path, steps: int, ranks: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while len(training_records(run_dir)) < steps:
        assert all(rank.poll() is None for rank in ranks), "the run ended before it was stopped"
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGUSR1,
        pytest.param(signal.SIGUSR2, marks=pytest.mark.full),
        pytest.param(signal.SIGTERM, marks=pytest.mark.full),
    ],
)
def test_one_rank_is_told_and_all_stop(
    number: signal.Signals, tmp_path: Path, tiny: Callable[..., list[str]]
) -> None:
    run_dir, port = tmp_path / "run", free_port()
    overrides = [
        *data_parallel(tiny, run_dir, training__steps=5000),
        "training.schedule=constant",
    ]
    ranks = [start_rank(rank, 2, port, overrides) for rank in (0, 1)]
    wait_for_steps(run_dir, 3, ranks)
    assert describe(run_dir)["state"] == "running"
    ranks[1].send_signal(number)
    outputs = [rank.communicate(timeout=TIMEOUT_SECONDS)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [STOPPED, STOPPED], outputs

    last = max(training_records(run_dir))
    assert f"stopped after step {last} (asked by another rank)" in outputs[0]
    assert (run_dir / "checkpoints" / f"step_{last:08d}" / "manifest.json").is_file()
    row = describe(run_dir)
    assert (row["state"], row["step"], row["checkpoint"]) == ("stopped", last, last)
    assert row["reason"].startswith(f"stopped after step {last}")

    # The stopped run and one that was never stopped end in the same numbers.
    steps = last + 2
    again = [
        data_parallel(tiny, tmp_path / name, training__steps=steps, training__schedule="constant")
        for name in ("run", "unbroken")
    ]
    run_jobs(2, [("calm", overrides) for overrides in again], tmp_path)
    stopped, unbroken = (training_records(tmp_path / name) for name in ("run", "unbroken"))
    assert sorted(stopped) == sorted(unbroken) == list(range(1, steps + 1))
    assert stopped[steps]["loss"] == unbroken[steps]["loss"]
