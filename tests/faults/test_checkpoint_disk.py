"""A checkpoint that cannot be written costs nothing but itself."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import re
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from launches import (
    ROOT,
    SMALL,
    TIMEOUT_SECONDS,
    data_parallel,
    environment,
    free_port,
    start_rank,
    training_records,
)
from warm import warm_python

WORKER = Path(__file__).with_name("fault_worker.py")
STEPS = 12
FAILED = "there is no checkpoint of this step, earlier ones are unchanged"


def train(overrides: list[str], **fault: object) -> list[tuple[int, str]]:
    """Exit code and output of both ranks of a run with a fault."""
    port = free_port()
    ranks = [
        start_rank(rank, 2, port, overrides, WORKER, FAULT=json.dumps(fault)) for rank in (0, 1)
    ]
    outputs = [rank.communicate(timeout=TIMEOUT_SECONDS)[0] for rank in ranks]
    return [(rank.returncode, output) for rank, output in zip(ranks, outputs, strict=True)]


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))


def names(*steps: int) -> list[str]:
    return [f"step_{step:08d}" for step in steps]


# Name: fault, and what the warning says.
DISKS: dict[str, tuple[dict[str, object], str]] = {
    "one rank's tensors": (
        {"kind": "full_disk", "rank": 1, "step": 6, "last": 7, "bytes": 100_000},
        "rank 1 cannot write",
    ),
    "rank 0's common part": (
        {"kind": "full_disk_for_common", "rank": 0, "step": 6},
        "common.pt: cannot be written",
    ),
    "rank 0's small files": (
        {"kind": "full_disk", "rank": 0, "step": 6, "last": 7, "bytes": 300},
        "File too large",
    ),
    "no process to write": (
        {"kind": "no_process", "rank": 1, "step": 6},
        "rank 1 cannot write",
    ),
    "processes that never run": (
        {"kind": "lost_forks", "rank": 1, "step": 6, "times": 3},
        "rank 1 cannot write",
    ),
    "the description of the tensors": (
        {"kind": "full_disk_at_the_end", "rank": 0, "step": 6},
        "File too large",
    ),
}


@pytest.mark.parametrize(
    ("name", "asynchronous"),
    [
        ("one rank's tensors", True),
        pytest.param("one rank's tensors", False, marks=pytest.mark.full),
        pytest.param("rank 0's common part", True, marks=pytest.mark.full),
        # Not beside the training: the disk is full for the end of an earlier checkpoint, too.
        pytest.param("rank 0's small files", False, marks=pytest.mark.full),
        pytest.param("no process to write", True, marks=pytest.mark.full),
        pytest.param("processes that never run", True, marks=pytest.mark.full),
        ("the description of the tensors", True),
    ],
)
def test_full_disk_while_training(
    tmp_path: Path, tiny: Callable[..., list[str]], name: str, asynchronous: bool
) -> None:
    """The checkpoint of step 6 fails; those of steps 3, 9 and 12 are written."""
    fault, message = DISKS[name]
    run = tmp_path / "run"
    overrides = data_parallel(
        tiny, run, **SMALL, training__steps=STEPS, checkpoint__every=3, checkpoint__keep=9
    )
    overrides.append(f"checkpoint.async={str(asynchronous).lower()}")
    ended = train(overrides, **fault)
    assert [code for code, _ in ended] == [0, 0], ended
    output = ended[0][1]
    warnings = [line for line in output.splitlines() if FAILED in line]
    assert len(warnings) == 1, output
    (warning,) = warnings
    assert "step_00000006" in warning and message in warning, warning
    assert checkpoints(run) == names(3, 9, 12)
    assert sorted(training_records(run)) == list(range(1, STEPS + 1))


def test_writer_that_never_runs_is_forked_again(
    tmp_path: Path, tiny: Callable[..., list[str]]
) -> None:
    """CPython 3.11 can lose a child in the fork; its checkpoint is written by another one."""
    run = tmp_path / "run"
    overrides = data_parallel(
        tiny, run, **SMALL, training__steps=STEPS, checkpoint__every=3, checkpoint__keep=9
    )
    ended = train(overrides, kind="lost_forks", rank=0, step=6, times=1)
    assert [code for code, _ in ended] == [0, 0], ended
    output = ended[0][1]
    assert len(re.findall(r"process \d+ did not start to write a checkpoint", output)) == 1, output
    assert FAILED not in output
    assert checkpoints(run) == names(3, 6, 9, 12)


def test_last_checkpoint_that_fails_is_an_error_and_is_made_up_for(
    tmp_path: Path, tiny: Callable[..., list[str]]
) -> None:
    run = tmp_path / "run"
    overrides = data_parallel(
        tiny, run, **SMALL, training__steps=STEPS, checkpoint__every=5, checkpoint__keep=2
    )
    ended = train(overrides, kind="no_directory", rank=-1, step=STEPS)
    assert [code for code, _ in ended] == [2, 2], ended
    assert "error: " in ended[0][1] and FAILED in ended[0][1] and str(run) in ended[0][1]
    assert "error: " not in ended[1][1], "it is said once"
    before = training_records(run)
    (run / "checkpoints").unlink()
    (run / "moved").rename(run / "checkpoints")
    assert checkpoints(run) == names(5, 10)

    ended = train(overrides, kind="nothing", rank=0, step=1)
    assert [code for code, _ in ended] == [0, 0], ended
    assert f"resumed from {run / 'checkpoints' / names(10)[0]} at step 10" in ended[0][1]
    assert checkpoints(run) == names(10, 12)
    records = training_records(run)
    assert [records[step]["loss"] for step in records] == [before[step]["loss"] for step in before]


def test_no_place_for_checkpoints_is_found_before_training(
    tmp_path: Path, tiny: Callable[..., list[str]]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").touch()
    overrides = data_parallel(tiny, run, training__steps=STEPS)
    ended = train(overrides, kind="nothing", rank=0, step=1)
    assert [code for code, _ in ended] == [2, 2], ended
    assert f"error: {run / 'checkpoints'}" in ended[0][1]
    assert not training_records(run)


def test_half_a_report_of_what_was_written_is_none() -> None:
    """Megatron takes an empty queue for a failure, which it tells to all ranks."""
    from calm_dist.training.checkpoint.tensor_files import _ResultsFile

    results = _ResultsFile()

    def report() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        sys.dont_write_bytecode = True
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        results.put(list(range(10_000)))

    writer = multiprocessing.get_context("fork").Process(target=report)
    writer.start()
    writer.join()
    assert writer.exitcode == 1
    assert results._file is not None
    assert os.fstat(results._file.fileno()).st_size == 10_000
    with pytest.raises(queue.Empty):
        results.get_nowait()


def test_rank_without_temporary_directory_or_descriptors_does_not_fail_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its OSError would come before a collective, in which the other ranks would wait for it."""
    from megatron.core.dist_checkpointing.strategies.async_utils import (
        AsyncCallsQueue,
        AsyncRequest,
    )

    from calm_dist.training.checkpoint import forks
    from calm_dist.training.checkpoint.tensor_files import _ResultsFile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    results = _ResultsFile()
    results.put("written")
    assert results.get_nowait() == "written"

    calls, soft_and_hard = AsyncCallsQueue(), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, soft_and_hard[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            os.pipe()
        results = _ResultsFile()
        forks.schedule(calls, AsyncRequest(None, (), []))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, soft_and_hard)
    results.put("lost")
    with pytest.raises(queue.Empty):
        results.get_nowait()
    assert calls.get_num_unfinalized_calls() == 1


def test_full_disk_while_an_autoencoder_trains(tmp_path: Path, store: Path) -> None:
    run = tmp_path / "run"
    fault = {"kind": "full_disk", "rank": 0, "step": 4, "last": 5, "bytes": 20_000}
    overrides = {
        "run.dir": run,
        "data.path": store,
        "data.block_size": 64,
        "model.vocab_size": 300,
        "model.hidden_size": 32,
        "model.intermediate_size": 64,
        "training.steps": 6,
        "training.micro_batch_size": 2,
        "training.global_batch_size": 2,
        "checkpoint.every": 2,
        "checkpoint.keep": 9,
        "logging.wandb": "off",
    }
    recipe = ROOT / "recipes" / "autoencoder_tiny.yaml"
    done = subprocess.run(
        [warm_python(), WORKER, recipe, *(f"{key}={value}" for key, value in overrides.items())],
        env=environment(FAULT=json.dumps(fault)),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (warning,) = [line for line in done.stderr.splitlines() if FAILED in line]
    assert "step_00000004" in warning, warning
    assert checkpoints(run) == names(2, 6)
