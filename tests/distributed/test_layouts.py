"""Every layout trains the same model as one process: loss and joint gradient norm over 20 steps.

All runs clip in every step. `test_optimizer_oracle` holds one process, and one of the layouts,
against plain PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from launches import ALONE, WORKER, language_recipe, recipe, run_worker, training_records

KINDS = ("calm", "transformer")
# The energy head runs in every layout, these in the largest quick one.
OTHER_HEADS = ("chain", "flow", "diffusion", "tokens")
STEPS = 20
# |a - b| <= TOLERANCE * max(1, |b|)
TOLERANCE = 1e-5
# The same for bf16 against fp32. Measured: 1.6e-3 and 7.6e-3.
BF16_TOLERANCE = {"loss": 3e-3, "grad_norm": 2e-2}
# Below every norm of these runs.
CLIP = 0.3
COMMON: dict[str, object] = {
    "training__clip_grad_norm": CLIP,
    # Does not depend on training.steps: the runs that continue elsewhere stop early at first.
    "training__schedule": "constant",
}

# A run that has ended stays in memory, because its objects are frozen for the garbage collector,
# and with it the threads of its process groups.
JOBS_PER_LAUNCH = 10

Layout = dict[str, object]
Layouts = dict[int, dict[str, Layout]]
Record = dict[int, dict[str, float]]


def layout(**parallel: object) -> Layout:
    return ALONE | {f"parallel__{name}": value for name, value in parallel.items()}


TP2: Layout = {"tensor_parallel_size": 2}
PP2: Layout = {"pipeline_parallel_size": 2}
CP2: Layout = {"context_parallel_size": 2}
SP: Layout = {"sequence_parallel": True}
VPP2: Layout = {"virtual_pipeline_size": 2}
ZERO1, ZERO3 = {"zero_stage": 1}, {"zero_stage": 3}
RECOMPUTE: Layout = {"recompute": True}
REDUCE: Layout = {"overlap_grad_reduce": True}
SHARD: Layout = {"distributed_optimizer": True}
GATHER: Layout = REDUCE | SHARD | {"overlap_param_gather": True}
GQA: Layout = {"model__num_key_value_heads": 2}
BF16: Layout = {"precision": "bf16"}
# Two micro-batches a step instead of four, in half the time, for what needs no full pipeline.
# Sums over a step do not depend on it, so that runs of both sizes are compared.
TWO: Layout = {"training__micro_batch_size": 4}

# By number of ranks: those of the quick tests, and all others.
QUICK: Layouts = {
    2: {
        "tp2sp": layout(**TP2, **SP) | TWO,
        "cp2zero3": layout(**CP2, **ZERO3) | TWO,
        "pp2recompute": layout(**PP2, **RECOMPUTE),
        "dp2gather": layout(**GATHER),
    },
    4: {
        "tp2pp2sp": layout(**TP2, **PP2, **SP),
        "tp2cp2sp_gqa": layout(**TP2, **CP2, **SP) | GQA | TWO,
        "pp2dp2interleaved_shard": layout(**PP2, **VPP2, **SHARD),
        "tp2pp2sp_bf16": layout(**TP2, **PP2, **SP) | BF16,
    },
}
LONG: Layouts = {
    2: {
        "tp2": layout(**TP2),
        "tp2zero3": layout(**TP2, **ZERO3),
        "tp2_gqa": layout(**TP2) | GQA,
        "pp2": layout(**PP2),
        "pp2interleaved": layout(**PP2, **VPP2),
        "pp2interleaved_reduce": layout(**PP2, **VPP2, **REDUCE),
        "pp2uneven": layout(**PP2, stage_layers="[1,3]"),
        "cp2": layout(**CP2),
        "cp2_gqa": layout(**CP2) | GQA,
        "cp2recompute": layout(**CP2, **RECOMPUTE),
        "cp2shard": layout(**CP2, **SHARD),
        "cp2gather": layout(**CP2, **GATHER),
        "dp2": layout(),
        "dp2zero1": layout(**ZERO1),
        "dp2zero3": layout(**ZERO3),
        "dp2reduce": layout(**REDUCE),
        "dp2shard": layout(**SHARD),
        "dp2_bf16": layout() | BF16,
        "dp2zero3shard_bf16": layout(**ZERO3, **SHARD) | BF16,
        "cp2_bf16": layout(**CP2) | BF16,
    },
    # 16 patches and 64 tokens do not divide by 3: the last piece is padded.
    3: {"cp3": layout(context_parallel_size=3)},
    4: {
        "tp2pp2": layout(**TP2, **PP2),
        "tp2pp2zero1": layout(**TP2, **PP2, **ZERO1),
        "tp2pp2sp_interleaved_recompute": layout(**TP2, **PP2, **SP, **VPP2, **RECOMPUTE),
        "tp2dp2sp": layout(**TP2, **SP),
        "tp2dp2spzero3shard": layout(**TP2, **SP, **ZERO3, **SHARD),
        "tp2dp2gather": layout(**TP2, **GATHER),
        "tp4sp": layout(tensor_parallel_size=4, **SP),
        "pp4": layout(pipeline_parallel_size=4),
        "pp2dp2gather": layout(**PP2, **GATHER),
        "pp2dp2interleaved_gather": layout(**PP2, **VPP2, **GATHER),
        "dp4": layout(),
        "dp4zero3gather": layout(**ZERO3, **GATHER),
        "cp4": layout(context_parallel_size=4),
        "tp2cp2": layout(**TP2, **CP2),
        "tp2cp2spzero3": layout(**TP2, **CP2, **SP, **ZERO3),
        "cp2pp2": layout(**CP2, **PP2),
        "cp2pp2interleaved": layout(**CP2, **PP2, **VPP2),
        "cp2dp2": layout(**CP2),
        "cp2dp2shard": layout(**CP2, **SHARD),
    },
}

# Runs that stop and continue in other layouts: [launch][(steps, layout)], each to be equal to a run
# that does not.
MOVES_2 = [
    (4, layout()),
    (8, layout(**GATHER, **ZERO3)),
    (12, layout(**TP2, **SP, **ZERO1)),
    (16, layout(**CP2, **SHARD, **ZERO3)),
    (STEPS, layout(**PP2)),
]
MOVES_BF16 = [
    (4, layout() | BF16),
    (8, layout(**SHARD, **ZERO3) | BF16),
    (12, layout() | BF16),
    (STEPS, layout(**SHARD) | BF16),
]
LONG_MOVES: list[tuple[int, list[tuple[int, Layout]]]] = [
    (4, [(4, layout(**TP2, **SHARD, **ZERO3))]),
    (1, [(8, layout())]),
    (4, [(12, layout(**TP2, **PP2, **SP)), (14, layout(**CP2, **SHARD))]),
    (2, [(16, layout(**PP2, **VPP2))]),
    (4, [(18, layout(**PP2, **GATHER)), (STEPS, layout(**TP2, **SHARD))]),
]

# Layouts, of 2 ranks, in which a step has to be skipped.
SKIPPED, SKIPPING_STEPS = 3, 8
QUICK_SKIPS = {
    "cp2zero3shard": layout(**CP2, **ZERO3, **SHARD),
    "dp2_bf16": layout() | BF16,
}
LONG_SKIPS = {
    "pp2zero1": layout(**PP2, **ZERO1),
    "tp2spzero3": layout(**TP2, **SP, **ZERO3),
    "dp2gather": layout(**GATHER),
    "dp2zero3gather_bf16": layout(**ZERO3, **GATHER) | BF16,
    "tp2_bf16": layout(**TP2) | BF16,
}


class Runs:
    """Jobs of one set of tests, and the directory with what they wrote."""

    def __init__(self, directory: Path, tiny: Callable[..., list[str]]) -> None:
        self.directory, self._tiny = directory, tiny

    def job(self, name: str, kind: str, settings: Layout, **more: object) -> dict[str, Any]:
        overrides = self._tiny(self.directory / name, kind, **{**COMMON, **settings})
        return {"recipe": recipe(kind), "overrides": overrides, **more}

    def layouts(self, named: dict[str, Layout]) -> Iterator[dict[str, Any]]:
        for kind in KINDS:
            for name, settings in named.items():
                if kind == "calm" or "zero" not in name:
                    yield self.job(f"{kind}_{name}", kind, settings)

    def other_heads(self, name: str, settings: Layout) -> Iterator[dict[str, Any]]:
        for head in OTHER_HEADS:
            yield self.job(f"{head}_{name}", "calm", settings | TWO | {"model__head__kind": head})

    def moves(self, name: str, moves: list[tuple[int, Layout]]) -> Iterator[dict[str, Any]]:
        for steps, settings in moves:
            yield self.job(name, "calm", settings | {"training__steps": steps})

    def skips(self, named: dict[str, Layout]) -> Iterator[dict[str, Any]]:
        for name, settings in named.items():
            settings = settings | {"training__steps": SKIPPING_STEPS}
            for how in ("poisoned", "omitted"):
                yield self.job(f"{how}_{name}", "calm", settings, **{how: SKIPPED})

    def launch(self, ranks: int, *jobs: Iterator[dict[str, Any]]) -> None:
        listed = [job for some in jobs for job in some]
        for first in range(0, len(listed), JOBS_PER_LAUNCH):
            lot = listed[first : first + JOBS_PER_LAUNCH]
            run_worker(ranks, WORKER, lot, self.directory)

    def alone(self) -> None:
        named = {"alone": layout() | TWO, "alone_gqa": layout() | GQA | TWO}
        self.launch(1, self.layouts(named), self.other_heads("alone", layout()))

    def records(self, name: str) -> Record:
        return training_records(self.directory / name)


@pytest.fixture(scope="module")
def quick_runs(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., list[str]]) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("layouts"), tiny)
    runs.alone()
    runs.launch(2, runs.layouts(QUICK[2]), runs.moves("moved", MOVES_2), runs.skips(QUICK_SKIPS))
    heads = runs.other_heads("tp2pp2sp", QUICK[4]["tp2pp2sp"])
    runs.launch(4, runs.layouts(QUICK[4]), heads)
    return runs


@pytest.fixture(scope="module")
def long_runs(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., list[str]]) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("layouts"), tiny)
    runs.alone()
    runs.launch(2, runs.layouts(LONG[2]), runs.moves("moved_bf16", MOVES_BF16))
    runs.launch(2, runs.skips(LONG_SKIPS))
    for ranks in (3, 4):
        runs.launch(ranks, runs.layouts(LONG[ranks]))
    for ranks, moves in LONG_MOVES:
        runs.launch(ranks, runs.moves("moved", moves))
    return runs


def alone(runs: Runs, kind: str, name: str) -> Record:
    return runs.records(f"{kind}_alone_gqa" if name.endswith("_gqa") else f"{kind}_alone")


def assert_equal_training(found: Record, expected: Record, name: str) -> None:
    assert sorted(found) == sorted(expected) == list(range(1, STEPS + 1))
    assert all(record["grad_norm"] > CLIP for record in found.values()), "every step must clip"
    tolerances = (
        BF16_TOLERANCE if name.endswith("_bf16") else dict.fromkeys(BF16_TOLERANCE, TOLERANCE)
    )
    for field, tolerance in tolerances.items():
        worst = max(
            abs(found[step][field] - record[field]) / max(1.0, abs(record[field]))
            for step, record in expected.items()
        )
        print(f"{name}: {field} deviates by {worst:.1e} at most")
        assert worst <= tolerance, field


def cases(layouts: Layouts) -> list[tuple[str, str]]:
    """(kind, layout); the ZeRO stage is the head's, which the Transformer does not have."""
    return [
        (kind, name)
        for kind in KINDS
        for named in layouts.values()
        for name in named
        if kind == "calm" or "zero" not in name
    ]


@pytest.mark.parametrize(("kind", "name"), cases(QUICK))
def test_layout_equals_one_process(quick_runs: Runs, kind: str, name: str) -> None:
    found = quick_runs.records(f"{kind}_{name}")
    assert_equal_training(found, alone(quick_runs, kind, name), name)


@pytest.mark.full
@pytest.mark.parametrize(("kind", "name"), cases(LONG))
def test_further_layout_equals_one_process(long_runs: Runs, kind: str, name: str) -> None:
    found = long_runs.records(f"{kind}_{name}")
    assert_equal_training(found, alone(long_runs, kind, name), name)


@pytest.mark.parametrize("head", OTHER_HEADS)
def test_other_heads_equal_one_process(quick_runs: Runs, head: str) -> None:
    found = quick_runs.records(f"{head}_tp2pp2sp")
    assert_equal_training(found, quick_runs.records(f"{head}_alone"), head)


def test_run_that_moves_between_layouts_equals_one_process(quick_runs: Runs) -> None:
    """Across ZeRO stages, plain and distributed optimizer, TP, PP, CP and DP."""
    found = quick_runs.records("moved")
    assert_equal_training(found, quick_runs.records("calm_alone"), "moved")


@pytest.mark.full
def test_run_that_moves_between_numbers_of_ranks_equals_one_process(long_runs: Runs) -> None:
    found = long_runs.records("moved")
    assert_equal_training(found, long_runs.records("calm_alone"), "moved")


@pytest.mark.full
def test_bf16_run_keeps_its_master_weights_when_it_moves(long_runs: Runs) -> None:
    """To fp32 rounding, since the plain and the distributed optimizer do the same in bf16."""
    found = long_runs.records("moved_bf16")
    assert_equal_training(found, long_runs.records("calm_dp2_bf16"), "moved")


def assert_skips(runs: Runs, name: str) -> None:
    poisoned, omitted = (runs.records(f"{how}_{name}") for how in ("poisoned", "omitted"))
    skipped = SKIPPED + 1
    assert [step for step, record in poisoned.items() if record["skipped"]] == [skipped]
    assert not math.isfinite(poisoned[skipped]["loss"] or math.nan)
    for step in set(range(1, SKIPPING_STEPS + 1)) - {skipped}:
        for field in ("loss", "grad_norm"):
            assert poisoned[step][field] == omitted[step][field], (step, field)


@pytest.mark.parametrize("name", QUICK_SKIPS)
def test_skipped_step_leaves_nothing_behind(quick_runs: Runs, name: str) -> None:
    """Bit for bit as if it had not been, though only one rank's batch was bad."""
    assert_skips(quick_runs, name)


@pytest.mark.full
@pytest.mark.parametrize("name", LONG_SKIPS)
def test_skipped_step_leaves_nothing_behind_in_further_layouts(long_runs: Runs, name: str) -> None:
    assert_skips(long_runs, name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (layout(**PP2, **VPP2, overlap_p2p=True), "overlap_p2p: true on CPUs"),
        (layout() | {"training__energy_kernel": "triton"}, "triton, but the device is a CPU"),
    ],
)
def test_what_cpus_cannot_do_is_refused(
    tmp_path: Path,
    tiny: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    message: str,
) -> None:
    """`parallel.device` is auto: only the run itself knows that it is a CPU."""
    # Other tests run kernels in Triton's interpreter.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    import torch

    from calm_dist.errors import RecipeError
    from calm_dist.inference.load import single_process_recipe, single_process_topology
    from calm_dist.training.build import build_parts
    from calm_dist.training.resolve import resolve

    given = resolve(language_recipe(recipe("calm"), tiny(tmp_path, "calm", **settings)))
    topology = single_process_topology(single_process_recipe(given), torch.device("cpu"))
    with pytest.raises(RecipeError, match=message):
        build_parts(given, topology)


@pytest.mark.parametrize("name", [*(f"{kind}_alone" for kind in KINDS), "flow_alone"])
def test_training_lowers_the_loss(quick_runs: Runs, name: str) -> None:
    losses = [record["loss"] for record in quick_runs.records(name).values()]
    assert sum(losses[-5:]) < sum(losses[:5])
