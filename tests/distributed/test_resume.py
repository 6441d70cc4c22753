"""A training that is killed continues as if nothing had happened, also on another layout."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launches import (
    ROOT,
    TIMEOUT_SECONDS,
    call,
    free_port,
    recipe,
    run_jobs,
    start_rank,
    training_records,
)
from test_layouts import ALONE, TOLERANCE, TWO

RANKS = 4
FULL_LAYOUT = {
    "parallel__tensor_parallel_size": 2,
    "parallel__pipeline_parallel_size": 2,
    "parallel__sequence_parallel": True,
}
COMMON = TWO | {"training__schedule": "linear"}


def train(overrides: list[str], code: int = 0) -> str:
    """Run tools/train.py in one process; returns what it printed."""
    tool = str(ROOT / "tools" / "train.py")
    done = call([sys.executable, tool, recipe("calm"), *overrides], code=code)
    return done.stdout + done.stderr


def kill_at(run_dir: Path, overrides: list[str], step: int) -> None:
    """Run tools/train.py, and SIGKILL all ranks once the run has logged ``step``."""
    port = free_port()
    ranks = [start_rank(rank, RANKS, port, overrides) for rank in range(RANKS)]
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while step not in training_records(run_dir):
        assert all(rank.poll() is None for rank in ranks), "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        # Its output ends with the last process that it has started.
        rank.communicate(timeout=TIMEOUT_SECONDS)


@pytest.fixture(scope="module")
def unbroken(
    tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., list[str]]
) -> dict[int, dict[str, float]]:
    """TP2 PP2 without interruption."""
    directory = tmp_path_factory.mktemp("unbroken")
    overrides = tiny(directory / "run", "calm", **COMMON, **FULL_LAYOUT)
    run_jobs(RANKS, [("calm", overrides)], directory)
    return training_records(directory / "run")


def test_killed_run_resumes_bit_for_bit_and_on_another_layout(
    tmp_path: Path, tiny: Callable[..., list[str]], unbroken: dict[int, dict[str, float]]
) -> None:
    run_dir = tmp_path / "run"
    common = COMMON | {"checkpoint__every": 4}
    full = tiny(run_dir, "calm", **common, **FULL_LAYOUT)
    kill_at(run_dir, full, step=6)
    kill_at(run_dir, full, step=14)
    for step in range(1, 13):
        # Lost steps were done again; what is kept equals the unbroken run exactly.
        record = training_records(run_dir)[step]
        assert record["loss"] == unbroken[step]["loss"], step
        assert record["grad_norm"] == unbroken[step]["grad_norm"], step

    # Written beside the training: on a busy machine that of step 12 may have been lost, too.
    newest = max(int(path.name[5:]) for path in run_dir.glob("checkpoints/step_????????"))
    assert newest in (8, 12)
    output = train(tiny(run_dir, "calm", **common, **ALONE))
    assert "resumed from" in output and f"at step {newest}" in output
    resumed = training_records(run_dir)
    assert sorted(resumed) == sorted(unbroken)
    for step, expected in unbroken.items():
        for name in ("loss", "grad_norm"):
            limit = TOLERANCE * max(1.0, abs(expected[name]))
            assert abs(resumed[step][name] - expected[name]) <= limit, (step, name)


def test_finished_run_is_left_alone_and_another_model_is_refused(
    tmp_path: Path, tiny: Callable[..., list[str]]
) -> None:
    run_dir = tmp_path / "run"
    same = tiny(run_dir, "calm", training__steps=3, **ALONE)
    train(same)
    before = training_records(run_dir)
    train(same)
    assert training_records(run_dir) == before

    for change in ("model.head.num_mlp_layers=3", "run.seed=1"):
        output = train([*same, change], code=2)
        assert "written for another model, noise or tokens" in output
        assert change.split("=")[0].removesuffix(".num_mlp_layers") in output
        assert training_records(run_dir) == before

    output = train([*same, "training.steps=4", "training.learning_rate=1e-3"])
    assert "training.learning_rate: 0.002 -> 0.001, training.steps: 3 -> 4" in output
    assert sorted(training_records(run_dir)) == [1, 2, 3, 4]
