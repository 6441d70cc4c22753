"""The training stream on real ranks: the same batches in every layout, faults without hangs.

All layouts share one launch of four processes, since importing takes most of the time.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from warm import warm_python

from calm_dist.data.latents import plan_store, write_store
from calm_dist.data.stream import open_store
from calm_dist.text.tokenizer import train_tokenizer

REPOSITORY = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("stream_worker.py")
SECONDS = 240

GLOBAL_BATCH = 8
SEED = 3


def write_tokens_store(root: Path, name: str, num_documents: int) -> Path:
    texts = [
        f"{name} document number {i}: " + "some words " * (i % 7) for i in range(num_documents)
    ]
    corpus = root / f"{name}.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_tokenizer(["some words of a document number"], 270, root / "tokenizer.json")
    plan = plan_store([corpus], tokenizer, variant="tokens", block_size=16, patch_size=4)
    write_store(root / name, [corpus], tokenizer, plan, shard_bytes=7 * 64)
    return root / name


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores ``one``, ``two``, and damaged ones, of several small shards each."""
    root = tmp_path_factory.mktemp("stores")
    for name, documents in (("one", 20), ("two", 8), ("flipped", 12), ("missing", 12)):
        write_tokens_store(root, name, documents)
    shard = root / "flipped" / "shard.00003.mds"
    damaged = bytearray(shard.read_bytes())
    damaged[-5] ^= 1
    shard.write_bytes(damaged)
    return root


def start(
    tmp: Path, ranks: int, scenarios: list[dict[str, Any]], python: str | None = None
) -> list[subprocess.Popen]:
    """One process per rank, each leader of a process group of its own."""
    tmp.mkdir(parents=True, exist_ok=True)
    (tmp / "job.json").write_text(json.dumps({"rendezvous": str(tmp), "scenarios": scenarios}))
    # Lock files of other runs on this machine lie elsewhere.
    scratch = tmp.parent / "tmp"
    scratch.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(scratch),
    }
    return [
        subprocess.Popen(
            [
                python or warm_python(),
                WORKER,
                tmp / "job.json",
                str(rank),
                tmp / f"rank{rank}.json",
            ],
            env=environment,
            start_new_session=True,
        )
        for rank in range(ranks)
    ]


def finish(tmp: Path, processes: list[subprocess.Popen]) -> list[dict[str, Any]]:
    """What each rank wrote; all processes are ended, whatever happens."""
    try:
        deadline = time.monotonic() + SECONDS
        for process in processes:
            assert process.wait(max(1.0, deadline - time.monotonic())) == 0
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return [json.loads((tmp / f"rank{rank}.json").read_text()) for rank in range(len(processes))]


def scenario(name: str, ranks: int, replication: int = 1, **more: Any) -> dict[str, Any]:
    paths = more.pop("paths")
    options = {
        "batch_size": more.pop("global_batch", GLOBAL_BATCH) * replication // ranks,
        "replication": replication,
        "seed": SEED,
        "num_workers": more.pop("num_workers", 0),
        "timeout_seconds": 60.0,
        **more.pop("options", {}),
    }
    return {"name": name, "ranks": ranks, "paths": paths, "options": options, "steps": 9, **more}


@pytest.fixture(scope="module")
def results(stores: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    one, two = [str(stores / "one")], [str(stores / "one"), str(stores / "two")]
    mixed: dict[str, Any] = {"paths": two, "options": {"weights": [1.0, 3.0]}, "steps": 20}
    # As a file of a recipe or a checkpoint gives it: lists.
    weights = [[[0, 1.0], [5, 3.0]], [[0, 2.0], [5, 1.0]]]
    changing: dict[str, Any] = {
        "paths": two,
        "options": {"weights": weights, "most_epochs": [None, 2.0]},
        "steps": 24,
    }
    state = open_states(one[0])
    lazily: dict[str, Any] = {"check_on_open_bytes": 0, "steps": 50}
    flipped: dict[str, Any] = {"paths": [str(stores / "flipped")]}
    missing: dict[str, Any] = {
        "paths": [str(stores / "missing")],
        "remove_after_open": str(stores / "missing" / "shard.00002.mds"),
    }
    scenarios = [
        scenario("1 rank", 1, paths=one, steps=20),
        scenario("2 ranks", 2, paths=one, steps=20),
        scenario("4 ranks", 4, paths=one, steps=20),
        scenario("4 ranks, replication 2", 4, 2, paths=one, steps=20),
        scenario("4 ranks, replication 4", 4, 4, paths=one, steps=20),
        scenario("2 nodes of 2 ranks", 4, paths=one, ranks_per_node=2, steps=20),
        scenario("2 nodes, replication 2", 4, 2, paths=one, ranks_per_node=2, steps=20),
        scenario("2 ranks with 2 workers", 2, paths=one, num_workers=2, steps=20),
        scenario("batch 6 on 1 rank", 1, paths=one, global_batch=6),
        scenario("batch 6 on 3 nodes", 3, paths=one, global_batch=6, ranks_per_node=1),
        scenario("mixed on 1 rank", 1, **mixed),
        scenario("mixed on 4 ranks", 4, **copy.deepcopy(mixed)),
        scenario("changing on 1 rank", 1, **copy.deepcopy(changing)),
        scenario("changing on 4 ranks", 4, 2, **copy.deepcopy(changing)),
        scenario("changing with workers", 2, num_workers=2, **copy.deepcopy(changing)),
        *(
            scenario(f"from step {step} on {ranks} ranks", ranks, paths=one, state=at)
            for step, at in state.items()
            for ranks in (4, 2)
        ),
        scenario("resumed with workers", 2, paths=one, num_workers=2, state=state[6]),
        scenario("flipped, on opening", 2, **flipped),
        # Both ranks read the same blocks, so that each meets the fault itself: there is no
        # launcher here that would end the other one.
        scenario("flipped, on first use", 2, 2, **flipped, **lazily),
        scenario("flipped, with workers", 2, 2, num_workers=2, **flipped, **lazily),
        scenario("missing, while reading", 2, 2, **missing, **lazily),
        scenario("missing, on opening", 2, paths=missing["paths"]),
        scenario("too small", 2, paths=one, global_batch=500),
    ]
    tmp = tmp_path_factory.mktemp("run")
    return finish(tmp, start(tmp, 4, scenarios))


def open_states(path: str) -> dict[int, dict[str, Any]]:
    """States in the middle of an epoch, at its end, and in a later one."""
    fingerprint = open_store(path).meta.fingerprint
    identity = {
        "stores": [fingerprint],
        "weights": None,
        "global_batch_size": GLOBAL_BATCH,
        "seed": SEED,
    }
    steps_per_epoch = len(open_store(path)) // GLOBAL_BATCH
    assert 4 < steps_per_epoch < 9
    return {step: {"steps_done": step, **identity} for step in (2, 6, steps_per_epoch)}


def global_steps(results: list[dict[str, Any]], name: str, replication: int = 1) -> list[list[int]]:
    """Per step the sorted blocks of the global batch; replicas are checked to be equal."""
    ranks = [result[name] for result in results if name in result]
    for rank, result in enumerate(ranks):
        assert "error" not in result, result
        assert result == ranks[rank - rank % replication]
    firsts = ranks[::replication]
    return [sorted(joined(parts)) for parts in zip(*(r["steps"] for r in firsts), strict=True)]


def joined(parts: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(parts))


def test_an_epoch_is_whole_batches_without_repetition(
    results: list[dict[str, Any]], stores: Path
) -> None:
    num_blocks = len(open_store(stores / "one"))
    steps_per_epoch = num_blocks // GLOBAL_BATCH
    assert num_blocks % GLOBAL_BATCH
    steps = global_steps(results, "1 rank")
    epochs = [joined(steps[:steps_per_epoch]), joined(steps[steps_per_epoch : 2 * steps_per_epoch])]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == steps_per_epoch * GLOBAL_BATCH
    assert epochs[0] != epochs[1] and set(epochs[0]) != set(epochs[1])
    assert set(joined(steps)) <= set(range(num_blocks))


@pytest.mark.parametrize(
    ("name", "replication"),
    [
        ("2 ranks", 1),
        ("4 ranks", 1),
        ("4 ranks, replication 2", 2),
        ("4 ranks, replication 4", 4),
        ("2 nodes of 2 ranks", 1),
        ("2 nodes, replication 2", 2),
        ("2 ranks with 2 workers", 1),
    ],
)
def test_every_layout_sees_the_same_set_each_step(
    results: list[dict[str, Any]], name: str, replication: int
) -> None:
    assert global_steps(results, name, replication) == global_steps(results, "1 rank")


def test_node_counts_that_do_not_divide_the_batch_see_the_same_sets(
    results: list[dict[str, Any]],
) -> None:
    assert global_steps(results, "batch 6 on 3 nodes") == global_steps(results, "batch 6 on 1 rank")


def test_mixture_has_the_weights_asked_for(results: list[dict[str, Any]], stores: Path) -> None:
    steps = global_steps(results, "mixed on 4 ranks")
    assert steps == global_steps(results, "mixed on 1 rank")
    one, two = len(open_store(stores / "one")), len(open_store(stores / "two"))
    epoch_size = (one + two) // GLOBAL_BATCH * GLOBAL_BATCH
    epoch = joined(steps[: epoch_size // GLOBAL_BATCH])
    assert len(epoch) == epoch_size and max(epoch) < one + two
    assert abs(sum(index >= one for index in epoch) - 0.75 * epoch_size) <= 1


def test_weights_that_change_and_a_limit_give_every_layout_the_same_sets(
    results: list[dict[str, Any]], stores: Path
) -> None:
    steps = global_steps(results, "changing on 1 rank")
    assert steps == global_steps(results, "changing on 4 ranks", 2)
    assert steps == global_steps(results, "changing with workers")
    size = len(open_store(stores / "one"))
    second = [sum(index >= size for index in step) for step in steps]
    # Two thirds, then a quarter, until less than two blocks, its part of a step, could follow.
    assert sum(second[:5]) in (26, 27)
    assert 0 <= 2 * len(open_store(stores / "two")) - sum(second) < 2 and second[-1] == 0
    times = np.bincount(joined(steps))[size:]
    assert times.max() == 2 and sum(times < 2) <= 1


@pytest.mark.parametrize("ranks", [4, 2])
def test_resume_is_exact_within_and_over_an_epochs_end(
    results: list[dict[str, Any]], stores: Path, ranks: int
) -> None:
    unbroken = global_steps(results, "1 rank")
    for step, state in open_states(str(stores / "one")).items():
        name = f"from step {step} on {ranks} ranks"
        assert global_steps(results, name) == unbroken[step : step + 9]
        assert results[0][name]["state"] == {**state, "steps_done": step + 9}
    assert global_steps(results, "resumed with workers") == unbroken[6:15]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flipped, on opening", "flipped/shard.00003.mds: is damaged"),
        ("flipped, on first use", "flipped/shard.00003.mds: is damaged"),
        ("flipped, with workers", "flipped/shard.00003.mds: is damaged"),
        ("missing, while reading", "missing/shard.00002.mds: is missing"),
        ("missing, on opening", "missing/shard.00002.mds: is missing"),
        ("too small", "holds 49 blocks, fewer than one global batch of 500"),
    ],
)
def test_faults_reach_every_rank(results: list[dict[str, Any]], name: str, message: str) -> None:
    for result in results[:2]:
        assert message in result[name]["error"]
        assert "Traceback" not in result[name]["error"]


def segments_of(locks: list[Path]) -> list[Path]:
    """Shared memory of the runs that hold, or held, these lock files."""
    numbers = [lock.stem.removeprefix("run_") for lock in locks]
    return [path for number in numbers for path in Path("/dev/shm").glob(f"{number:0>6}_*")]


def test_restart_after_sigkill_and_two_runs_at_once(stores: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "tmp" / f"calm_dist_{os.getuid()}"
    endless = scenario("endless", 2, paths=[str(stores / "one")], steps=10**9, ready=True)
    # A fork of the warm process would die a moment after the program that asked for it.
    killed = start(tmp_path / "killed", 2, [endless], sys.executable)
    try:
        deadline = time.monotonic() + SECONDS
        while len(list((tmp_path / "killed").glob("*.ready"))) < 2:
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in killed)
            time.sleep(0.1)
    finally:
        for process in killed:
            # The whole process group, as Slurm does: no helper process is left to clean up.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    locks = list(scratch.glob("run_*.lock"))
    assert segments_of(locks), "the killed run left nothing behind: this test shows nothing"

    again = [scenario("again", 2, paths=[str(stores / "one")])]
    runs = {name: start(tmp_path / name, 2, again) for name in ("first", "second")}
    received = [
        global_steps(finish(tmp_path / name, processes), "again")
        for name, processes in runs.items()
    ]
    assert received[0] == received[1] and len(received[0]) == 9
    assert not segments_of(locks)
    assert not list(scratch.glob("run_*.lock"))
