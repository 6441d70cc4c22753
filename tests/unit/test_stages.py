"""Pipeline stages: every layer once and in order, and no stage longer than need be."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from calm_dist.costs import flops
from calm_dist.costs.stages import chunk_sizes, stage_layers, work_shares
from calm_dist.errors import RecipeError
from calm_dist.recipe import Recipe, load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"


def recipe(kind: str, *overrides: str) -> Recipe:
    one = ["parallel.tensor_parallel_size=1", "training.micro_batch_size=1"]
    return load_recipe(RECIPES / f"{kind}_4_layers.yaml", [*one, *overrides])


def longest(given: Recipe, sizes: tuple[int, ...]) -> float:
    """Work of the longest stage, from the parts' FLOPs."""
    parts = {part.name: part.train_flops_per_token_ours for part in flops.count(given).parts}
    work = [size * (parts["attention"] + parts["mlp"]) / sum(sizes) for size in sizes]
    work[0] += parts.get("patch_compressor", 0)
    work[-1] += parts.get("head", 0) + parts.get("output_layer", 0)
    return max(work)


@pytest.mark.parametrize("kind", ["calm", "transformer"])
@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("layers", [4, 7, 12])
def test_no_other_cut_has_a_shorter_longest_stage(kind: str, stages: int, layers: int) -> None:
    given = recipe(
        kind, f"model.num_hidden_layers={layers}", f"parallel.pipeline_parallel_size={stages}"
    )
    cuts = (
        cut for cut in itertools.product(range(1, layers + 1), repeat=stages) if sum(cut) == layers
    )
    best = min(longest(given, cut) for cut in cuts)
    found = tuple(sum(chunks) for chunks in chunk_sizes(given))
    assert longest(given, found) == pytest.approx(best)
    shares = work_shares(given)
    assert sum(shares) == pytest.approx(1)
    assert max(shares) == pytest.approx(best / flops.count(given).train_flops_per_token_ours)


def test_a_cut_can_be_given() -> None:
    given = recipe("calm", "parallel.stage_layers=[1,3]", "parallel.pipeline_parallel_size=2")
    assert [stage_layers(given, stage) for stage in (0, 1)] == [[0], [1, 2, 3]]


@pytest.mark.parametrize("cut", ["[2,1]", "[4,0]", "[4]", "[1,1,2]"])
def test_a_wrong_cut_is_refused(cut: str) -> None:
    with pytest.raises(RecipeError, match="stage_layers"):
        recipe("calm", f"parallel.stage_layers={cut}", "parallel.pipeline_parallel_size=2")


def test_chunks_take_layers_in_turn() -> None:
    given = recipe(
        "calm",
        "model.num_hidden_layers=7",
        "parallel.pipeline_parallel_size=2",
        "parallel.virtual_pipeline_size=2",
        "parallel.stage_layers=[4,3]",
    )
    assert chunk_sizes(given) == [[2, 2], [2, 1]]
    assert [stage_layers(given, stage) for stage in (0, 1)] == [[0, 1, 4, 5], [2, 3, 6]]


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(RecipeError, match="pipeline_parallel_size: 5"):
        recipe("calm", "parallel.pipeline_parallel_size=5")
