"""A rank that hangs is named with step and phase within the configured time, and all ranks end."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launches import (
    TIMEOUT_SECONDS,
    data_parallel,
    environment,
    free_port,
    recipe,
    start_rank,
    torchrun,
    training_records,
)

from calm_dist.parallel.peers import Status
from calm_dist.runs.listing import describe
from calm_dist.training.watchdog import BACKWARD, WAITING, WORKING, find_culprits

WORKER = Path(__file__).with_name("fault_worker.py")
HUNG = 5
# health.timeout_seconds, and what all of the ending may take beyond it on a busy machine.
LIMIT_SECONDS = 10.0
ENDING_SECONDS = 15.0


def fault(kind: str, **arguments: object) -> dict[str, str]:
    return {"FAULT": json.dumps({"kind": kind, **arguments})}


def hanging_run(tiny: Callable[..., list[str]], run_dir: Path, **more: object) -> list[str]:
    values: dict[str, object] = {
        "training__steps": 100_000,
        "training__schedule": "constant",
        "health__timeout_seconds": LIMIT_SECONDS,
    }
    return data_parallel(tiny, run_dir, **(values | more))


def wait_for_step(run_dir: Path, step: int, ranks: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while step not in training_records(run_dir):
        if any(rank.poll() is not None for rank in ranks):
            pytest.fail(f"the run ended too early: {ends(ranks)}")
        assert time.monotonic() < deadline
        # Each look reads all records of a run that makes many steps a second.
        time.sleep(0.1)


def ends(ranks: list[subprocess.Popen[str]]) -> tuple[list[int], str]:
    """Exit codes and all output."""
    outputs = [rank.communicate(timeout=TIMEOUT_SECONDS)[0] for rank in ranks]
    return [rank.returncode for rank in ranks], "".join(outputs)


@contextlib.contextmanager
def two_ranks(
    overrides: list[str], python: str | None = None, **more: str
) -> Iterator[list[subprocess.Popen[str]]]:
    port = free_port()
    ranks = [start_rank(rank, 2, port, overrides, WORKER, python, **more) for rank in (0, 1)]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def verdict(output: str) -> str:
    """The one sentence that says who hangs. The other of two ranks repeats it if its connection
    breaks before its watchdog has read the verdict."""
    lines = [line for line in output.splitlines() if "the run hangs" in line]
    assert len(set(lines)) == 1 and len(lines) <= 2, output[-4000:]
    return lines[0]


SYNCHRONOUS = {"checkpoint__every": 2, "checkpoint__async": False}
# Kind of fault, what else it needs, the rank, the phase and a frame that must be named.
STUCK = [
    ("sleep_in_forward", {}, 1, "step 3, phase 'forward and backward'", "stuck_here"),
    ("sleep_in_reader", {}, 0, "step 2, phase 'data'", "stuck_here"),
    ("sleep_in_checkpoint", SYNCHRONOUS, 0, "phase 'checkpoint'", "checkpoint"),
    ("hold_interpreter", {}, 1, "wait for it in step 3", ""),
]


@pytest.mark.parametrize(
    ("kind", "more", "rank", "where", "frame"),
    [STUCK[0], *(pytest.param(*case, marks=pytest.mark.full) for case in STUCK[1:])],
    ids=[case[0] for case in STUCK],
)
def test_stuck_rank_is_named(
    tmp_path: Path,
    tiny: Callable[..., list[str]],
    kind: str,
    more: dict[str, object],
    rank: int,
    where: str,
    frame: str,
) -> None:
    run_dir = tmp_path / "run"
    given = fault(kind, rank=rank, step=3)
    with two_ranks(hanging_run(tiny, run_dir, **more), **given) as ranks:
        wait_for_step(run_dir, 1, ranks)
        started = time.monotonic()
        codes, output = ends(ranks)
    seconds = time.monotonic() - started
    line = verdict(output)
    assert "Traceback" not in output
    assert f"rank {rank} (" in line and f"rank {1 - rank} (" not in line
    assert where in line and frame in line
    # What holds its interpreter cannot end itself; the other rank ends it.
    own = -signal.SIGKILL if kind == "hold_interpreter" else HUNG
    assert (codes[rank], codes[1 - rank]) == (own, HUNG), output[-3000:]
    assert LIMIT_SECONDS - 1 < seconds < LIMIT_SECONDS + ENDING_SECONDS


@pytest.mark.full
@pytest.mark.parametrize("rank", [0, 1])
def test_stopped_rank_is_named_and_ended(
    tmp_path: Path, tiny: Callable[..., list[str]], rank: int
) -> None:
    """Rank 0 serves the store through which ranks know of each other."""
    run_dir = tmp_path / "run"
    nothing = fault("nothing", rank=-1, step=0)
    # Only an interpreter of its own is stopped itself.
    with two_ranks(hanging_run(tiny, run_dir), sys.executable, **nothing) as ranks:
        wait_for_step(run_dir, 3, ranks)
        ranks[rank].send_signal(signal.SIGSTOP)
        started = time.monotonic()
        codes, output = ends(ranks)
    seconds = time.monotonic() - started
    line = verdict(output)
    name = f"rank {rank} (" if rank else "rank 0 at 127.0.0.1:"
    assert name in line, line
    assert ("does not answer" if rank == 0 else "gives no sign of life") in line
    assert (codes[rank], codes[1 - rank]) == (-signal.SIGKILL, HUNG)
    assert LIMIT_SECONDS - 1 < seconds < LIMIT_SECONDS + ENDING_SECONDS


def children_of(launcher: subprocess.Popen[str]) -> list[int]:
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(launcher.pid)], capture_output=True, text=True
    )
    return [int(pid) for pid in listed.stdout.split()]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def start_torchrun(
    overrides: list[str], given: dict[str, str], *, fresh: bool
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        torchrun(2, WORKER, recipe("calm"), *overrides, fresh=fresh),
        env=environment(**given),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_run_under_torchrun(tmp_path: Path, tiny: Callable[..., list[str]]) -> None:
    """A second run is refused, ranks die with their launcher, a stopped rank ends the run."""
    run_dir = tmp_path / "run"
    overrides = hanging_run(tiny, run_dir, checkpoint__every=1)
    # Fresh: forks of the warm process have another parent than their launcher.
    launcher = start_torchrun(overrides, fault("nothing", rank=-1, step=0), fresh=True)
    wait_for_step(run_dir, 3, [launcher])
    ranks = children_of(launcher)
    assert len(ranks) == 2

    second = start_rank(0, 1, free_port(), overrides)
    (code,), output = ends([second])
    assert code == 2 and f"another run is using {run_dir} (process {ranks[0]} on" in output
    done = max(training_records(run_dir))
    wait_for_step(run_dir, done + 1, [launcher])

    launcher.kill()
    started = time.monotonic()
    launcher.wait()
    while any(map(is_running, ranks)):
        assert time.monotonic() - started < 5.0, "ranks outlive their launcher"
        time.sleep(0.02)
    # A writer that a rank had just forked may hold the directory for an instant longer.
    while (row := describe(run_dir))["state"] == "running":
        assert time.monotonic() - started < 20.0
        time.sleep(0.02)
    assert row["state"] == "failed" and "ended unexpectedly" in row["reason"]

    # Neither port nor run directory are held by what was left. After some steps, rank 1 stops.
    at = max(training_records(run_dir)) + 4
    stop = fault("nothing", rank=1, step=0, signal=signal.SIGSTOP, at=at)
    launcher = start_torchrun(overrides, stop, fresh=False)
    # It has an end only when no rank is left that could write to it.
    output, _ = launcher.communicate(timeout=TIMEOUT_SECONDS)
    assert launcher.returncode != 0
    assert max(training_records(run_dir)) == at - 1
    assert "gives no sign of life" in verdict(output)
    assert f"exitcode  : {HUNG}" in output


@pytest.mark.full
def test_ranks_die_with_deepspeed(tmp_path: Path, tiny: Callable[..., list[str]]) -> None:
    run_dir = tmp_path / "run"
    deepspeed = Path(sys.executable).with_name("deepspeed")
    command = [str(deepspeed), "--num_accelerators", "2", "--master_port", str(free_port())]
    launcher = subprocess.Popen(
        [*command, str(WORKER), recipe("calm"), *hanging_run(tiny, run_dir)],
        env=environment(DS_ACCELERATOR="cpu", **fault("nothing", rank=-1, step=0)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    wait_for_step(run_dir, 3, [launcher])
    (node,) = children_of(launcher)
    ranks = [int(p) for p in Path(f"/proc/{node}/task/{node}/children").read_text().split()]
    assert len(ranks) == 2
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 5.0
    while any(map(is_running, ranks)):
        assert time.monotonic() < deadline, "ranks outlive their launcher"
        time.sleep(0.02)


def status(doing: int, entered: int, **more: object) -> Status:
    return Status("host", doing=doing, entered=entered, **more)  # type: ignore[arg-type]


# What each rank does, who is silent, who is stuck, and who is named.
JUDGED = {
    "one sleeps, one waits for it": ((WORKING, 8), (WAITING, 8), set(), {0, 1}, [0]),
    "one waits for one that continues": ((WORKING, 8), (WAITING, 8), set(), {1}, []),
    "one is silent": ((WORKING, 8), (WAITING, 8), {0}, {1}, [0]),
    "one may wait in its backward pass": ((BACKWARD, 8), (WORKING, 9), set(), {0, 1}, [1]),
    "both wait for each other": ((WAITING, 7), (WAITING, 8), set(), {0, 1}, [0]),
    "on GPUs nobody is seen to wait": ((WORKING, 7), (WORKING, 8), set(), {0, 1}, [0]),
    "a slow one is behind": ((WORKING, 7), (WORKING, 8), set(), {1}, []),
    "nobody is stuck": ((WORKING, 7), (WORKING, 8), set(), set(), []),
}


@pytest.mark.parametrize("case", JUDGED.values(), ids=JUDGED)
def test_who_is_to_blame(case: tuple) -> None:
    *ranks, silent, stuck, culprits = case
    statuses = {number: status(*rank) for number, rank in enumerate(ranks)}
    assert find_culprits(statuses, silent, stuck) == culprits


def test_rank_that_left_is_not_to_blame() -> None:
    statuses = {0: status(WORKING, 7, left=True), 1: status(WAITING, 8)}
    assert find_culprits(statuses, {0}, {0, 1}) == [1]
