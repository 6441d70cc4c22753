"""Evaluate all layouts of a recipe on a number of GPUs: the best, and why the others are worse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from calm_dist.costs.clusters import Cluster
from calm_dist.errors import RecipeError
from calm_dist.planner.predict import Prediction, predict
from calm_dist.recipe import LanguageModelRecipe

VIRTUAL_STAGES = (None, 2, 4)


@dataclass
class Search:
    """The result of a search; ``fitting`` is sorted, fastest first."""

    fitting: list[Prediction] = field(default_factory=list)
    out_of_memory: list[Prediction] = field(default_factory=list)
    refused: dict[str, list[str]] = field(default_factory=dict)
    """Messages of the recipe's own checks for the layouts that they refuse, by field."""

    @property
    def tried(self) -> int:
        return len(self.fitting) + len(self.out_of_memory) + sum(map(len, self.refused.values()))

    def slower_by(self) -> Counter[str]:
        """For each layout that fits but is not the best, the term with the largest extra cost."""
        reasons: Counter[str] = Counter()
        for prediction in self.fitting[1:]:
            reasons[_largest_difference(prediction, self.fitting[0])] += 1
        return reasons

    def lacking(self) -> Counter[str]:
        """For each layout that does not fit, the largest part of its memory."""
        return Counter(
            prediction.memory[prediction.largest_stage].largest for prediction in self.out_of_memory
        )


def search(recipe: LanguageModelRecipe, cluster: Cluster, world_size: int) -> Search:
    """Try TP x PP x virtual stages x micro-batch x recomputation on ``world_size`` GPUs.

    Everything else stays as in the recipe, including the global batch and context parallelism.
    Sequence parallelism is on for TP > 1, where it costs nothing; ``stage_layers`` are chosen again
    if the pipeline changes.
    """
    found = Search()
    values = recipe.to_dict()
    for changes in _layouts(recipe, cluster, world_size):
        try:
            candidate = _changed(recipe, values, changes)
        except RecipeError as error:
            message = _first_problem(error)
            found.refused.setdefault(message.split(":")[0], []).append(message)
            continue
        for recompute in (False, True):
            parallel = candidate.parallel.model_copy(update={"recompute": recompute})
            prediction = predict(candidate.model_copy(update={"parallel": parallel}), cluster)
            (found.fitting if prediction.fits else found.out_of_memory).append(prediction)
    # Among equal layouts prefer the simpler one: less model parallelism, no recomputation.
    found.fitting.sort(
        key=lambda one: (
            one.time.seconds,
            one.recipe.parallel.model_parallel_size,
            one.recipe.parallel.recompute,
        )
    )
    return found


def _layouts(recipe: LanguageModelRecipe, cluster: Cluster, world: int) -> Iterator[dict[str, Any]]:
    """Candidate sizes that may divide the GPUs; the recipe's checks decide."""
    batch = recipe.training.global_batch_size
    layers = recipe.model.num_hidden_layers
    tensor = 1
    while tensor <= min(world, cluster.gpus_per_node):
        for pipeline in _divisors(world // tensor, layers):
            for virtual in VIRTUAL_STAGES if pipeline > 1 else (None,):
                replicas = world // (tensor * pipeline * recipe.parallel.context_parallel_size)
                largest = max(1, batch // max(1, replicas))
                own = recipe.training.micro_batch_size
                for micro_batch in sorted({*_powers_of_two(largest), min(own, largest)}):
                    yield {
                        "world_size": world,
                        "tensor_parallel_size": tensor,
                        "pipeline_parallel_size": pipeline,
                        "virtual_pipeline_size": virtual,
                        "micro_batch_size": micro_batch,
                    }
        tensor *= 2


def _changed(
    recipe: LanguageModelRecipe, values: dict[str, Any], changes: dict[str, Any]
) -> LanguageModelRecipe:
    """The recipe in another layout, checked like any recipe.

    Raises:
        RecipeError: the checks refuse it.
    """
    layout = dict(changes)
    training = values["training"] | {"micro_batch_size": layout.pop("micro_batch_size")}
    same = (
        layout["pipeline_parallel_size"] == recipe.parallel.pipeline_parallel_size
        and layout["virtual_pipeline_size"] == recipe.parallel.virtual_pipeline_size
    )
    if layout["tensor_parallel_size"] > 1:
        layout["sequence_parallel"] = True
    if not same:
        layout["stage_layers"] = None
    parallel = values["parallel"] | layout
    return LanguageModelRecipe.from_dict(values | {"training": training, "parallel": parallel})


def _first_problem(error: RecipeError) -> str:
    """The first of several problems."""
    lines = [line.strip(" -") for line in str(error).splitlines()]
    return lines[1] if len(lines) > 1 else lines[0]


def _largest_difference(prediction: Prediction, best: Prediction) -> str:
    terms, others = prediction.time.terms, best.time.terms
    return max(terms, key=lambda name: terms[name] - others.get(name, 0.0))


def _divisors(number: int, limit: int) -> list[int]:
    return [divisor for divisor in range(1, min(number, limit) + 1) if number % divisor == 0]


def _powers_of_two(limit: int) -> Iterator[int]:
    size = 1
    while size <= limit:
        yield size
        size *= 2
