"""Training as a job of two nodes with two ranks each, and all that can come in its way."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster_jobs import Jobs
from launches import ALONE, recipe, run_jobs, training_records

# The limit is far away; USR1 would come 20 s before it.
TWO_BY_TWO = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1"]
TWO_BY_TWO += ["--time=20", "--signal=B:USR1@20"]
STEPS = 60

Tiny = Callable[..., list[str]]


def overrides(tiny: Tiny, run_dir: Path, **more: object) -> list[str]:
    settings = {"training__steps": STEPS, "checkpoint__every": 1000, "parallel__device": "cpu"}
    return tiny(run_dir, "calm", **(settings | more))


def steps_of(run_dir: Path) -> int:
    return max(training_records(run_dir), default=0) if run_dir.is_dir() else 0


def rank_log(run_dir: Path, rank: int, restart: int) -> Path:
    (found,) = run_dir.glob(f"logs/slurm-*/rank{rank:04}.*.restart{restart}.log")
    return found


def process_of_rank(number: str, rank: int) -> int:
    """The process of a rank of a job."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            env = path.read_text(errors="replace").split("\0")
            command = (path.parent / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if {f"SLURM_JOB_ID={number}", f"SLURM_PROCID={rank}"} <= set(env) and any(
            word.endswith("tools/train.py") for word in command[:3]
        ):
            return int(path.parent.name)
    raise AssertionError(f"rank {rank} of job {number} does not run")


def test_a_job_survives_what_clusters_do(jobs: Jobs, tiny: Tiny, tmp_path: Path) -> None:
    """USR1 (as before the time limit), preemption, the death of a node and of a rank: the job is
    requeued after each, and ends in the numbers of a run that met none of it."""
    run_dir, environment = tmp_path / "run", {"RECIPE": recipe("calm")}
    number = jobs.submit("calm_s.sh", TWO_BY_TWO, overrides(tiny, run_dir), **environment)

    def trains_on(restart: int) -> bool:
        """Whether that life of the job has made two steps of its own."""
        logs = list(run_dir.glob(f"logs/slurm-*/rank0000.*.restart{restart}.log"))
        return bool(logs) and logs[0].read_text().count("\nstep ") >= 2

    def nodes() -> str:
        """Where the job runs, as n[1-2]."""
        shown = jobs.call("scontrol", "show", "job", "--oneliner", number)
        return shown.split(" NodeList=")[1].split()[0]

    jobs.wait(lambda: trains_on(0), number)
    jobs.call("scancel", "--batch", "--signal=USR1", number)

    jobs.wait(lambda: trains_on(1), number)
    after_usr1 = steps_of(run_dir)
    # Its nodes: nothing but preemption makes room for this one.
    urgent = ["--partition=urgent", f"--nodelist={nodes()}", "--exclusive", "--wrap=true"]
    other = jobs.call("sbatch", "--parsable", *urgent).strip()

    jobs.wait(lambda: trains_on(2), number)
    assert jobs.states(other) == ["COMPLETED"]
    node = jobs.call("scontrol", "show", "hostnames", nodes()).split()[-1]
    jobs.cluster.kill_node(node)

    jobs.wait(lambda: trains_on(3), number)
    os.kill(process_of_rank(number, 3), signal.SIGKILL)
    assert jobs.wait_for_end(number) == ["COMPLETED"]
    jobs.cluster.start_node(node)

    log = jobs.log(number)
    assert log.count("USR1: the ranks are asked to write a checkpoint and end") == 2
    assert log.count("exit code 75; requeued") == 2
    killed = rank_log(run_dir, 3, restart=3).name.split(".")[1]
    assert f"requeued; the first task to end was {killed}: task 3: Killed" in log
    assert "stopped after step" in log and "resumed from" in log
    assert 2 <= after_usr1 < STEPS
    assert "on 2 nodes" in log and log.count("all-reduce of 64 MiB over 2 nodes") == 2 * 5
    # The dead node is not taken again.
    assert node not in rank_log(run_dir, 3, restart=3).name

    run_jobs(4, [("calm", overrides(tiny, tmp_path / "unbroken"))], tmp_path)
    survived, unbroken = training_records(run_dir), training_records(tmp_path / "unbroken")
    assert sorted(survived) == sorted(unbroken) == list(range(1, STEPS + 1))
    for step, record in unbroken.items():
        assert survived[step]["loss"] == record["loss"], step


@pytest.mark.full
def test_deepspeed_launches_on_one_node(jobs: Jobs, tiny: Tiny, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    options = [*TWO_BY_TWO, "--nodes=1"]
    environment = {"RECIPE": recipe("calm"), "CALM_LAUNCHER": "deepspeed", "DS_ACCELERATOR": "cpu"}
    settings = overrides(tiny, run_dir, **ALONE)
    number = jobs.submit("calm_s.sh", options, settings, **environment)
    jobs.wait(lambda: steps_of(run_dir) >= 2, number)
    jobs.call("scancel", "--batch", "--signal=USR1", number)
    assert jobs.wait_for_end(number) == ["COMPLETED"], jobs.log(number)
    log = jobs.log(number)
    assert "exit code 75; requeued" in log and "resumed from" in log
    assert json.loads((run_dir / "environment.json").read_text())["launcher"] == "deepspeed"
    assert sorted(training_records(run_dir)) == list(range(1, STEPS + 1))


def test_a_job_that_gets_nowhere_is_not_requeued_for_ever(
    jobs: Jobs, tiny: Tiny, tmp_path: Path
) -> None:
    """Every start of its ranks fails before the first step, or its preflight is killed."""

    def submit(name: str, fault: str, *options: str) -> str:
        python = tmp_path / name
        real = jobs.environment["CALM_PYTHON"]
        python.write_text(f'#!/bin/bash\ncase "$1" in {fault} ;; esac\nexec "{real}" "$@"\n')
        python.chmod(0o755)
        settings = {"RECIPE": recipe("calm"), "CALM_PYTHON": str(python), "CALM_PREFLIGHT": "0"}
        return jobs.submit(
            "calm_s.sh",
            [*TWO_BY_TWO, *options],
            overrides(tiny, tmp_path / f"run_{name}"),
            **settings,
            CALM_MAX_FAILURES="2",
        )

    failing = '*tools/train.py) echo "Error: no luck"; exit 1'
    numbers = [
        submit("failing", failing),
        submit("alone", failing, "--no-requeue"),
        submit("killed", "*tools/preflight.py) kill -9 $$"),
    ]
    assert jobs.wait_for_end(*numbers) == ["FAILED"] * 3
    assert [jobs.exit_code(number) for number in numbers] == [1, 1, 137]
    log, alone, killed = map(jobs.log, numbers)
    assert log.count("exit code 1; requeued") == 1
    assert "exit code 1; not requeued: 2 starts in a row made no progress" in log
    # The words of a rank are in the job's own log, with the file and so the node they are from.
    assert re.search(r"rank0003\.n\d+\.restart0\.log\nError: no luck", log)
    assert "exit code 1; not requeued: it was submitted with --no-requeue" in alone
    assert killed.count("exit code 137; requeued") == 1
    assert "exit code 137; not requeued: 2 starts in a row made no progress" in killed


def test_what_is_wrong_is_said_before_any_rank_starts(
    jobs: Jobs, tiny: Tiny, tmp_path: Path
) -> None:
    """A layout that the header's tasks do not fit; nodes without the GPUs that were promised."""
    good = overrides(tiny, tmp_path / "run")
    three = [*TWO_BY_TWO, "--ntasks-per-node=3"]
    on_gpus = [word for word in good if not word.startswith("parallel.device")]
    environment = {"RECIPE": recipe("calm")}
    numbers = [
        jobs.submit("calm_s.sh", three, good, **environment),
        jobs.submit("calm_s.sh", TWO_BY_TWO, [*good, "training.stepz=1"], **environment),
        jobs.submit("calm_s.sh", TWO_BY_TWO, on_gpus, **environment),
    ]
    assert jobs.wait_for_end(*numbers) == ["FAILED"] * 3
    assert [jobs.exit_code(number) for number in numbers] == [2, 2, 2]
    tasks, field, gpus = map(jobs.log, numbers)
    assert "parallel.world_size: 6 processes cannot be cut into replicas" in tasks
    assert "training.stepz" in field
    assert "error: node n" in gpus and "torch finds 0 GPUs for 2 ranks" in gpus
    assert "not requeued" in gpus and not (tmp_path / "run" / "metrics.jsonl").exists()
