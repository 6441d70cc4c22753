"""What the planner's search covers, and what the recipes say that it found."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from launches import language_recipe

from calm_dist.costs.clusters import PRESETS
from calm_dist.errors import RecipeError
from calm_dist.planner.full_plan import layout_overrides
from calm_dist.planner.predict import predict
from calm_dist.planner.search import REFINED, _context_sizes, search
from calm_dist.planner.steptime import step_time
from calm_dist.recipe import LanguageModelRecipe

RECIPES = Path(__file__).parents[2] / "recipes"
H100 = PRESETS["h100-sxm"]
PAPER_SIZES = sorted(
    path
    for path in RECIPES.glob("*.yaml")
    if not path.stem.endswith("_tiny") and path.stem != "autoencoder"
)
SHARDED = ("distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")


def name(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", PAPER_SIZES, ids=name)
def test_no_layout_of_the_search_is_much_faster_than_the_recipe(path: Path) -> None:
    """Within 3% of the best, but for the sibling that keeps pipeline stages."""
    recipe = language_recipe(path)
    found = search(recipe, H100, recipe.world_size)
    best, own = found.fitting[0], predict(recipe, H100)
    assert own.fits
    slower = own.time.seconds / best.time.seconds
    assert slower < (2.2 if path.stem == "calm_xl_tp2pp2" else 1.03)
    # A few seconds of a login node.
    assert found.tried < 2000


@pytest.mark.parametrize("path", PAPER_SIZES, ids=name)
def test_figures_in_the_recipes_are_the_planners(path: Path) -> None:
    recipe, text = language_recipe(path), path.read_text(encoding="utf-8")
    number, unit = re.search(r"([\d.]+) (ms|s)\s+(?:# )?a step", text).groups()  # type: ignore[union-attr]
    seconds = step_time(recipe, H100).seconds
    assert float(number) * {"ms": 1e-3, "s": 1.0}[unit] == pytest.approx(seconds, rel=0.01)
    if memory := re.search(r"micro_batch_size: \d+  # (?:.*, )?([\d.]+) GB", text):
        assert float(memory[1]) * 1e9 == pytest.approx(predict(recipe, H100).peak_memory, rel=0.01)
    named = re.search(r"([\d,]+) H100", text)
    assert named is not None and int(named[1]) == recipe.world_size


def random_layouts(path: Path, number: int) -> list[LanguageModelRecipe]:
    draw = random.Random(path.stem)
    found: list[LanguageModelRecipe] = []
    while len(found) < number:
        overrides = [
            f"parallel.world_size={draw.choice([16, 64, 256])}",
            f"parallel.tensor_parallel_size={draw.choice([1, 2, 4])}",
            f"parallel.pipeline_parallel_size={draw.choice([1, 2, 4])}",
            f"parallel.context_parallel_size={draw.choice([1, 2])}",
            f"training.micro_batch_size={draw.choice([1, 2, 4])}",
            f"parallel.recompute={draw.choice(['true', 'false'])}",
            *(f"parallel.{field}=false" for field in SHARDED),
        ]
        try:
            found.append(language_recipe(path, overrides))
        except RecipeError:
            continue
    return found


@pytest.mark.parametrize("stem", ["calm_xl", "transformer_m"])
def test_sharding_and_overlaps_cost_nothing(stem: str) -> None:
    """Why the search tries no layout without them."""
    for plain in random_layouts(RECIPES / f"{stem}.yaml", 20):
        parallel = plain.parallel.model_copy(update=dict.fromkeys(SHARDED, True))
        better = predict(plain.model_copy(update={"parallel": parallel}), H100)
        usual = predict(plain, H100)
        assert better.time.seconds <= usual.time.seconds * (1 + 1e-9)
        assert better.peak_memory <= usual.peak_memory


def test_what_is_searched() -> None:
    recipe = language_recipe(RECIPES / "calm_xl_tp2pp2.yaml")
    found = search(recipe, H100, 128)
    tried = [one.recipe.parallel for one in (*found.fitting, *found.out_of_memory)]
    assert {one.context_parallel_size for one in tried} == {1, 2, 4}
    assert {one.zero_stage for one in tried} == {2, 3}
    assert {one.recompute for one in tried} == {True, False}
    # 20 heads.
    assert {one.tensor_parallel_size for one in tried} == {1, 2, 4}
    # Nothing is proposed that does nothing.
    for one, whole in ((p.recipe.parallel, p.recipe) for p in found.fitting):
        alone = whole.data_parallel_size * one.context_parallel_size == 1
        assert all(getattr(one, field) is not alone for field in SHARDED)
        assert one.overlap_p2p is (one.virtual_pipeline_size is not None)
    assert len(found.fitting) > REFINED
    # Of a layout's ZeRO stages, only the fastest is listed.
    listed = [layout_overrides(one.recipe) for one in found.best(5)]
    without = [[text for text in layout if "zero_stage" not in text] for layout in listed]
    assert len({tuple(layout) for layout in without}) == 5


def test_other_zero_stages_are_tried_where_nothing_fits() -> None:
    """On GPUs with half of the memory that it needs, every layout is varied."""
    recipe = language_recipe(RECIPES / "calm_m.yaml")
    small = replace(H100, memory=3.5e9)
    found = search(recipe, small, 1)
    assert not found.fitting
    assert {one.recipe.parallel.zero_stage for one in found.out_of_memory} == {2, 3}


def test_cpus_and_other_optimizers_keep_what_the_recipe_says() -> None:
    on_cpus = language_recipe(RECIPES / "calm_tiny.yaml", ["parallel.device=cpu"])
    found = search(on_cpus, H100, 8)
    assert found.fitting
    for prediction in found.fitting:
        assert not any(getattr(prediction.recipe.parallel, field) for field in SHARDED)


def test_micro_batches_of_the_recipes_are_too_large_for_more_gpus() -> None:
    """Said with the remedy: 256 blocks are 8 for each of 32 replicas."""
    with pytest.raises(RecipeError, match=r"or another micro_batch_size"):
        language_recipe(RECIPES / "calm_m.yaml", ["parallel.world_size=64"])
    smaller = ["parallel.world_size=64", "training.micro_batch_size=4"]
    assert language_recipe(RECIPES / "calm_m.yaml", smaller).num_micro_batches == 1


def test_a_single_piece_is_tried_for_short_blocks() -> None:
    overrides = ["data.block_size=1024", "parallel.context_parallel_size=2"]
    recipe = language_recipe(RECIPES / "calm_m.yaml", overrides)
    assert _context_sizes(recipe, H100, tensor=1) == [1, 2]
