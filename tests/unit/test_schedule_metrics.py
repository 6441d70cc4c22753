"""Learning-rate schedule and the records of a run."""

from __future__ import annotations

import json
import math
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb

from calm_dist.recipe import Recipe, Training
from calm_dist.runs import metrics
from calm_dist.runs.metrics import MetricsLog
from calm_dist.runs.metrics_file import METRICS_FILE, read_records
from calm_dist.training.schedule import learning_rate


def training(**values: object) -> Training:
    base = {"steps": 110, "micro_batch_size": 1, "global_batch_size": 1, "learning_rate": 2.0}
    return Training.model_validate(base | {"warmup_steps": 10} | values)


def test_warm_up_is_linear_and_reaches_the_rate() -> None:
    rates = [learning_rate(training(), step) for step in range(12)]
    assert rates == pytest.approx([0.2 * n for n in range(1, 11)] + [2.0, 2.0])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [2.0, 2.0, 2.0]),
        ("linear", [2.0, 1.0, 0.02]),
        ("cosine", [2.0, 1.0, 1 + math.cos(math.pi * 0.99)]),
    ],
)
def test_schedule_after_warm_up(schedule: str, expected: list[float]) -> None:
    rates = [learning_rate(training(schedule=schedule), step) for step in (10, 60, 109)]
    assert rates == pytest.approx(expected)


def test_warm_up_stable_decay_in_closed_form() -> None:
    wsd = training(schedule="wsd", decay_steps=20)
    rates = [learning_rate(wsd, step) for step in range(111)]
    assert rates[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert rates[10:90] == [2.0] * 80
    # The last step has one twentieth, the one behind it none.
    assert rates[90:] == pytest.approx([0.1 * n for n in range(20, -1, -1)])


def test_decay_of_all_steps_is_the_linear_schedule() -> None:
    wsd, linear = training(schedule="wsd", decay_steps=100), training(schedule="linear")
    for step in range(111):
        assert learning_rate(wsd, step) == pytest.approx(learning_rate(linear, step))


def test_longer_run_before_the_decay_has_the_same_rates() -> None:
    short = training(schedule="wsd", decay_steps=20)
    long = training(schedule="wsd", decay_steps=20, steps=500)
    assert all(learning_rate(short, step) == learning_rate(long, step) for step in range(91))
    assert learning_rate(short, 91) < learning_rate(long, 91) == 2.0


def test_warm_up_may_exceed_the_steps() -> None:
    short = training(steps=5, warmup_steps=10, schedule="linear")
    assert learning_rate(short, 4) == pytest.approx(1.0)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe.from_dict(
        {
            "run": {"dir": str(tmp_path)},
            "model": {
                "kind": "transformer",
                "vocab_size": 64,
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
            },
            "data": {"path": "x", "block_size": 8},
            "logging": {"every": 1},
            "training": {"steps": 10, "micro_batch_size": 1, "global_batch_size": 1},
        }
    )


VALUES = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1}


def test_lost_steps_are_dropped_on_resume(tmp_path: Path, recipe: Recipe) -> None:
    log = MetricsLog(recipe, tmp_path, resume_step=0)
    for step in range(1, 6):
        log.training_step(step, VALUES, False, 1.0)
    log.evaluation(2, {"brierlm": 1.5})
    log.close()
    # A crash in the middle of a line.
    with (tmp_path / METRICS_FILE).open("a", encoding="utf-8") as file:
        file.write('{"step": 6, "lo')

    log = MetricsLog(recipe, tmp_path, resume_step=3)
    log.training_step(4, VALUES, False, 1.0)
    log.close()
    records = read_records(tmp_path)
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4]
    assert [r for r in records if "eval" in r] == [{"step": 2, "eval": {"brierlm": 1.5}}]
    lines = (tmp_path / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    assert all(json.loads(line) for line in lines)


def two_starts(tmp_path: Path, recipe: Recipe) -> None:
    """Five steps, a crash after the checkpoint of the third, then the rest of eight steps."""
    values = recipe.to_dict()
    values["logging"] |= {"wandb": "offline", "tensorboard": True}
    tracked = Recipe.from_dict(values)
    for resumed, last in ((0, 5), (3, 8)):
        log = MetricsLog(tracked, tmp_path, resume_step=resumed)
        for step in range(resumed + 1, last + 1):
            log.training_step(step, VALUES | {"loss": float(last)}, False, 1.0)
        log.evaluation(last, {"brierlm": 1.5, "kind": "calm"})
        log.close()


def test_a_resumed_run_goes_on_in_its_trackers(tmp_path: Path, recipe: Recipe) -> None:
    """Real wandb (offline) and real TensorBoard event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    two_starts(tmp_path, recipe)
    events = EventAccumulator(str(tmp_path / "logs" / "tensorboard"))
    events.Reload()
    # What the crash has lost is hidden, the steps done again are there once.
    expected = [(step, 5.0) for step in (1, 2, 3)] + [(step, 8.0) for step in range(4, 9)]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == expected
    assert [(e.step, e.value) for e in events.Scalars("eval/brierlm")] == [(8, 1.5)]

    # Its process writes the rest before it ends, as at the end of ours.
    wandb.teardown()
    run_id = (tmp_path / "wandb_id").read_text(encoding="utf-8").split()[0]
    # Named by the second at which they began.
    starts = [read_wandb(file) for file in (tmp_path / "wandb").glob("offline-run-*/*.wandb")]
    starts.sort(key=lambda start: start[1][0]["_step"])
    assert [ids for ids, _ in starts] == [{run_id}, {run_id}]
    first, second = ([(r["_step"], r["loss"]) for r in history] for _, history in starts)
    assert first == [(step, 5.0) for step in range(1, 6)]
    assert second == [(step, 8.0) for step in range(4, 9)]
    assert starts[1][1][-1]["eval/brierlm"] == 1.5


@pytest.mark.parametrize("key", ["", "a" * 40])
def test_a_tracker_that_is_not_reached_keeps_no_run_from_training(
    tmp_path: Path, recipe: Recipe, key: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """No key, and a server that does not answer: the run continues offline."""
    # It reads the environment once.
    wandb.teardown()
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", key)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setattr(metrics, "_WANDB_SECONDS", 2)
        values = recipe.to_dict()
        values["logging"]["wandb"] = "online"
        log = MetricsLog(Recipe.from_dict(values), tmp_path, resume_step=0)
        log.training_step(1, VALUES, False, 1.0)
        log.close()
        wandb.teardown()
    assert f"wandb sync {tmp_path}/wandb/offline-run-*" in capsys.readouterr().err
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert [record["_step"] for record in read_wandb(file)[1]] == [1]


def read_wandb(file: Path) -> tuple[set[str], list[dict[str, float]]]:
    """The ids of the runs in a .wandb file, and its history: records of protobuf in LevelDB's log
    format, in blocks of 32 KiB that begin after wandb's own header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    # Its classes are made when it is imported.
    protocol: Any = wandb_internal_pb2
    data, position, part = file.read_bytes(), 7, b""
    ids: set[str] = set()
    history: list[dict[str, float]] = []
    while position + 7 <= len(data):
        if (room := 32768 - position % 32768) < 7:
            position += room
            continue
        size, kind = struct.unpack_from("<HB", data, position + 4)
        part += data[position + 7 : position + 7 + size]
        position += 7 + size
        # 1: a whole record, 4: the last part of one.
        if kind not in (1, 4):
            continue
        record, part = protocol.Record.FromString(part), b""
        if record.WhichOneof("record_type") == "run":
            ids.add(record.run.run_id)
        elif record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append(
                {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
            )
    return ids, history


@pytest.mark.parametrize("steps", [9, 900, 250_000])
def test_a_step_is_one_line_of_a_terminal(
    tmp_path: Path, recipe: Recipe, steps: int, capsys: pytest.CaptureFixture[str]
) -> None:
    values = recipe.to_dict()
    values["training"] |= {"steps": steps, "global_batch_size": 262_144}
    values["logging"]["every"] = steps
    log = MetricsLog(Recipe.from_dict(values), tmp_path, resume_step=0)
    for loss, norm, seconds in ((15.79689, 12.3456, 0.7), (0.00012345, 1234.5, 3600.0)):
        log.training_step(steps, {"loss": loss, "grad_norm": norm, "learning_rate": 3e-4}, False,
                          seconds)  # fmt: skip
    log.training_step(steps, VALUES | {"grad_norm": math.nan}, True, 1.0)
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and max(map(len, lines)) < 80
    assert lines[0] == (
        f"step {steps}/{steps}  loss 15.797  norm 12.3  lr 3.0e-4  3.00M tok/s  0s left"
    )
    assert lines[2].endswith("norm nan  SKIPPED: gradient not finite")


def test_the_time_left_is_that_of_the_last_steps(
    tmp_path: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Evaluations between steps included, which the seconds of a step do not hold."""
    clock = iter([0, 100, 160, 220, 280])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: float(next(clock)))
    log = MetricsLog(recipe, tmp_path, resume_step=0)
    for step in range(1, 5):
        log.training_step(step, VALUES, False, 2.0)
    log.close()
    left = [line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()]
    assert left == ["18s left", "8m00s left", "7m00s left", "6m00s left"]


def test_record_has_every_documented_field(tmp_path: Path, recipe: Recipe) -> None:
    log = MetricsLog(recipe, tmp_path, resume_step=0)
    log.training_step(3, VALUES, True, 0.5)
    log.close()
    assert read_records(tmp_path) == [
        {
            "step": 3,
            **VALUES,
            "tokens": 24,
            "tokens_per_second": 16.0,
            "step_seconds": 0.5,
            "skipped": 1,
        }
    ]


def test_only_due_steps_and_the_last_are_logged(tmp_path: Path, recipe: Recipe) -> None:
    values = recipe.to_dict()
    values["logging"]["every"] = 4
    log = MetricsLog(Recipe.from_dict(values), tmp_path, resume_step=0)
    for step in range(1, 11):
        log.training_step(step, VALUES, False, 1.0)
    log.close()
    assert [record["step"] for record in read_records(tmp_path)] == [4, 8, 10]


FULL_DISK = """
import resource, sys
from pathlib import Path
from calm_dist.log import show_on_console
from calm_dist.recipe import load_recipe
from calm_dist.runs.metrics import MetricsLog

directory = Path(sys.argv[1])
show_on_console()
log = MetricsLog(load_recipe(directory / "recipe.yaml"), directory, resume_step=0)

def step(number):
    log.training_step(number, {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1}, False, 1.0)

step(1)
# No file of this process may grow beyond this: a full disk, half a record from here.
sys.dont_write_bytecode = True
resource.setrlimit(resource.RLIMIT_FSIZE, (250, resource.RLIM_INFINITY))
step(2)
step(3)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
step(4)
log.close()
"""


def test_a_full_disk_loses_no_record(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stderr.count("training continues") == 1
    lines = (tmp_path / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


FAILING_TRACKER = FULL_DISK.replace(
    "step(2)\nstep(3)\n", "for number in range(2, 300):\n    step(number)\n"
).replace("step(4)", "step(300)")


def test_a_tracker_that_fails_is_dropped(tmp_path: Path, recipe: Recipe) -> None:
    """TensorBoard's thread dies of a full disk, and it raises at every record from then on."""
    values = recipe.to_dict()
    values["logging"] |= {"tensorboard": True, "wandb": "off"}
    text = Recipe.from_dict(values).to_yaml()
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", FAILING_TRACKER, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: TensorBoardTracker failed") == 1, done.stderr
    assert [record["step"] for record in read_records(tmp_path)] == list(range(1, 301))


@pytest.mark.parametrize("place", ["closed", "/dev/full"])
def test_a_lost_file_system_loses_no_record(tmp_path: Path, recipe: Recipe, place: str) -> None:
    """A descriptor of which nothing works any more, or whose half a record cannot be removed."""
    log = MetricsLog(recipe, tmp_path, resume_step=0)
    log.training_step(1, VALUES, False, 1.0)
    descriptor = log._file.fileno()
    kept = os.dup(descriptor)
    os.close(descriptor)
    if place != "closed":
        other = os.open(place, os.O_WRONLY)
        if other != descriptor:
            os.dup2(other, descriptor)
            os.close(other)
    log.training_step(2, VALUES, False, 1.0)
    log.training_step(3, VALUES, False, 1.0)
    os.dup2(kept, descriptor)
    log.training_step(4, VALUES, False, 1.0)
    os.close(descriptor)
    log.training_step(5, VALUES, False, 1.0)
    log.close()
    os.close(kept)
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2, 3, 4]


def test_a_history_that_stays_the_same_is_not_written_again(tmp_path: Path, recipe: Recipe) -> None:
    log = MetricsLog(recipe, tmp_path, resume_step=0)
    for step in range(1, 4):
        log.training_step(step, VALUES | {"grad_norm": math.nan}, False, 1 / 3)
    log.close()
    path = tmp_path / METRICS_FILE
    before, text = path.stat().st_ino, path.read_bytes()
    MetricsLog(recipe, tmp_path, resume_step=3).close()
    assert (path.stat().st_ino, path.read_bytes()) == (before, text)
    # The last line lacks only its end.
    path.write_bytes(text[:-1])
    MetricsLog(recipe, tmp_path, resume_step=3).close()
    assert path.read_bytes() == text


def test_the_last_step_before_a_stop_is_logged(tmp_path: Path, recipe: Recipe) -> None:
    """Otherwise the tokens of a stopped run, and its skipped steps, are those of an earlier one."""
    values = recipe.to_dict()
    values["logging"]["every"] = 4
    log = MetricsLog(Recipe.from_dict(values), tmp_path, resume_step=0)
    for step in range(1, 8):
        log.training_step(step, VALUES, step == 6, 1.0, ends=step == 7)
    log.close()
    assert [(r["step"], r["skipped"]) for r in read_records(tmp_path)] == [(4, 0), (7, 1)]
