"""Progress: lines in logs, none too many; a bar on a terminal, above which lines are whole."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from calm_dist import progress as module
from calm_dist.progress import duration, progress


def seconds_per_item(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Advance the clock by so much with each look at it."""
    clock = iter(range(1_000_000))
    monkeypatch.setattr(module.time, "monotonic", lambda: seconds * next(clock))


def test_lines_show_count_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds_per_item(monkeypatch, 4.0)
    assert list(progress("abcdefgh", 8, label="OUT", unit="documents")) == list("abcdefgh")
    lines = capsys.readouterr().err.splitlines()
    # The third item is done at second 12, the sixth at second 24.
    assert lines == [
        "OUT  3/8 documents  38%  0.25 documents/s  20s left",
        "OUT  6/8 documents  75%  0.25 documents/s  8s left",
    ]


def test_lines_of_an_unknown_total(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds_per_item(monkeypatch, 5.0)
    list(progress("abc", None, label="reading", unit="documents"))
    assert capsys.readouterr().err == "reading  2 documents  0.2 documents/s\n"


def test_a_job_of_hours_writes_few_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds_per_item(monkeypatch, 1.0)
    list(progress(range(36_000), 36_000, label="x", unit="blocks"))
    # Ten hours: every ten seconds for 100 s, then each 10% later, at last every ten minutes.
    assert 80 < len(capsys.readouterr().err.splitlines()) < 130


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.9, "59s"), (148, "2m28s"), (3605, "1h00m"), (141_120, "39h12m"),
     (200_000, "2d7h"), (-3, "0s")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


BARS = """
import sys, time
from calm_dist.progress import Meter
with Meter(3, label="train", unit="steps") as meter:
    for step in range(3):
        time.sleep(0.2)
        meter.advance()
        print("step", step, flush=True)
    print("done", file=sys.stderr)
print("end")
"""


def on_a_terminal(program: str, code: int = 0, **environment: str) -> tuple[str, str]:
    """What a program writes to a terminal of 80 columns, and what into a log, if it has one.

    With CALM_TERMINAL the program's own output goes into a pipe.
    """
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    to_pipe = "CALM_TERMINAL" in environment
    if to_pipe:
        environment["CALM_TERMINAL"] = os.ttyname(theirs)
    target = subprocess.PIPE if to_pipe else theirs
    started = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "COLUMNS": "80", **environment},
        stdout=target,
        stderr=subprocess.STDOUT if to_pipe else theirs,
        text=True,
    )
    log = started.communicate(timeout=60)[0] or ""
    assert started.returncode == code
    os.close(theirs)
    seen = bytearray()
    try:
        while part := os.read(ours, 65536):
            seen += part
    except OSError:
        # How Linux says that the other side is closed.
        pass
    os.close(ours)
    return seen.decode(), log


def test_a_bar_on_a_terminal_and_lines_above_it() -> None:
    seen, _ = on_a_terminal(BARS)
    assert "train  67%|" in seen and " 2/3  " in seen and "left" in seen
    # A terminal shows what follows the last carriage return of a line.
    lines = seen.replace("\r\n", "\n").rstrip("\n").split("\n")
    shown = [line.rpartition("\r")[2] for line in lines]
    assert shown == ["step 0", "step 1", "step 2", "done", "end"]


def test_a_bar_on_a_named_terminal_while_output_goes_into_a_log() -> None:
    seen, log = on_a_terminal(BARS, CALM_TERMINAL="its path")
    assert "train  67%|" in seen
    assert log.splitlines() == ["step 0", "step 1", "step 2", "done", "end"]


def test_a_terminal_that_is_gone_is_done_without(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BARS],
        env={**os.environ, "CALM_TERMINAL": str(tmp_path / "absent" / "tty")},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == ["step 0", "step 1", "step 2", "end"]
    assert done.stderr == "done\n"


def test_an_error_leaves_no_bar_behind() -> None:
    seen, _ = on_a_terminal(BARS.replace("print(", "sys.exit(1) or print(", 1), code=1)
    assert "train  33%|" in seen
    assert seen.rpartition("\r")[2] == ""
