"""The planner's bytes against those of real trainings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launches import run_worker
from planner_jobs import WORKER, compare_bytes, job, measured

from calm_dist.costs.work import (
    LAYER_HIDDEN,
    LAYER_INTERMEDIATE,
    NORM_COMPOSITE,
    ZERO_ACCESSES,
)
from calm_dist.heads.energy import BLOCK_ACCESSES, OTHER_ACCESSES
from calm_dist.optimizers.spec import ADAMW

HIDDEN, INTERMEDIATE, POSITIONS, SAMPLES = 128, 320, 8 * 16, 8
SIZES = {
    "model__hidden_size": HIDDEN,
    "model__intermediate_size": INTERMEDIATE,
    "training__micro_batch_size": 8,
    "training__global_batch_size": 16,
}
HEAD = {"model__head__num_samples": SAMPLES, "model__head__num_mlp_layers": 2}
Tiny = Callable[..., list[str]]


def sizes(tiny: Tiny, run_dir: Path, kind: str, **more: object) -> list[str]:
    head = HEAD if kind == "calm" else {}
    return tiny(run_dir, kind, **SIZES | head | more)


def check(jobs: list[dict[str, Any]], ranks: int) -> None:
    # The batch that was read and rotary positions are not predicted.
    wrong = [
        (Path(one["out"]).stem, what, row)
        for one in jobs
        for row in compare_bytes(one, ranks)
        for what in ("kept", "saved", "peak")
        if row[what] != pytest.approx(row[f"{what}_predicted"], rel=0.1)
    ]
    assert not wrong, "\n".join(map(str, wrong))


def test_bytes_of_one_process(tiny: Tiny, tmp_path: Path) -> None:
    """Memory of both models, of recomputation and bf16; traffic of a layer and of the head."""
    jobs = [
        job(kind, layout, sizes(tiny, tmp_path / "run", kind), tmp_path / f"{kind} {layout}.json")
        for kind in ("calm", "transformer")
        for layout in ("one", "recompute", "bf16")
    ]
    variants: dict[str, dict[str, object]] = {
        "base": {},
        "layer": {"model__num_hidden_layers": 5},
        "wide": {"model__intermediate_size": 2 * INTERMEDIATE},
        "block": {"model__head__num_mlp_layers": 3},
        "samples": {"model__head__num_samples": 2 * SAMPLES},
    }
    counted = {
        name: job(
            "calm",
            "one",
            sizes(tiny, tmp_path / "run", "calm", training__global_batch_size=8, **more),
            tmp_path / f"{name}.json",
            traffic=True,
        )
        for name, more in variants.items()
    }
    run_worker(1, WORKER, [*jobs, *counted.values()], tmp_path)
    check(jobs, 1)
    traffic = {name: measured(one)[0]["traffic"] / 4 for name, one in counted.items()}
    check_traffic({name: size - traffic["base"] for name, size in traffic.items()})


def check_traffic(more: dict[str, float]) -> None:
    """Elements that each variant moves beyond the base, against the planner's constants.

    A new parameter is cleared, accumulated, and updated; see `work`.
    """
    per_parameter = 2 + 3 + ADAMW.accesses[0]
    layer = (2 * NORM_COMPOSITE + LAYER_HIDDEN) * HIDDEN + LAYER_INTERMEDIATE * INTERMEDIATE
    parameters = 4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE
    expected = POSITIONS * layer + per_parameter * parameters
    assert more["layer"] == pytest.approx(expected, rel=0.1)
    wide = POSITIONS * LAYER_INTERMEDIATE * INTERMEDIATE
    wide += per_parameter * 3 * HIDDEN * INTERMEDIATE
    assert more["wide"] == pytest.approx(4 * wide, rel=0.1)
    # The head's parameters pass through DeepSpeed's buckets as well.
    block = POSITIONS * SAMPLES * BLOCK_ACCESSES * HIDDEN
    block += (ZERO_ACCESSES + ADAMW.accesses[1]) * 6 * HIDDEN**2
    assert more["block"] == pytest.approx(block, rel=0.15)
    samples = POSITIONS * SAMPLES * (2 * BLOCK_ACCESSES + OTHER_ACCESSES) * HIDDEN
    assert more["samples"] == pytest.approx(samples, rel=0.1)


@pytest.mark.full
def test_bytes_of_two_processes(tiny: Tiny, tmp_path: Path) -> None:
    jobs = [
        job(kind, layout, sizes(tiny, tmp_path / "run", kind), tmp_path / f"{kind} {layout}.json")
        for kind in ("calm", "transformer")
        for layout in ("DP2", "TP2", "TP2 SP", "PP2")
    ]
    run_worker(2, WORKER, jobs, tmp_path)
    check(jobs, 2)
