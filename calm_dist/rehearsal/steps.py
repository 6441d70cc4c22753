"""The trainer's own steps on fake blocks, with numbers of micro-batches that show what each costs.

A step of a large batch repeats what a few micro-batches show. After short steps, which make the
optimizer's state, come two: one with as many micro-batches as all stages hold at a time, whose peak
of memory is that of a whole step, and one with another number, so that the work of a micro-batch
and that of a step can be told apart.
"""

from __future__ import annotations

from typing import Any

from calm_dist.recipe import LanguageModelRecipe, Recipe
from calm_dist.rehearsal.accounting import separate
from calm_dist.rehearsal.observer import Observer
from calm_dist.rehearsal.trainers import RehearsedRun

# Some of DeepSpeed's waits for the device begin in the third step.
WARM_UP_STEPS = 2
KEPT = "other: kept between steps"


def step_sizes(recipe: Recipe) -> tuple[int, int]:
    """Micro-batches of the two steps that count. The first one has no more than the recipe's, since
    more could need more memory than its steps do."""
    stages = recipe.parallel.pipeline_parallel_size
    first = min(recipe.num_micro_batches, 2 * stages)
    return first, first + stages


def rehearse_steps(recipe: Recipe, trainer: RehearsedRun, observer: Observer) -> dict[str, Any]:
    """Take the steps of a rank whose model has just been built.

    Returns:
        Bytes of the peak and of its categories, the peak while the model is built, and the counts.
    """
    first, second = step_sizes(recipe)
    is_interleaved = (
        isinstance(recipe, LanguageModelRecipe) and recipe.parallel.chunks_per_stage > 1
    )
    short = recipe.parallel.pipeline_parallel_size if is_interleaved else 1
    built = observer.memory.peak
    for _ in range(WARM_UP_STEPS):
        _settle(trainer, observer)
        trainer.take_step(short)
    _settle(trainer, observer)
    observer.restart()
    trainer.take_step(first)
    peak, at_peak = observer.memory.peak, observer.memory.at_peak
    _settle(trainer, observer)
    one = observer.restart()
    trainer.take_step(second)
    return {
        "micro_batches": recipe.num_micro_batches,
        "rehearsed_micro_batches": [first, second],
        "peak": peak,
        "at_peak": at_peak,
        "built": built,
        "counts": separate(one, first, observer.restart(), second),
    }


def _settle(trainer: RehearsedRun, observer: Observer) -> None:
    """Label the tensors kept between steps with their categories."""
    observer.memory.relabel_all(KEPT)
    for label, tensors in trainer.kept():
        for tensor in tensors:
            observer.memory.relabel(tensor.untyped_storage()._cdata, label)
