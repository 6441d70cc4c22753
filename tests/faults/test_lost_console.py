"""A console that cannot be written to: its disk is full, or its reader has gone."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import time
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


WAITS = """
import time
from pathlib import Path

from calm_dist.log import outlive_console
from calm_dist.training.stop import StopRequest

outlive_console()
stop = StopRequest()
with stop.listening():
    Path("begun").touch()
    while not stop.requested:
        print("step", flush=True)
        time.sleep(0.01)
print("stopped")
"""


def _enter_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    # The tests may have been started with nohup.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize("wrapper", [[], ["nohup"]])
def test_a_closed_terminal_ends_what_was_not_started_with_nohup(
    tmp_path: Path, wrapper: list[str]
) -> None:
    """As docs/faults.md says of a single process; a signal to stop is still heard."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [*wrapper, sys.executable, "-c", WAITS],
        cwd=tmp_path,
        env=environment(),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=_enter_terminal,
    )
    os.close(theirs)
    try:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / "begun").exists()
        os.close(ours)
        if not wrapper:
            assert process.wait(60) == -signal.SIGHUP
            return
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()


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
