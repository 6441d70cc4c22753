"""Faults after which a run continues, or the same command does: numbers that are not
finite on one of several ranks, a full disk, a clock that jumps, a shard that is lost or damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launches import ALONE, TIMEOUT_SECONDS, free_port, recipe, start_rank, training_records

WORKER = Path(__file__).with_name("jobs_worker.py")
BAD_INPUT, DIVERGED = 2, 4
STEPS, BAD = 5, 3
# Of the runs that read a store in shards; an epoch of it has six steps.
DATA_STEPS = 10
SHARD = "shard.00007.mds"

# Kind of model, and how it is divided.
SHALLOW: dict[str, object] = ALONE | {"model__num_hidden_layers": 2}
LAYOUTS: dict[str, tuple[str, dict[str, object]]] = {
    "dp2": ("calm", SHALLOW),
    "pp2": ("calm", SHALLOW | {"parallel__pipeline_parallel_size": 2}),
    "autoencoder": ("autoencoder", {}),
}
# The first module of a rank is of its backbone, the last one of a last stage is the head.
BACKBONE, HEAD = 0, -1


def gradient(rank: int, part: int, value: str, last: int = BAD) -> dict[str, Any]:
    return {
        "kind": "bad_gradient",
        "rank": rank,
        "step": BAD,
        "last": last,
        "part": part,
        "value": value,
    }


def batch(value: str) -> dict[str, Any]:
    return {"kind": "bad_batch", "rank": 1, "step": BAD, "last": BAD, "value": value}


ON_PURPOSE = {"kind": "skip", "rank": -1, "step": BAD}
# With replicas every rank has backbone and head; of two stages only the last one has the head.
FAULTS = {
    "dp2": {
        "backbone_gradient": gradient(1, BACKBONE, "nan"),
        "head_gradient": gradient(0, HEAD, "inf"),
        "batch": batch("inf"),
    },
    "pp2": {
        "backbone_gradient": gradient(0, BACKBONE, "-inf"),
        "head_gradient": gradient(1, HEAD, "nan"),
        "batch": batch("nan"),
    },
    "autoencoder": {
        "gradient": gradient(0, BACKBONE, "nan"),
        "loss": {"kind": "bad_loss", "rank": 1, "step": BAD, "last": BAD},
    },
}
KINDS = ("calm", "autoencoder")
CASES = [(layout, name) for layout, named in FAULTS.items() for name in named]
# What happens to the shard, to which model, and what is said of it.
BAD_SHARDS: dict[str, tuple[str, dict[str, object], str]] = {
    "flipped": ("calm", {"flipped": True}, "is damaged"),
    "lost": ("calm", {"hashed": False}, "is missing"),
    "lost_to_autoencoder": ("autoencoder", {}, "is missing"),
}


@pytest.fixture(scope="module")
def shards(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of `launches`, in shards of four blocks."""
    from calm_dist.data.latents import plan_store, write_store
    from calm_dist.interop.huggingface import load_autoencoder
    from calm_dist.text.tokenizer import load_tokenizer

    corpus, autoencoder = [str(store.parent / "corpus.txt")], store.parent / "autoencoder"
    tokenizer = load_tokenizer(store.parent / "t.json")
    plan = plan_store(
        corpus,
        tokenizer,
        variant="fp16",
        block_size=64,
        patch_size=None,
        autoencoder=autoencoder,
        seed=0,
    )
    out = tmp_path_factory.mktemp("shards") / "store"
    size = 4 * plan.sample_bytes
    model = load_autoencoder(autoencoder)
    write_store(out, corpus, tokenizer, plan, autoencoder=model, shard_bytes=size)
    return out


def launch(jobs: list[dict[str, Any]], root: Path) -> tuple[list[int], str]:
    """Exit codes of two ranks that do all jobs, and the output of the first one."""
    (root / "jobs.json").write_text(json.dumps(jobs))
    port = free_port()
    ranks = [start_rank(rank, 2, port, [str(root / "jobs.json")], WORKER) for rank in (0, 1)]
    outputs = [rank.communicate(timeout=TIMEOUT_SECONDS)[0] for rank in ranks]
    return [rank.returncode for rank in ranks], outputs[0]


def of_shards(
    tiny: Callable[..., list[str]], run_dir: Path, kind: str, shards: Path
) -> dict[str, Any]:
    """A run that reads a store in shards, without a fault."""
    _, layout = LAYOUTS["dp2" if kind == "calm" else kind]
    more = {**layout, "training__steps": DATA_STEPS, "data__path": shards}
    return {
        "recipe": recipe(kind),
        "overrides": tiny(run_dir, kind, **more),
        "fault": {"kind": "nothing", "rank": -1, "step": 0},
    }


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., list[str]], shards: Path
) -> Path:
    """All faults in all layouts, in one launch of two ranks that ends with a lost shard."""
    root = tmp_path_factory.mktemp("runs")
    jobs = []

    def add(name: str, fault: dict[str, Any], layout: str = "dp2", **more: object) -> None:
        kind, divided = LAYOUTS[layout]
        overrides = tiny(root / name, kind, **{**divided, "training__steps": STEPS, **more})
        jobs.append({"recipe": recipe(kind), "overrides": overrides, "fault": fault})

    for layout, faults in FAULTS.items():
        for name, fault in {"on_purpose": ON_PURPOSE, **faults}.items():
            add(f"{layout}_{name}", fault, layout)
    hopeless = gradient(1, BACKBONE, "nan", last=100)
    add("hopeless", hopeless, training__steps=100, health__max_skipped_steps=2)
    jobs += [of_shards(tiny, root / f"unbroken_{kind}", kind, shards) for kind in KINDS]
    full = {"kind": "full_disk", "rank": -1, "step": 3, "last": 6, "bytes": 600}
    jobs.append(of_shards(tiny, root / "full_disk", "calm", shards) | {"fault": full})
    clock = {"kind": "jumping_clock", "rank": -1, "step": 0}
    jobs.append(of_shards(tiny, root / "clock", "calm", shards) | {"fault": clock})
    for name, (kind, more, _) in BAD_SHARDS.items():
        copy = shutil.copytree(shards, root / f"{name}_store")
        bad = {"kind": "bad_shard", "rank": -1, "step": 3, "shard": str(copy / SHARD), **more}
        jobs.append(of_shards(tiny, root / name, kind, copy) | {"fault": bad})
    codes, output = launch(jobs, root)
    assert codes == [BAD_INPUT, BAD_INPUT], output[-3000:]
    (root / "output").write_text(output)
    return root


@pytest.fixture(scope="module")
def resumed(runs: Path, tiny: Callable[..., list[str]]) -> dict[str, int]:
    """The runs whose shard was bad, once it is whole again; how many steps each had done."""
    done, jobs = {}, []
    for name, (kind, *_) in BAD_SHARDS.items():
        store = runs / f"{name}_store"
        (store / SHARD).with_suffix(".whole").replace(store / SHARD)
        done[name] = max(training_records(runs / name))
        jobs.append(of_shards(tiny, runs / name, kind, store))
        for rank in (0, 1):
            (runs / name / f"end_{rank}").rename(runs / name / f"first_end_{rank}")
    codes, output = launch(jobs, runs)
    assert codes == [0, 0], output[-3000:]
    (runs / "resumed").write_text(output)
    return done


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_all_ranks_skip_the_step_and_go_on(runs: Path, layout: str, name: str) -> None:
    run_dir = runs / f"{layout}_{name}"
    expected, found = training_records(runs / f"{layout}_on_purpose"), training_records(run_dir)
    assert sorted(found) == list(range(1, STEPS + 1))
    for step in set(found) - {BAD}:
        assert found[step]["loss"] == expected[step]["loss"], step
        assert found[step]["grad_norm"] == expected[step]["grad_norm"], step
        assert found[step]["skipped"] == 0
    bad = found[BAD]
    assert bad["skipped"] == expected[BAD]["skipped"] == 1
    assert bad["grad_norm"] is None
    assert bad["loss"] == (None if name in ("batch", "loss") else expected[BAD]["loss"])
    assert expected[BAD]["grad_norm"] is not None
    state = json.loads((run_dir / f"checkpoints/step_{STEPS:08d}/state.json").read_text())
    assert (state["step"], state["adam_steps"]) == (STEPS, STEPS - 1)
    assert {(run_dir / f"end_{rank}").read_text() for rank in (0, 1)} == {"0: done"}


def test_skip_changes_what_follows(runs: Path) -> None:
    """What the comparison above would miss if it could not fail: the layouts do differ."""
    dp2, pp2 = (training_records(runs / f"{layout}_on_purpose") for layout in ("dp2", "pp2"))
    assert dp2[1]["loss"] == pytest.approx(pp2[1]["loss"], rel=1e-5)
    assert dp2[BAD + 1] != pp2[BAD + 1]


def test_run_gives_up_on_all_ranks_after_too_many(runs: Path) -> None:
    ends = {(runs / "hopeless" / f"end_{rank}").read_text() for rank in (0, 1)}
    assert len(ends) == 1
    message = f"{DIVERGED}: step {BAD + 2}: loss or gradient not finite for 3 steps in a row"
    assert ends.pop().startswith(message)


def test_records_are_json_and_the_log_says_which(runs: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    for file in runs.glob("*/metrics.jsonl"):
        for line in file.read_text().splitlines():
            json.loads(line, parse_constant=refuse)
    lines = (runs / "output").read_text().splitlines()
    skipped = [line for line in lines if line.startswith(f"step {BAD}/{STEPS} ")]
    reasons = [line.rpartition("SKIPPED: ")[2] for line in skipped if "SKIPPED: " in line]
    of_calm = ["gradient not finite", "gradient not finite", "loss not finite"]
    assert reasons == [*of_calm, *of_calm, "gradient not finite", "loss not finite"]


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in training_records(run_dir).values()]


def test_full_disk_delays_the_records(runs: Path) -> None:
    assert losses(runs / "full_disk") == losses(runs / "unbroken_calm")
    output = (runs / "output").read_text()
    assert output.count("training continues, records are kept in memory") == 1
    assert (runs / "full_disk" / f"checkpoints/step_{DATA_STEPS:08d}/manifest.json").is_file()


def test_jumping_clock_changes_nothing(runs: Path) -> None:
    assert losses(runs / "clock") == losses(runs / "unbroken_calm")
    for record in training_records(runs / "clock").values():
        assert 0 < record["step_seconds"] < 3600 and record["tokens_per_second"] > 0


@pytest.mark.parametrize("name", BAD_SHARDS)
def test_bad_shard_is_named_and_the_run_goes_on_when_it_is_whole(
    runs: Path, resumed: dict[str, int], name: str
) -> None:
    kind, _, reason = BAD_SHARDS[name]
    run_dir, unbroken = runs / name, runs / f"unbroken_{kind}"
    ends = {(run_dir / f"first_end_{rank}").read_text() for rank in (0, 1)}
    assert len(ends) == 1, ends
    end = ends.pop()
    assert end.startswith(f"{BAD_INPUT}: ") and f"{SHARD}: {reason}" in end
    # All ranks learn it in the step in which one could not read ahead, and save that step.
    step = resumed[name]
    assert 3 <= step < DATA_STEPS
    directory = run_dir / "checkpoints" / f"step_{step:08d}"
    assert f"resumed from {directory} at step {step}" in (runs / "resumed").read_text()
    found, expected = training_records(run_dir), training_records(unbroken)
    assert sorted(found) == sorted(expected) == list(range(1, DATA_STEPS + 1))
    for step in expected:
        assert found[step]["loss"] == expected[step]["loss"], step
        assert found[step]["grad_norm"] == expected[step]["grad_norm"], step
