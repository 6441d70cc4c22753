"""A console that cannot be written to: its disk is full, or its reader has gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launches import ALONE, ROOT, SMALL, TIMEOUT_SECONDS, environment, recipe, training_records
from warm import warm_python

WORKER = Path(__file__).with_name("fault_worker.py")
TRAIN = ROOT / "tools" / "train.py"
BAD_INPUT, STOPPED = 2, 75
STEPS = 4


@pytest.fixture(params=["full disk", "reader gone"])
def console(request: pytest.FixtureRequest) -> Iterator[int]:
    """A descriptor that every write to fails."""
    if request.param == "full disk":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, descriptor = os.pipe()
        os.close(reader)
    yield descriptor
    os.close(descriptor)


def train(overrides: list[str], console: int, script: Path = TRAIN, **more: str) -> int:
    """Exit code of a training by one process that prints on ``console``."""
    return subprocess.run(
        [warm_python(), str(script), recipe("calm"), *overrides],
        env=environment(**more),
        stdout=console,
        stderr=console,
        timeout=TIMEOUT_SECONDS,
        check=False,
    ).returncode


def test_training_outlives_its_console_and_keeps_its_exit_code(
    tmp_path: Path, tiny: Callable[..., list[str]], console: int
) -> None:
    run = tmp_path / "run"
    overrides = tiny(run, "calm", **ALONE, **SMALL, training__steps=STEPS)
    fault = {"kind": "signal_in", "rank": 0, "step": 2, "number": signal.SIGTERM}
    assert train(overrides, console, WORKER, FAULT=json.dumps(fault)) == STOPPED
    assert sorted(training_records(run)) == [1, 2]
    assert train(overrides, console) == 0
    assert sorted(training_records(run)) == list(range(1, STEPS + 1))
    assert (run / "checkpoints" / f"step_{STEPS:08d}" / "manifest.json").is_file()
    assert train([*overrides, "model.hidden_size=48"], console) == BAD_INPUT


def test_terminal_that_hangs_up_does_not_stop_the_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pseudo-terminal whose other end is closed refuses every write."""
    from calm_dist.progress import TERMINAL, Meter

    ours, theirs = os.openpty()
    monkeypatch.setenv(TERMINAL, os.ttyname(theirs))
    meter = Meter(100, label="train", unit="steps")
    assert b"train" in os.read(ours, 1000)
    os.close(theirs)
    os.close(ours)
    meter._bar.mininterval = 0  # type: ignore[union-attr]
    for _ in range(100):
        meter.advance()
    meter.close()
