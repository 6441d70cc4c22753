"""Every layout trains the same model as one process: loss and joint gradient norm over 20 steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_jobs, training_records

KINDS = ("calm", "transformer")
# The energy head runs in every layout, these in the largest quick one.
OTHER_HEADS = ("flow", "diffusion")
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

Layouts = dict[int, dict[str, dict[str, object]]]

# By number of ranks: those of the quick tests, and all others.
QUICK: Layouts = {
    2: {"tp2sp": TP2 | SP, "pp2": PP2, "dp2": ALONE},
    4: {
        "tp2pp2sp": TP2 | SP | {"parallel__pipeline_parallel_size": 2},
        "pp2dp2interleaved": PP2 | VPP2,
    },
}
LONG: Layouts = {
    2: {
        "tp2": TP2,
        "dp2zero1": ALONE | {"parallel__zero_stage": 1},
        "pp2recompute": PP2 | {"parallel__recompute": True},
        "pp2interleaved": PP2 | VPP2,
        "pp2uneven": PP2 | {"parallel__stage_layers": "[1,3]"},
    },
    4: {
        "tp2pp2": TP2 | {"parallel__pipeline_parallel_size": 2},
        "tp2pp2zero1": TP2 | {"parallel__pipeline_parallel_size": 2, "parallel__zero_stage": 1},
        "tp2dp2sp": TP2 | SP,
        "tp4sp": TP2 | SP | {"parallel__tensor_parallel_size": 4},
        "pp4": PP2 | {"parallel__pipeline_parallel_size": 4},
        "dp4": ALONE,
    },
}


def run_layouts(layouts: Layouts, directory: Path, tiny: Callable[..., list[str]]) -> Path:
    """All layouts of both models, one launch for each number of ranks."""
    for ranks, named in {1: {"alone": ALONE}, **layouts}.items():
        jobs = [
            (kind, tiny(directory / f"{kind}_{name}", kind, **layout))
            for kind in KINDS
            for name, layout in named.items()
        ]
        jobs += [
            ("calm", tiny(directory / f"{head}_{name}", "calm", model__head__kind=head, **layout))
            for head in OTHER_HEADS
            for name, layout in named.items()
            if name in ("alone", "tp2pp2sp")
        ]
        run_jobs(ranks, jobs, directory)
    return directory


def assert_equals_one_process(runs: Path, kind: str, layout: str) -> None:
    alone = training_records(runs / f"{kind}_alone")
    other = training_records(runs / f"{kind}_{layout}")
    assert sorted(other) == sorted(alone) == list(range(1, STEPS + 1))
    for step, expected in alone.items():
        for name in ("loss", "grad_norm"):
            limit = TOLERANCE * max(1.0, abs(expected[name]))
            assert abs(other[step][name] - expected[name]) <= limit, (step, name)


@pytest.fixture(scope="module")
def quick_runs(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., list[str]]) -> Path:
    return run_layouts(QUICK, tmp_path_factory.mktemp("layouts"), tiny)


@pytest.fixture(scope="module")
def long_runs(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., list[str]]) -> Path:
    return run_layouts(LONG, tmp_path_factory.mktemp("layouts"), tiny)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [name for named in QUICK.values() for name in named])
def test_layout_equals_one_process(quick_runs: Path, kind: str, layout: str) -> None:
    assert_equals_one_process(quick_runs, kind, layout)


@pytest.mark.parametrize("head", OTHER_HEADS)
def test_other_heads_equal_one_process(quick_runs: Path, head: str) -> None:
    assert_equals_one_process(quick_runs, head, "tp2pp2sp")


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [name for named in LONG.values() for name in named])
def test_further_layout_equals_one_process(long_runs: Path, kind: str, layout: str) -> None:
    assert_equals_one_process(long_runs, kind, layout)


@pytest.mark.parametrize("kind", [*KINDS, *OTHER_HEADS])
def test_training_lowers_the_loss(quick_runs: Path, kind: str) -> None:
    losses = [record["loss"] for record in training_records(quick_runs / f"{kind}_alone").values()]
    assert sum(losses[-5:]) < sum(losses[:5])
