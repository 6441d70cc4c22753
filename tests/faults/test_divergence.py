"""A run that diverges keeps its last good checkpoint, and the next start continues from there."""

from __future__ import annotations

import gc
import json
import math
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fault_worker
import pytest
import torch
import torch.distributed as dist
from launches import (
    ALONE,
    SMALL,
    TIMEOUT_SECONDS,
    data_parallel,
    free_port,
    recipe,
    start_rank,
    training_records,
)

from calm_dist.errors import StoppedError, TrainingDivergedError
from calm_dist.files import file_sha256
from calm_dist.parallel.launch import World, join_world
from calm_dist.recipe import AutoencoderRecipe, LanguageModelRecipe, Recipe, load_recipe
from calm_dist.runs import checkpoints
from calm_dist.runs.checkpoints.run_state import RunState
from calm_dist.training.resolve import resolve
from calm_dist.training.stop import StopRequest

STEPS = 14
KINDS = ("calm", "autoencoder")
# Both trainers are one engine: the long tests repeat what concerns it alone.
QUICK_KINDS = ("calm", pytest.param("autoencoder", marks=pytest.mark.full))
# The fault, and the last step whose weights are good.
WAYS: dict[str, tuple[Callable[[], None], int]] = {
    "rate": (lambda: fault_worker.huge_rate(7), 6),
    "weights": (lambda: fault_worker.bad_weights(6), 5),
    "data": (lambda: fault_worker.bad_gradient(7, STEPS, 0), 6),
}
DIVERGED, STOPPED = 4, 75
WORKER = Path(fault_worker.__file__)


@pytest.fixture(scope="module", autouse=True)
def frozen_libraries() -> Iterator[None]:
    """A training leaves frozen what it finds frozen, so that the next one need not collect a
    million objects of the libraries again."""
    from calm_dist.training import autoencoder, language_model  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def faultless() -> Iterator[None]:
    """Takes every fault out again."""
    from calm_dist.training import autoencoder, language_model, optimizer

    trainers: list[Any] = [language_model.Trainer, autoencoder.AutoencoderTrainer]
    steps, rate = [trainer.train_step for trainer in trainers], optimizer.learning_rate

    def restore() -> None:
        for trainer, step in zip(trainers, steps, strict=True):
            trainer.train_step = step
        autoencoder.learning_rate = optimizer.learning_rate = rate

    faultless.restore = restore  # type: ignore[attr-defined]
    yield
    restore()


@pytest.fixture(scope="module")
def make(tiny: Callable[..., list[str]]) -> Callable[..., Recipe]:
    """A recipe of one process that gives up after six skipped steps."""

    def resolved(run_dir: Path, kind: str, **more: object) -> Recipe:
        values: dict[str, object] = {
            "training__steps": STEPS,
            "training__micro_batch_size": 8,
            "health__max_skipped_steps": 6,
            "checkpoint__every": 2,
            "checkpoint__async": False,
            "logging__every": 1,
            "parallel__device": "cpu",
        }
        layout = ALONE | SMALL if kind == "calm" else {}
        return resolve(load_recipe(recipe(kind), tiny(run_dir, kind, **(layout | values | more))))

    return resolved


def train(given: Recipe, stop: StopRequest | None = None) -> None:
    """A start in this process."""
    from calm_dist.inference.load import single_process_topology
    from calm_dist.training.autoencoder import AutoencoderTrainer
    from calm_dist.training.language_model import Trainer

    World(0, 1, 0, 1, "", 0, "test").export()
    Path(given.run.dir).mkdir(exist_ok=True)
    if isinstance(given, AutoencoderRecipe):
        if not dist.is_initialized():
            join_world(World(0, 1, 0, 1, "", 0, "test"), torch.device("cpu"), 10)
        AutoencoderTrainer(given, torch.device("cpu"), stop).run()
    else:
        assert isinstance(given, LanguageModelRecipe)
        Trainer(given, single_process_topology(given, torch.device("cpu")), stop).run()


def kept(run_dir: Path) -> list[int]:
    return sorted(RunState.read(d).step for d in checkpoints.step_directories(run_dir))


def curve(run_dir: Path) -> list[float]:
    return [record["loss"] for _, record in sorted(training_records(run_dir).items())]


@pytest.fixture(scope="module")
def unbroken(
    make: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[float]]:
    """Losses of runs without a fault."""
    curves = {}
    for kind in KINDS:
        run_dir = tmp_path_factory.mktemp("unbroken") / kind
        train(make(run_dir, kind))
        curves[kind] = curve(run_dir)
    return curves


# (way, (keep, every, keep_every)); the long tests have the other pairs, too.
CASES = [
    ("rate", (2, 2, None)),
    ("rate", (1, 1, 3)),
    ("weights", (2, 2, None)),
    ("data", (1, 1, 3)),
    pytest.param("weights", (1, 1, 3), marks=pytest.mark.full),
    pytest.param("data", (2, 2, None), marks=pytest.mark.full),
]


@pytest.mark.parametrize(("way", "settings"), CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_next_start_goes_on_from_the_last_good_checkpoint(
    kind: str,
    way: str,
    settings: tuple[int, int, int | None],
    make: Callable[..., Recipe],
    unbroken: dict[str, list[float]],
    tmp_path: Path,
) -> None:
    keep, every, keep_every = settings
    run_dir = tmp_path / "run"
    given = make(
        run_dir,
        kind,
        checkpoint__keep=keep,
        checkpoint__every=every,
        checkpoint__keep_every=keep_every or "null",
    )
    fault, last_good = WAYS[way]
    fault()
    with pytest.raises(TrainingDivergedError) as diverged:
        train(given)
    # Proven by a finite step: the one before the last good one where nothing was finite after it.
    first_skipped = 8 if way == "rate" else 7
    good = max(s for s in range(every, first_skipped - 1, every) if s <= last_good)
    assert max(kept(run_dir)) == good
    message = str(diverged.value)
    assert "health.max_skipped_steps=6). No finite step followed" in message
    assert f"continues from {checkpoints.step_directory(run_dir, good)}" in message
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == f"step_{good:08d}"
    named = re.findall(r"step_\d{8}\.diverged", message)
    assert named and all((run_dir / "checkpoints" / name).is_dir() for name in named)
    if keep_every is not None:
        assert {3} <= set(kept(run_dir))

    # As it does with the remedy: without what ruined it.
    faultless.restore()  # type: ignore[attr-defined]
    train(given)
    assert curve(run_dir) == unbroken[kind]


@pytest.mark.parametrize("kind", QUICK_KINDS)
def test_another_start_that_diverges_at_once_does_not_go_back_further(
    kind: str, make: Callable[..., Recipe], tmp_path: Path
) -> None:
    given = make(tmp_path / "run", kind)
    for _ in range(3):
        fault_worker.bad_weights(6)
        fault_worker.bad_gradient(5, STEPS, 0)
        with pytest.raises(TrainingDivergedError, match=r"continues from .*step_00000002"):
            train(given)
        faultless.restore()  # type: ignore[attr-defined]
        # And where not even the first step is finite.
        fault_worker.bad_gradient(1, STEPS, 0)
        with pytest.raises(
            TrainingDivergedError, match=r"step_00000002.*skipped again, its .*from the first"
        ):
            train(given)
        faultless.restore()  # type: ignore[attr-defined]
        assert kept(tmp_path / "run") == [2]


@pytest.mark.parametrize("kind", QUICK_KINDS)
def test_without_a_proven_checkpoint_the_newest_sound_one_is_tried_once(
    kind: str, make: Callable[..., Recipe], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    given = make(run_dir, kind, health__max_skipped_steps=3)
    fault_worker.bad_gradient(3, STEPS, 0)
    with pytest.raises(TrainingDivergedError, match=r"No finite step followed .*00002, the"):
        train(given)
    assert kept(run_dir) == [2]
    # From there, and not even the first step is finite: its weights are damaged.
    fault_worker.bad_gradient(1, STEPS, 0)
    with pytest.raises(TrainingDivergedError, match="The next start begins with the first step"):
        train(given)
    assert kept(run_dir) == []
    assert len(list((run_dir / "checkpoints").glob("*.diverged"))) >= 2
    faultless.restore()  # type: ignore[attr-defined]
    train(given)
    assert len(curve(run_dir)) == STEPS
    fault_worker.bad_gradient(3, STEPS, 0)
    other = make(tmp_path / "other", kind, checkpoint__every=1000, health__max_skipped_steps=3)
    with pytest.raises(TrainingDivergedError, match="There is no checkpoint: the next start"):
        train(other)


@pytest.mark.parametrize("kind", QUICK_KINDS)
@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGUSR1, marks=pytest.mark.full), signal.SIGTERM]
)
def test_a_stop_while_steps_are_skipped_replaces_no_good_checkpoint(
    kind: str,
    number: signal.Signals,
    make: Callable[..., Recipe],
    unbroken: dict[str, list[float]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir, stop = tmp_path / "run", StopRequest()
    given = make(run_dir, kind, checkpoint__keep=1)
    fault_worker.huge_rate(7)
    fault_worker.signal_in(10, number)
    with stop.listening(), pytest.raises(StoppedError, match="stopped after step 10"):
        train(given, stop)
    # The last good one, that of the last update, and how far the run is.
    assert kept(run_dir) == [6, 10] or kept(run_dir) == [6, 8, 10]
    assert RunState.read(checkpoints.step_directory(run_dir, 10)).skipped_in_a_row == 3
    assert "step_00000006 is the newest checkpoint that a finite" in capsys.readouterr().err
    # It counts on: step 14 is the seventh.
    with pytest.raises(TrainingDivergedError, match=r"step 14: .*for 7 steps"):
        train(given)
    assert max(kept(run_dir)) == 6
    faultless.restore()  # type: ignore[attr-defined]
    train(given)
    assert curve(run_dir) == unbroken[kind]


@pytest.mark.parametrize("kind", QUICK_KINDS)
def test_the_end_of_a_training_replaces_no_good_checkpoint(
    kind: str, make: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    given = make(run_dir, kind, checkpoint__keep=1)
    fault_worker.bad_gradient(STEPS, STEPS, 0)
    train(given)
    assert kept(run_dir) == [STEPS - 2, STEPS]
    assert f"step_{STEPS - 2:08d} is the newest" in capsys.readouterr().err

    # Also where the last step ruins the weights, which nothing tells.
    faultless.restore()  # type: ignore[attr-defined]
    other = make(tmp_path / "other", kind, checkpoint__keep=1)
    fault_worker.huge_rate(STEPS)
    train(other)
    assert kept(tmp_path / "other") == [STEPS - 2, STEPS]


@pytest.mark.parametrize("kind", QUICK_KINDS)
def test_one_that_is_proven_makes_room_at_once(
    kind: str, make: Callable[..., Recipe], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    found = []
    fault_worker.in_step(lambda *_: found.append(kept(run_dir)), 1, STEPS)
    train(make(run_dir, kind, checkpoint__keep=1))
    assert found[:7] == [[], [], [2], [2], [2, 4], [4], [4, 6]]


def ends(ranks: list[Any]) -> tuple[list[int], list[str]]:
    outputs = [rank.communicate(timeout=TIMEOUT_SECONDS)[0] for rank in ranks]
    return [rank.returncode for rank in ranks], outputs


def test_two_ranks_killed_while_they_skip(tmp_path: Path, tiny: Callable[..., list[str]]) -> None:
    """Written beside the training, with a kill amid the skipped steps."""
    run_dir = tmp_path / "run"
    overrides = data_parallel(
        tiny,
        run_dir,
        **SMALL,
        training__steps=STEPS,
        training__schedule="constant",
        checkpoint__every=2,
        checkpoint__keep=1,
        health__max_skipped_steps=6,
        logging__every=1,
    )
    fault = {"kind": "huge_rate", "rank": -1, "step": 7}

    def start(**more: object) -> tuple[list[int], list[str]]:
        port, text = free_port(), json.dumps(fault | more)
        return ends([start_rank(rank, 2, port, overrides, WORKER, FAULT=text) for rank in (0, 1)])

    codes, _ = start(signal=int(signal.SIGKILL), at=11)
    assert codes == [-9, -9]
    assert 6 in kept(run_dir)
    manifest = file_sha256(checkpoints.step_directory(run_dir, 6) / "manifest.json")
    codes, outputs = start()
    assert codes == [DIVERGED, DIVERGED], outputs
    assert "continues from" in outputs[0] and "step_00000006" in outputs[0]
    assert file_sha256(checkpoints.step_directory(run_dir, 6) / "manifest.json") == manifest
    fault = {"kind": "nothing", "rank": -1, "step": 0}
    codes, outputs = start()
    assert codes == [0, 0], outputs
    assert f"resumed from {checkpoints.step_directory(run_dir, 6)} at step 6" in outputs[0]
    assert all(map(math.isfinite, curve(run_dir))) and len(curve(run_dir)) == STEPS
