"""Every layout trains the same model as one process: loss and joint gradient norm over 20 steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_jobs, training_records

STEPS = 20
# |a - b| <= TOLERANCE * max(1, |b|)
TOLERANCE = 1e-5

ALONE = {
    "parallel__tensor_parallel_size": 1,
    "parallel__pipeline_parallel_size": 1,
    "parallel__sequence_parallel": False,
}
TP2 = ALONE | {"parallel__tensor_parallel_size": 2}
PP2 = ALONE | {"parallel__pipeline_parallel_size": 2}
SP = {"parallel__sequence_parallel": True}
VPP2 = {"parallel__virtual_pipeline_size": 2}

LAYOUTS: dict[int, dict[str, dict[str, object]]] = {
    2: {
        "tp2": TP2,
        "tp2sp": TP2 | SP,
        "pp2": PP2,
        "dp2": ALONE,
        "dp2zero1": ALONE | {"parallel__zero_stage": 1},
        "pp2recompute": PP2 | {"parallel__recompute": True},
    },
    4: {
        "tp2pp2sp": TP2 | SP | {"parallel__pipeline_parallel_size": 2},
        "tp2pp2zero1": TP2 | {"parallel__pipeline_parallel_size": 2, "parallel__zero_stage": 1},
        "tp2dp2sp": TP2 | SP,
        "pp2dp2interleaved": PP2 | VPP2,
        "tp4": TP2 | {"parallel__tensor_parallel_size": 4} | SP,
        "pp4": PP2 | {"parallel__pipeline_parallel_size": 4},
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., list[str]]) -> Path:
    """All layouts of both models, one launch for each number of ranks."""
    directory = tmp_path_factory.mktemp("layouts")
    for ranks, layouts in {1: {"alone": ALONE}, **LAYOUTS}.items():
        jobs = [
            (kind, tiny(directory / f"{kind}_{name}", kind, **layout))
            for kind in ("calm", "transformer")
            for name, layout in layouts.items()
        ]
        run_jobs(ranks, jobs, directory)
    return directory


@pytest.mark.parametrize("kind", ["calm", "transformer"])
@pytest.mark.parametrize("layout", [name for layouts in LAYOUTS.values() for name in layouts])
def test_layout_equals_one_process(runs: Path, kind: str, layout: str) -> None:
    alone = training_records(runs / f"{kind}_alone")
    other = training_records(runs / f"{kind}_{layout}")
    assert sorted(other) == sorted(alone) == list(range(1, STEPS + 1))
    for step, expected in alone.items():
        for name in ("loss", "grad_norm"):
            limit = TOLERANCE * max(1.0, abs(expected[name]))
            assert abs(other[step][name] - expected[name]) <= limit, (step, name)


@pytest.mark.parametrize("kind", ["calm", "transformer"])
def test_training_lowers_the_loss(runs: Path, kind: str) -> None:
    losses = [record["loss"] for record in training_records(runs / f"{kind}_alone").values()]
    assert sum(losses[-5:]) < sum(losses[:5])
