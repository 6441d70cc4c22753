"""The plan behind ``--dry-run``: layout and memory per rank."""

import json
from pathlib import Path

import pytest

from calm_dist.costs import flops
from calm_dist.planner.dry_run import format_plan, plan
from calm_dist.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL_RECIPES = Path(__file__).parents[1] / "recipes"
TINY = SMALL_RECIPES / "calm_4_layers.yaml"
ONE_RANK = ["parallel.tensor_parallel_size=1", "parallel.pipeline_parallel_size=1"]


def memory(*overrides: str, recipe: Path = TINY, stage: int = -1) -> dict[str, int]:
    return plan(load_recipe(recipe, overrides))["stages"][stage]["memory_bytes"]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_has_a_plan(path: Path) -> None:
    values = plan(load_recipe(path))
    assert json.loads(json.dumps(values)) == values
    assert sum(stage["train_flops_share"] for stage in values["stages"]) == pytest.approx(1)
    assert f"{values['parameters']:,} parameters" in format_plan(values)


@pytest.mark.parametrize("name", ["calm_4_layers", "transformer_4_layers"])
@pytest.mark.parametrize("pipeline", [1, 2, 4])
def test_stages_hold_every_parameter_once(name: str, pipeline: int) -> None:
    recipe = load_recipe(
        SMALL_RECIPES / f"{name}.yaml",
        ["parallel.tensor_parallel_size=1", f"parallel.pipeline_parallel_size={pipeline}"],
    )
    stages = plan(recipe)["stages"]
    weights = sum(stage["memory_bytes"]["weights"] for stage in stages)
    assert weights == 4 * flops.count(recipe).parameters
    assert [layer for stage in stages for layer in stage["layers"]] == [0, 1, 2, 3]


def test_tensor_parallelism_splits_matrices_and_copies_norms() -> None:
    one, two = (
        memory(f"parallel.tensor_parallel_size={size}", "parallel.stage_layers=[2,2]", stage=0)[
            "weights"
        ]
        for size in (1, 2)
    )
    copied = 4 * (2 * 2 * 128 + 3 * 128)  # norms of two layers; bias and norm of the compressor
    assert 2 * two - one == copied


def test_optimizer_states_of_each_precision() -> None:
    recipe = SMALL_RECIPES / "transformer_4_layers.yaml"
    parameters = flops.count(load_recipe(recipe)).parameters
    per_parameter = {"fp32": (4, 4, 8), "bf16": (2, 4, 12)}
    for precision, expected in per_parameter.items():
        found = memory(*ONE_RANK, f"precision={precision}", recipe=recipe)
        names = ("weights", "gradients", "optimizer")
        assert tuple(found[name] / parameters for name in names) == expected


def test_zero_partitions_the_head_over_all_ranks_of_the_last_stage() -> None:
    model = load_recipe(TINY).model
    assert model.kind == "calm"
    head = flops.head_parameters(model)

    def at(world_size: int, stage: int) -> dict[str, int]:
        return memory(
            *ONE_RANK,
            "training.micro_batch_size=1",
            f"parallel.world_size={world_size}",
            f"parallel.zero_stage={stage}",
        )

    def saved(stage: int) -> tuple[int, ...]:
        alone, many = at(1, stage), at(8, stage)
        return tuple(alone[name] - many[name] for name in ("weights", "gradients", "optimizer"))

    eighths = head * 7 // 8
    assert saved(1) == (0, 0, 12 * eighths)
    assert saved(2) == (0, 4 * eighths, 12 * eighths)
    # In fp32 what it partitions are the master weights.
    assert saved(3) == (4 * eighths, 4 * eighths, 8 * eighths)


@pytest.mark.parametrize("layout", ["parallel.world_size=4", "parallel.context_parallel_size=4"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_distributed_optimizer_shards_its_state_over_all_replicas(
    layout: str, precision: str
) -> None:
    recipe = SMALL_RECIPES / "transformer_4_layers.yaml"
    overrides = [*ONE_RANK, "training.micro_batch_size=1", f"precision={precision}", layout]
    whole = memory(*overrides, recipe=recipe)
    shard = memory(*overrides, "parallel.distributed_optimizer=true", recipe=recipe)
    assert shard["optimizer"] * 4 == whole["optimizer"]
    assert all(shard[name] == whole[name] for name in ("weights", "gradients", "activations"))


def test_context_parallelism_cuts_activations() -> None:
    """The backbone's and the head's. Keys and values are gathered, but then only those are kept."""
    whole = memory(*ONE_RANK)["activations"]
    halves = memory(*ONE_RANK, "parallel.context_parallel_size=2")["activations"]
    assert whole / 2 <= halves < 0.6 * whole


def test_earlier_stages_keep_more_micro_batches() -> None:
    overrides = ["parallel.pipeline_parallel_size=4", "training.micro_batch_size=2"]
    recipe = SMALL_RECIPES / "transformer_4_layers.yaml"
    second, third = (
        memory(*overrides, recipe=recipe, stage=stage)["activations"] for stage in (1, 2)
    )
    assert second * 2 == third * 3


def test_recomputation_and_sequence_parallelism_save_activations() -> None:
    kept = memory(stage=0)["activations"]
    assert memory("parallel.recompute=true", stage=0)["activations"] < kept
    assert memory("parallel.sequence_parallel=false", stage=0)["activations"] > kept


def test_data_that_does_not_exist_is_said(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text("{}")
    values = plan(
        load_recipe(TINY, [f"data.path=[{{path: {tmp_path}}}, {{path: gone}}, {{path: s3://b}}]"])
    )
    assert [source["found"] for source in values["data"]] == [True, False, None]
    assert "gone: NOT FOUND" in format_plan(values)
