"""SIGKILL of one rank, at every point of a step and of a checkpoint and at random moments, and of
the process that writes a checkpoint for it.

All lives of a run, one after the other in one run directory, end in the numbers of a run that was
never killed, bit for bit.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from kill_worker import target
from launches import (
    ROOT,
    TIMEOUT_SECONDS,
    data_parallel,
    free_port,
    start_rank,
    training_records,
)

KILLER = Path(__file__).with_name("kill_worker.py")
TRAIN = ROOT / "tools" / "train.py"
PEER_LOST = 3
RANKS = 2

CHECKPOINT = "calm_dist.training.checkpoint"
RUNS = "calm_dist.runs.checkpoints"
FILES = f"{RUNS}.directory"
ROTATION = f"{RUNS}.rotation"
PHASES = "calm_dist.training.phases:Phases"
# What dies: the rank, and before which call of what. Each life comes as far as a checkpoint first.
STEP_POINTS: dict[str, tuple[int, str, int, str]] = {
    "forming groups": (1, "calm_dist.parallel.topology:build_topology", 1, ""),
    "data": (1, f"{PHASES}.enter", 11, "data"),
    "second micro-batch": (0, f"{PHASES}.progress", 8, ""),
    "optimizer": (1, f"{PHASES}.enter", 4, "optimizer"),
    "between backbone and head": (0, "calm_dist.parallel.zero_head:ZeroHead.step", 5, ""),
}
QUEUE = "megatron.core.dist_checkpointing.strategies.async_utils:AsyncCallsQueue"
LOAD_PLANNER = "megatron.core.dist_checkpointing.strategies.torch:MCoreLoadPlanner"
SAVE_POINTS: dict[str, tuple[int, str, int, str]] = {
    "begin": (0, f"{RUNS}:begin", 2, ""),
    "plan": (1, f"{CHECKPOINT}.tensor_files:TensorWriter.plan", 2, ""),
    "fork": (0, f"{QUEUE}.schedule_async_request", 2, ""),
    "writing": (1, f"{QUEUE}.maybe_finalize_async_calls", 2, ""),
    "gather": (1, f"{CHECKPOINT}.tensor_files:TensorWriter._finalize", 2, ""),
    "description": (0, f"{CHECKPOINT}.tensor_files:save_config", 2, ""),
    "commit": (0, f"{ROTATION}:Rotation.commit", 2, ""),
    "manifest": (0, f"{FILES}:_sync", 2, "manifest.json"),
    # The first one, because the next rename of a checkpoint is that of an old one to be removed.
    "rename": (0, f"{FILES}:os.replace", 1, "checkpoints/step_"),
    "latest": (0, f"{ROTATION}:replace_text", 2, "latest"),
    "make room": (0, f"{ROTATION}:make_room", 3, ""),
    "loading": (1, f"{CHECKPOINT}.model_state:load", 1, ""),
    "reading": (1, f"{LOAD_PLANNER}.create_local_plan", 1, ""),
}
# In the process that a rank forks to write, for each tensor.
WRITE_ITEM = "megatron.core.dist_checkpointing.strategies.filesystem_async:_write_item"
LOST = "there is no checkpoint of this step, earlier ones are unchanged"
# The long tests need a checkpoint for each life.
STEPS, MANY_STEPS = 24, 60
Overrides = Callable[[Path, int], list[str]]
"""The fixture `overrides`, of a run directory and the number of steps."""


@dataclass(frozen=True)
class Whole:
    """A run that was never killed."""

    records: dict[int, dict[str, float]]
    before_training: float
    """Seconds until the first step is done."""
    training: float
    """Seconds from there to the end."""


Unbroken = Callable[[int], Whole]
"""The fixture `unbroken`, of the number of steps."""


def life(overrides: list[str], script: Path = TRAIN, **more: str) -> list[subprocess.Popen[str]]:
    """Both ranks of the run, started once more."""
    port = free_port()
    return [start_rank(rank, RANKS, port, overrides, script, **more) for rank in range(RANKS)]


def end(ranks: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and output of each rank."""
    outputs = [rank.communicate(timeout=TIMEOUT_SECONDS)[0] for rank in ranks]
    return [(rank.returncode, output) for rank, output in zip(ranks, outputs, strict=True)]


@pytest.fixture(scope="module")
def overrides(tiny: Callable[..., list[str]]) -> Overrides:
    def of_run(run_dir: Path, steps: int) -> list[str]:
        return data_parallel(
            tiny,
            run_dir,
            # What is tested does not depend on how large a model is.
            model__num_hidden_layers=1,
            training__steps=steps,
            training__schedule="linear",
            checkpoint__every=3,
            checkpoint__keep=2,
            # Nobody tells rank 1 that rank 0 died before they met; a launcher would.
            health__timeout_seconds=60,
        )

    return of_run


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, overrides: Overrides) -> Unbroken:
    @cache
    def of_length(steps: int) -> Whole:
        run_dir = tmp_path_factory.mktemp("unbroken") / "run"
        started = time.monotonic()
        ranks = life(overrides(run_dir, steps))
        while not training_records(run_dir) and ranks[0].poll() is None:
            time.sleep(0.02)
        first = time.monotonic()
        assert [code for code, _ in end(ranks)] == [0, 0]
        return Whole(training_records(run_dir), first - started, time.monotonic() - first)

    return of_length


def assert_same(run_dir: Path, whole: Whole, steps: int) -> None:
    records = training_records(run_dir)
    assert sorted(records) == sorted(whole.records) == list(range(1, steps + 1))
    for step, expected in whole.records.items():
        for name in ("loss", "grad_norm", "learning_rate", "tokens", "skipped"):
            assert records[step][name] == expected[name], (step, name)


def kill_writers(run_dir: Path, overrides: list[str]) -> None:
    """One life, in which the writers of two checkpoints die with their tensors half written, and
    before the second one is cleared away also rank 0."""
    checkpoints, first, second = run_dir / "checkpoints", "step_00000006.tmp", "step_00000012.tmp"
    kills = [
        {"rank": 1, "before": WRITE_ITEM, "call": 3, "having": name} for name in (first, second)
    ]
    # The first call makes room for it.
    kills.append({"rank": 0, "before": "shutil:rmtree", "call": 2, "having": second})
    ranks = end(life(overrides, KILLER, KILLS=json.dumps(kills)))
    assert [code for code, _ in ranks] == [-signal.SIGKILL, PEER_LOST], ranks
    lost = [line for line in ranks[0][1].splitlines() if LOST in line]
    assert len(lost) == 2, ranks
    for line, name in zip(lost, (first, second), strict=True):
        assert line.startswith(f"warning: {checkpoints / name}: ") and "rank 1 cannot write" in line
    left = sorted(path.name for path in checkpoints.iterdir())
    assert left == ["latest", "step_00000003", "step_00000009", second]
    assert (checkpoints / second / "state.json").is_file()


def kill_at_points(
    run_dir: Path, overrides: list[str], points: dict[str, tuple[int, str, int, str]]
) -> dict[str, str]:
    """One life for each point, which ends there; the other rank says who died. Its output."""
    outputs = {}
    for name, (rank, before, call, having) in points.items():
        kill = {"rank": rank, "before": before, "call": call, "having": having}
        ended = end(life(overrides, KILLER, KILLS=json.dumps([kill])))
        assert ended[rank][0] == -signal.SIGKILL, (name, ended)
        code, output = ended[1 - rank]
        assert code == PEER_LOST, (name, ended)
        assert f"rank {rank}" in output and "Traceback" not in output, (name, output)
        outputs[name] = output
    return outputs


def finish(run_dir: Path, overrides: list[str], steps: int) -> None:
    ended = end(life(overrides))
    assert [code for code, _ in ended] == [0, 0], ended
    left = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert left == ["latest", f"step_{steps - 3:08d}", f"step_{steps:08d}"]


def test_killed_writers_and_killed_at_points_of_step_and_save(
    tmp_path: Path, overrides: Overrides, unbroken: Unbroken
) -> None:
    run = tmp_path / "run"
    given = overrides(run, STEPS)
    points = {
        name: (STEP_POINTS | SAVE_POINTS)[name]
        for name in ("forming groups", "optimizer", "reading", "writing")
    }
    kill_writers(run, given)
    output = kill_at_points(run, given, points)["optimizer"]
    # The checkpoint of step 12 that was not finished is not even looked at.
    assert f"resumed from {run / 'checkpoints' / 'step_00000009'} at step 9" in output
    assert "passed over" not in output
    finish(run, given, STEPS)
    assert_same(run, unbroken(STEPS), STEPS)


@pytest.mark.parametrize(
    "before", [WRITE_ITEM, *(point[1] for point in (STEP_POINTS | SAVE_POINTS).values())]
)
def test_what_the_table_names_exists(before: str) -> None:
    """The whole table is used only by the long test below."""
    owner, name = target(before)
    assert callable(getattr(owner, name))


@pytest.mark.full
def test_killed_at_every_point_of_step_and_save(
    tmp_path: Path, overrides: Overrides, unbroken: Unbroken
) -> None:
    run = tmp_path / "run"
    given = overrides(run, MANY_STEPS)
    kill_at_points(run, given, STEP_POINTS | SAVE_POINTS)
    finish(run, given, MANY_STEPS)
    assert_same(run, unbroken(MANY_STEPS), MANY_STEPS)


@pytest.mark.parametrize(
    ("kills", "steps"), [(2, STEPS), pytest.param(30, MANY_STEPS, marks=pytest.mark.full)]
)
def test_killed_at_random_moments(
    tmp_path: Path, overrides: Overrides, unbroken: Unbroken, kills: int, steps: int
) -> None:
    """Moments from before the first import to the end of the training; one rank, or both."""
    run, chance, whole = tmp_path / "run", random.Random(kills), unbroken(steps)
    given = overrides(run, steps)
    before = whole.before_training
    for _ in range(kills):
        ranks = life(given)
        time.sleep(chance.uniform(0.5 * before, before + 0.5 * whole.training))
        for rank in chance.choice([[0], [1], [0, 1]]):
            ranks[rank].kill()
        for code, output in end(ranks):
            assert code in (-signal.SIGKILL, PEER_LOST, 0), output[-3000:]
    finish(run, given, steps)
    assert_same(run, whole, steps)
