"""Lists of run directories: what is there, what is no run, and what is damaged."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from calm_dist.errors import LaunchError, StoppedError
from calm_dist.recipe import load_recipe
from calm_dist.runs.checkpoints.run_state import RunState
from calm_dist.runs.directory import (
    acquire_lock,
    end_recorded,
    is_held,
    release_lock,
    write_environment,
)
from calm_dist.runs.listing import describe, list_runs, table
from calm_dist.runs.metrics import MetricsLog
from calm_dist.scores import MARK_EXPLAINED

ROOT = Path(__file__).parents[2]
VALUES = {"loss": 1.5, "grad_norm": 1.0, "learning_rate": 0.1}


def make_run(run_dir: Path, *overrides: str, steps: int = 3, kind: str = "transformer") -> Path:
    """What a training of so many steps leaves, but for its checkpoints."""
    run_dir.mkdir(parents=True)
    recipe = load_recipe(
        ROOT / "recipes" / f"{kind}_tiny.yaml", [f"run.dir={run_dir}", "logging.wandb=off",
                                                 "training.steps=10", *overrides]
    )  # fmt: skip
    (run_dir / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    write_environment(run_dir, {"world_size": 1})
    log = MetricsLog(recipe, run_dir, resume_step=0)
    for step in range(1, steps + 1):
        log.training_step(step, VALUES | {"loss": 1.0 / step}, False, 0.5 * step)
    log.close()
    return run_dir


def add_checkpoint(run_dir: Path, step: int) -> None:
    directory = run_dir / "checkpoints" / f"step_{step:08d}"
    directory.mkdir(parents=True)
    (directory / "manifest.json").write_text("{}")
    (directory / "recipe.yaml").write_text((run_dir / "recipe.yaml").read_text())


def append(run_dir: Path, text: str) -> None:
    with (run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(text)


def end(run_dir: Path, error: BaseException | None) -> None:
    """End a start of a run, as the training's session does."""
    try:
        with end_recorded(run_dir):
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error


def test_the_facts_of_a_run(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "a", "run.name=first try")
    add_checkpoint(run_dir, 2)
    (run_dir / "checkpoints" / "step_00000003.tmp").mkdir()
    append(
        run_dir, '{"step": 2, "eval": {"brierlm": 4.5}}\n{"step": 3, "eval": {"brierlm": 5.5}}\n'
    )
    append(run_dir, '{"step": 4, "lo')
    row = describe(run_dir)
    idle = row.pop("idle_seconds")
    assert 0 <= idle < 3600
    # 4 blocks of 512 tokens in 0.5, 1.0 and 1.5 seconds: the median.
    assert row == {
        "path": str(run_dir), "name": "first try", "kind": "transformer", "state": "failed",
        "reason": "ended unexpectedly: killed, or the node failed", "step": 3, "steps": 10,
        "loss": pytest.approx(1 / 3), "tokens_per_second": 2048.0, "checkpoint": 2,
        "brierlm": 5.5, "brierlm_stderr": None, "brier": None, "brier_stderr": None,
        "noisy_brier": [], "token_accuracy": None,
    }  # fmt: skip
    # What a program reads.
    assert json.loads(json.dumps(row))


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (None, "finished", None),
        (StoppedError("stopped after step 3"), "stopped", "stopped after step 3"),
        (KeyboardInterrupt(), "stopped", "Ctrl-C"),
        (RuntimeError("NCCL gave up"), "failed", "RuntimeError: NCCL gave up"),
    ],
)
def test_how_a_run_ended(
    tmp_path: Path, error: BaseException | None, state: str, reason: str | None
) -> None:
    run_dir = make_run(tmp_path / "run")
    end(run_dir, error)
    row = describe(run_dir)
    assert (row["state"], row["reason"]) == (state, reason)
    assert json.loads((run_dir / "environment.json").read_text())["world_size"] == 1


def test_a_run_that_ended_amid_skipped_steps_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    add_checkpoint(run, 3)
    end(run, None)
    state = RunState(step=3, skipped_in_a_row=2, data={"steps_done": 3})
    state.write(run / "checkpoints" / "step_00000003")
    row = describe(run)
    assert row["state"] == "finished" and "its last 2 steps were skipped" in row["reason"]


def test_a_run_at_work_is_seen_and_not_disturbed(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    assert not is_held(run_dir)
    lock = acquire_lock(run_dir)
    assert describe(run_dir)["state"] == "running"
    with pytest.raises(LaunchError, match="another run is using"):
        acquire_lock(run_dir)
    release_lock(lock)
    assert describe(run_dir)["state"] == "failed"
    # Whoever looks at the very moment of a start must not keep it from starting.
    code = (
        "import fcntl, sys, time\n"
        f"lock = open({str(run_dir / '.lock')!r})\n"
        "fcntl.flock(lock, fcntl.LOCK_SH)\n"
        "print('held', flush=True)\n"
        "time.sleep(0.05)\n"
    )
    looking = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert looking.stdout is not None and looking.stdout.readline() == b"held\n"
    release_lock(acquire_lock(run_dir))
    looking.communicate()


def test_runs_are_found_below_directories(tmp_path: Path) -> None:
    for name in ("runs/b", "runs/deep/er/a", "elsewhere/c"):
        add_checkpoint(make_run(tmp_path / name), 3)
    store = tmp_path / "runs" / "store"
    (store / "inside").mkdir(parents=True)
    (store / "index.json").touch()
    (store / "inside" / "metrics.jsonl").touch()
    os.symlink(tmp_path, tmp_path / "runs" / "loop")
    os.symlink(tmp_path / "gone", tmp_path / "runs" / "dangling")
    # Runs elsewhere are found by their links, and by their own name where both are looked at.
    os.symlink(tmp_path / "elsewhere" / "c", tmp_path / "runs" / "a_link")
    os.symlink(make_run(tmp_path / "scratch"), tmp_path / "runs" / "z_link")
    rows = list_runs([tmp_path / "runs", tmp_path / "runs" / "b", tmp_path / "elsewhere"])
    found = [Path(row["path"]).relative_to(tmp_path).as_posix() for row in rows]
    assert found == ["elsewhere/c", "runs/b", "runs/deep/er/a", "runs/z_link"]


def test_imported_and_older_runs(tmp_path: Path) -> None:
    imported = make_run(tmp_path / "imported", steps=0)
    (imported / "environment.json").unlink()
    add_checkpoint(imported, 0)
    row = describe(imported)
    assert (row["state"], row["step"], row["loss"]) == ("not started", 0, None)
    # Of a version that did not write how a run ended.
    older = make_run(tmp_path / "older", steps=10)
    add_checkpoint(older, 10)
    assert describe(older)["state"] == "finished"


DAMAGE = {
    "no recipe": lambda run: (run / "recipe.yaml").unlink(),
    "half a recipe": lambda run: (run / "recipe.yaml").write_text("run: {dir: [1,"),
    "another file": lambda run: (run / "recipe.yaml").write_text("model: 3\n"),
    "a recipe that is a directory": lambda run: (
        (run / "recipe.yaml").unlink(), (run / "recipe.yaml").mkdir()
    ),
    "metrics that are a directory": lambda run: (
        (run / "metrics.jsonl").unlink(), (run / "metrics.jsonl").mkdir()
    ),
    "a damaged environment": lambda run: (run / "environment.json").write_text("[]"),
    "half an environment": lambda run: (run / "environment.json").write_text('{"ended": {}}'),
    "an end of another kind": lambda run: (run / "environment.json").write_text(
        '{"ended": {"how": "vanished"}}'
    ),
    "an environment that is no text": lambda run: (run / "environment.json").write_bytes(b"\xff"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_shown_and_nothing_fails(tmp_path: Path, damage: str) -> None:
    make_run(tmp_path / "whole")
    DAMAGE[damage](make_run(tmp_path / "broken"))
    broken, whole = list_runs([tmp_path])
    assert broken["state"] == "damaged"
    # The file, and nothing of Python.
    assert re.match(r"(recipe\.yaml|metrics\.jsonl|environment\.json): ", broken["reason"])
    assert "Error" not in broken["reason"]
    assert whole["state"] == "failed"
    text = table([broken, whole])
    assert broken["reason"] in text and len(text.splitlines()) == 5


def test_binary_and_odd_records_are_passed_over(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(b"\x00\xff\n[1]\n" + b'{"step": 3, "eval": {"brierlm": "high"}}\n"eval"\n')
        file.write(b'{"step": "x", "loss": 1}\n{"step": 1e400, "loss": 1}\n')
        file.write(b'{"step": 4, "loss": null, "tokens_per_second": 1' + b"0" * 400 + b"}\n")
        for score in ("NaN", "true", "1e400"):
            line = '{"step": 4, "eval": {"brierlm": ' + score + "}}\n"
            file.write(line.encode())
    row = describe(run_dir)
    assert (row["step"], row["loss"], row["brierlm"]) == (4, None, None)
    append(run_dir, '{"step": 5, "loss": 1e400, "tokens_per_second": NaN}\n')
    assert describe(run_dir)["loss"] is None and "nan" not in table([describe(run_dir)])
    assert "4/10" in table([row])


def test_odd_names_do_not_tear_the_table(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    recipe = (run_dir / "recipe.yaml").read_text().replace("name: null", r'name: "a\nb\u202e%s"')
    (run_dir / "recipe.yaml").write_text(recipe % ("x" * 300))
    row = describe(run_dir)
    assert row["name"] == "a?b?" + "x" * 76 and len(table([row]).splitlines()) == 3


def test_of_one_step_the_larger_evaluation_counts(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    for step, blocks, score in ((2, 99, 1.0), (3, 64, 2.0), (3, 4, 3.0)):
        record = {"step": step, "eval": {"brierlm": score, "protocol": {"blocks": blocks}}}
        append(run_dir, json.dumps(record) + "\n")
    assert describe(run_dir)["brierlm"] == 2.0


def test_scores_are_listed_with_errors_and_marked(tmp_path: Path) -> None:
    """Also those of early versions, without errors, and damaged ones."""
    scores: dict[str, Any] = {
        "brierlm": 0.6,
        "brierlm_stderr": 0.08,
        "brier": [0.0592, 0.0081, 0.0026, 0.001],
    }
    stored = {
        "a_noisy": scores | {"brier_stderr": [0.0014, 0.0005, 0.0003, 0.0006]},
        "b_clear": scores | {"brier_stderr": [0.0014, 0.0005, 0.0003, 0.0002]},
        "c_early": {"brierlm": 5.5},
        "d_damaged": scores | {"brier": "x", "brier_stderr": [None, 1]},
    }
    for name, result in stored.items():
        append(make_run(tmp_path / name), json.dumps({"step": 3, "eval": result}) + "\n")
    rows = list_runs([tmp_path])
    assert [row["noisy_brier"] for row in rows] == [[4], [], [], []]
    assert rows[0]["brier_stderr"] == stored["a_noisy"]["brier_stderr"]
    assert rows[3]["brier"] is None is rows[3]["brier_stderr"]
    assert json.loads(json.dumps(rows)) == rows
    lines = [re.split(r" {2,}", line) for line in table(rows).splitlines() if line[0] != " "]
    assert [line[-3:] for line in lines[:-1]] == [
        ["score", "Brier-1 x100", "Brier-2 x100"],
        ["0.60* ± 0.08", "5.92 ± 0.14", "0.81 ± 0.05"],
        ["0.60 ± 0.08", "5.92 ± 0.14", "0.81 ± 0.05"],
        ["5.50", "–", "–"],
        ["0.60 ± 0.08", "–", "–"],
    ]
    assert lines[-1] == [MARK_EXPLAINED]
    assert MARK_EXPLAINED not in table(rows[1:])


def test_the_command(tmp_path: Path) -> None:
    autoencoder = make_run(tmp_path / "ae", kind="autoencoder")
    append(autoencoder, '{"step": 3, "eval": {"token_accuracy": 0.9876}}\n')
    end(autoencoder, None)
    tool = [sys.executable, str(ROOT / "tools" / "runs.py")]
    done = subprocess.run([*tool, str(tmp_path)], capture_output=True, text=True, timeout=60)
    header, line = done.stdout.splitlines()
    assert done.returncode == 0 and header.startswith("run ")
    assert line.split()[1:5] == ["autoencoder", "finished", "3/10", "0.33333"]
    assert line.endswith("98.76%")
    options = ["--json", "-"]
    done = subprocess.run([*tool, *options, str(tmp_path)], capture_output=True, text=True)
    assert [row["token_accuracy"] for row in json.loads(done.stdout)] == [0.9876]
    odd = Path(os.fsdecode(bytes(tmp_path) + b"/n\xf6ne"))
    autoencoder.rename(odd)
    done = subprocess.run([*tool, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0 and "n\\udcf6ne" in done.stdout
    done = subprocess.run([*tool, str(tmp_path / "absent")], capture_output=True, text=True)
    assert done.returncode == 2 and "no such directory" in done.stderr
    (tmp_path / "empty").mkdir()
    done = subprocess.run([*tool, str(tmp_path / "empty")], capture_output=True, text=True)
    assert done.stdout.startswith("no run directories") and done.returncode == 0


def test_a_run_that_failed_after_its_last_checkpoint_is_finished(tmp_path: Path) -> None:
    """Starting it again has nothing to do, and changes nothing."""
    run_dir = make_run(tmp_path / "run")
    add_checkpoint(run_dir, 10)
    end(run_dir, RuntimeError("a peer was lost"))
    assert (describe(run_dir)["state"], describe(run_dir)["reason"]) == ("finished", None)
