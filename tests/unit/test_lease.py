"""Run directories on file systems without `flock`, which a library put before libc stands for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from calm_dist.errors import LaunchError
from calm_dist.runs import lease
from calm_dist.runs.lease import LEASE_FILE, HeldError, Lease, is_leased

CODE = """
import sys, time
from pathlib import Path
from calm_dist.cli.console import run
from calm_dist.runs.directory import acquire_lock, is_held, release_lock
def main():
    run_dir = Path(sys.argv[2])
    if sys.argv[1] == "look":
        print(is_held(run_dir))
        return
    lock = acquire_lock(run_dir)
    print("held", flush=True)
    if sys.argv[1] == "wait":
        time.sleep(600)
    release_lock(lock)
run(main)
"""


def process(what: str, run_dir: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CODE, what, str(run_dir)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def output(what: str, run_dir: Path, environment: dict[str, str]) -> tuple[int, str]:
    started = process(what, run_dir, environment)
    text, _ = started.communicate(timeout=120)
    return started.returncode, text


@pytest.mark.parametrize("number", ["38", "37", "95"])
def test_one_run_at_a_time(tmp_path: Path, without_flock: dict[str, str], number: str) -> None:
    environment = {**without_flock, "NO_FLOCK_ERRNO": number}
    first = process("wait", tmp_path, environment)
    try:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        assert (tmp_path / ".lock").read_text().startswith(f"process {first.pid} on ")
        code, text = output("hold", tmp_path, environment)
        assert code == 2 and f"another run is using {tmp_path} (process {first.pid} on" in text
        assert output("look", tmp_path, environment) == (0, "True\n")
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    # It had no time to give the directory back.
    assert (tmp_path / LEASE_FILE).exists()
    assert output("look", tmp_path, environment) == (0, "False\n")
    assert output("hold", tmp_path, environment) == (0, "held\n")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_other_errors_of_flock_are_not_passed_over(
    tmp_path: Path, without_flock: dict[str, str]
) -> None:
    code, text = output("hold", tmp_path, {**without_flock, "NO_FLOCK_ERRNO": "5"})
    assert code != 0 and "Input/output error" in text


def elsewhere(directory: Path) -> Path:
    """A lease of a process on another machine."""
    owner = {"pid": 7, "host": "elsewhere", "boot": "", "namespace": "", "started": 1, "token": "x"}
    file = directory / LEASE_FILE
    file.write_text(json.dumps(owner) + "\n")
    return file


def test_a_holder_on_another_machine_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1.5)
    file = elsewhere(tmp_path)
    code = (
        "import os, sys, time\n"
        "while os.path.exists(sys.argv[1]):\n    os.utime(sys.argv[1])\n    time.sleep(0.1)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(file)])
    try:
        time.sleep(1)
        with pytest.raises(HeldError, match="process 7 on elsewhere"):
            Lease(tmp_path)
        assert is_leased(tmp_path)
    finally:
        holder.kill()
        holder.wait()
    time.sleep(1.6)
    assert not is_leased(tmp_path)
    held = Lease(tmp_path)
    assert is_leased(tmp_path)
    held.release()
    assert not list(tmp_path.iterdir())


def test_a_lease_is_that_of_its_process_only(tmp_path: Path) -> None:
    held = Lease(tmp_path)
    owner = json.loads((tmp_path / LEASE_FILE).read_text())
    # Another process with the same number, later.
    (tmp_path / LEASE_FILE).write_text(json.dumps({**owner, "started": owner["started"] - 1}))
    assert not is_leased(tmp_path)
    held.release()
    assert (tmp_path / LEASE_FILE).exists()
    Lease(tmp_path).release()
    # Half written, or of something else: not known, so the clock decides.
    (tmp_path / LEASE_FILE).write_text("{")
    assert is_leased(tmp_path)
    os.utime(tmp_path / LEASE_FILE, (1, 1))
    assert not is_leased(tmp_path)


def test_the_same_error_as_with_flock(tmp_path: Path) -> None:
    from calm_dist.runs.directory import acquire_lock, release_lock

    lock = acquire_lock(tmp_path)
    with pytest.raises(LaunchError, match=f"another run is using {tmp_path} \\(process"):
        acquire_lock(tmp_path)
    release_lock(lock)
