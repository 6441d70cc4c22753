"""A training that is killed goes on as if nothing had happened, also on another layout."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launches import (
    ROOT,
    TIMEOUT_SECONDS,
    environment,
    kill_tree,
    recipe,
    run_jobs,
    torchrun,
    training_records,
)
from test_layouts import ALONE, TOLERANCE

FULL_LAYOUT = {
    "parallel__tensor_parallel_size": 2,
    "parallel__pipeline_parallel_size": 2,
    "parallel__sequence_parallel": True,
}


def launch(ranks: int, overrides: list[str], fresh: bool = True) -> subprocess.Popen[str]:
    """Start tools/train.py under torchrun in a session of its own; only ``fresh`` processes can be
    killed with it."""
    train = ROOT / "tools" / "train.py"
    command = torchrun(ranks, train, recipe("calm"), *overrides, fresh=fresh)
    return subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 0, output[-4000:]
    return output


def kill_at(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    """SIGKILL the launcher and all ranks once the run has logged ``step``."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while step not in training_records(run_dir):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill_tree(process)


@pytest.fixture(scope="module")
def unbroken(
    tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., list[str]]
) -> dict[int, dict[str, float]]:
    """TP2 PP2 without interruption."""
    directory = tmp_path_factory.mktemp("unbroken")
    overrides = tiny(directory / "run", "calm", training__schedule="linear", **FULL_LAYOUT)
    run_jobs(4, [("calm", overrides)], directory)
    return training_records(directory / "run")


def test_killed_run_resumes_bit_for_bit_and_on_another_layout(
    tmp_path: Path, tiny: Callable[..., list[str]], unbroken: dict[int, dict[str, float]]
) -> None:
    run_dir = tmp_path / "run"
    common = {"training__schedule": "linear", "checkpoint__every": 4}
    full = tiny(run_dir, "calm", **common, **FULL_LAYOUT)
    kill_at(launch(4, full), run_dir, step=6)
    kill_at(launch(4, full), run_dir, step=14)
    for step in range(1, 13):
        # Lost steps were done again; what is kept equals the unbroken run exactly.
        record = training_records(run_dir)[step]
        assert record["loss"] == unbroken[step]["loss"], step
        assert record["grad_norm"] == unbroken[step]["grad_norm"], step

    # Written beside the training: on a busy machine that of step 12 may have been lost, too.
    newest = max(int(path.name[5:]) for path in run_dir.glob("checkpoints/step_????????"))
    assert newest in (8, 12)
    output = finish(launch(1, tiny(run_dir, "calm", **common, **ALONE), fresh=False))
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
    finish(launch(1, tiny(run_dir, "calm", training__steps=3, **ALONE), fresh=False))
    before = training_records(run_dir)
    finish(launch(1, tiny(run_dir, "calm", training__steps=3, **ALONE), fresh=False))
    assert training_records(run_dir) == before

    same = tiny(run_dir, "calm", training__steps=3, **ALONE)
    for change in ("model.head.num_mlp_layers=3", "run.seed=1"):
        process = launch(1, [*same, change], fresh=False)
        output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
        assert process.returncode != 0
        assert "written for another model, noise or tokens" in output
        assert change.split("=")[0].removesuffix(".num_mlp_layers") in output
        assert training_records(run_dir) == before

    output = finish(
        launch(1, [*same, "training.steps=4", "training.learning_rate=1e-3"], fresh=False)
    )
    assert "training.learning_rate: 0.002 -> 0.001, training.steps: 3 -> 4" in output
    assert sorted(training_records(run_dir)) == [1, 2, 3, 4]
