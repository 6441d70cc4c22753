"""Trainings whose bytes and seconds are measured and predicted, and how both are compared."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from launches import language_recipe, recipe

from calm_dist.costs.clusters import Cluster
from calm_dist.costs.memory import stage_memory, sums_head_gradients
from calm_dist.recipe import LanguageModelRecipe

WORKER = Path(__file__).with_name("planner_worker.py")
LAYOUTS: dict[str, list[str]] = {
    "one": [],
    "DP2": [],
    "TP2": ["parallel.tensor_parallel_size=2"],
    "TP2 SP": ["parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true"],
    "PP2": ["parallel.pipeline_parallel_size=2"],
    "recompute": ["parallel.recompute=true"],
    "bf16": ["precision=bf16"],
}


def job(
    kind: str, layout: str, common: list[str], out: Path, *more: str, **options: Any
) -> dict[str, Any]:
    """A job of the worker; ``common`` names store, sizes and run directory."""
    alone = [
        "parallel.tensor_parallel_size=1",
        "parallel.pipeline_parallel_size=1",
        "parallel.sequence_parallel=false",
        "parallel.device=cpu",
    ]
    overrides = [*common, *alone, *LAYOUTS[layout], *more]
    return {"recipe": recipe(kind), "overrides": overrides, "out": str(out), **options}


def planned(job: dict[str, Any], ranks: int) -> LanguageModelRecipe:
    return language_recipe(job["recipe"], [*job["overrides"], f"parallel.world_size={ranks}"])


def measured(job: dict[str, Any]) -> list[dict[str, Any]]:
    """What each rank measured."""
    found: list[dict[str, Any]] = json.loads(Path(job["out"]).read_text(encoding="utf-8"))
    return found


def compare_bytes(job: dict[str, Any], ranks: int) -> list[dict[str, int]]:
    """Predicted and measured bytes of a rank of each stage.

    What stays between steps is compared without the head's gradients, which a step frees. At the
    peak of a step they are there. Of a stage's ranks the one that measured least: now and then a
    thread of gloo's lets go of a tensor late.
    """
    recipe, rows, found = planned(job, ranks), [], measured(job)
    for stage in range(recipe.parallel.pipeline_parallel_size):
        own = [each for rank, each in enumerate(found) if stage_of(recipe, rank) == stage]
        least = min(own, key=lambda each: each["step"])
        memory = stage_memory(recipe, stage, on_cpu=True)
        rows.append(
            {
                "stage": stage,
                "kept": least["kept"],
                "kept_predicted": memory.kept - head_gradients(recipe, stage),
                "saved": least["saved"],
                "saved_predicted": memory.activations + memory.head_samples,
                "peak": least["kept"] + least["step"],
                "peak_predicted": memory.total,
            }
        )
    return rows


def compare_seconds(job: dict[str, Any], ranks: int) -> tuple[float, float, float]:
    """Medians of measured and predicted seconds of a step, and of their ratio step by step."""
    from calm_dist.planner.local import MeasuredRates, cluster_of
    from calm_dist.planner.steptime import step_time

    recipe, found = planned(job, ranks), measured(job)
    seconds, predicted = [], []
    for number in range(job["steps"]):
        rates = [MeasuredRates(**rank["rates"][number]) for rank in found]
        cluster: Cluster = cluster_of(rates, ranks)
        seconds.append(max(rank["seconds"][number] for rank in found))
        predicted.append(step_time(recipe, cluster).seconds)
    ratios = [p / s for p, s in zip(predicted, seconds, strict=True)]
    return median(seconds), median(predicted), median(ratios)


def stage_of(recipe: LanguageModelRecipe, rank: int) -> int:
    parallel = recipe.parallel
    shards = parallel.tensor_parallel_size * parallel.context_parallel_size
    return rank // shards % parallel.pipeline_parallel_size


def head_gradients(recipe: LanguageModelRecipe, stage: int) -> int:
    from calm_dist.costs import flops

    parallel, model = recipe.parallel, recipe.model
    if model.kind != "calm" or stage != parallel.pipeline_parallel_size - 1:
        return 0
    ranks = recipe.world_size // parallel.pipeline_parallel_size
    size = 4 * flops.head_parameters(model)
    partition = size // (ranks if parallel.zero_stage >= 2 else 1)
    return partition + (size if sums_head_gradients(recipe) else 0)
