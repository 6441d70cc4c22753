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
# Steps of a context-parallel piece: with fewer, a layer's kernels are too small to fill a GPU.
SHORTEST_PIECE = 512
# Layouts of the first round that the second one varies.
REFINED = 50


_FOR_REPLICAS = {"distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"}


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

    def try_layout(
        self,
        recipe: LanguageModelRecipe,
        values: dict[str, Any],
        changes: dict[str, Any],
        cluster: Cluster,
    ) -> None:
        """Add a prediction or a refusal.

        Args:
            values: ``recipe`` as plain values.
        """
        try:
            candidate = _changed(recipe, values, changes)
        except RecipeError as error:
            message = _first_problem(error)
            self.refused.setdefault(message.split(":")[0], []).append(message)
            return
        prediction = predict(candidate, cluster)
        (self.fitting if prediction.fits else self.out_of_memory).append(prediction)

    def best(self, number: int) -> list[Prediction]:
        """The fastest layouts, each with its fastest ZeRO stage only."""
        chosen: dict[tuple[Any, ...], Prediction] = {}
        for prediction in self.fitting:
            sizes = _layout_of(prediction.recipe)
            chosen.setdefault(tuple(sizes.values()), prediction)
            if len(chosen) == number:
                break
        return list(chosen.values())

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
    """Try layouts on ``world_size`` GPUs at the recipe's global batch, in two rounds.

    First TP x PP x virtual stages x CP x micro-batch x recomputation. What never costs time or
    memory in this model is on: sequence parallelism for TP > 1; on GPUs also the distributed
    optimizer and the overlaps (`_always_better`). Then the fastest `REFINED` of these with the
    other ZeRO stages; if none fits, all of them.

    ``stage_layers`` are chosen again if the pipeline changes. Everything else stays as in the
    recipe.
    """
    found = Search()
    values = recipe.to_dict()
    better = _always_better(recipe, cluster)
    for changes in _layouts(recipe, cluster, world_size):
        found.try_layout(recipe, values, changes | better, cluster)
    _sort(found.fitting)
    candidates = found.fitting[:REFINED] if found.fitting else list(found.out_of_memory)
    for prediction in candidates if recipe.model.kind == "calm" else ():
        for stage in {1, 2, 3} - {prediction.recipe.parallel.zero_stage}:
            changes = _layout_of(prediction.recipe) | {"zero_stage": stage}
            found.try_layout(recipe, values, changes, cluster)
    _sort(found.fitting)
    return found


def _sort(predictions: list[Prediction]) -> None:
    """Fastest first; of equals the simpler one: less model parallelism, no recomputation, no
    distributed optimizer, ZeRO 2."""
    predictions.sort(
        key=lambda one: (
            one.time.seconds,
            one.recipe.parallel.model_parallel_size,
            one.recipe.parallel.recompute,
            one.recipe.parallel.distributed_optimizer,
            abs(one.recipe.parallel.zero_stage - 2),
        )
    )


def _always_better(recipe: LanguageModelRecipe, cluster: Cluster) -> dict[str, bool]:
    """Fields that make no layout slower or larger.

    A reduce-scatter in fp32 and a gather in the weights' precision move no more than an all-reduce
    in fp32, and the overlaps only hide time. On CPUs communication takes the cores that compute,
    which the model leaves out, so that the recipe's own values stay.
    """
    if cluster.on_cpu or recipe.parallel.device == "cpu":
        return {}
    sharded = recipe.training.optimizer_spec.can_be_distributed
    return {
        "distributed_optimizer": sharded,
        "overlap_grad_reduce": True,
        "overlap_param_gather": sharded,
        "overlap_p2p": True,
    }


def _layouts(recipe: LanguageModelRecipe, cluster: Cluster, world: int) -> Iterator[dict[str, Any]]:
    """Candidate sizes that may divide the GPUs; the recipe's checks decide."""
    layers = recipe.model.num_hidden_layers
    for tensor in _powers_of_two(min(world, cluster.gpus_per_node)):
        for context in _context_sizes(recipe, cluster, tensor):
            for pipeline in _divisors(world // tensor, layers):
                for virtual in VIRTUAL_STAGES if pipeline > 1 else (None,):
                    replicas = world // (tensor * pipeline * context)
                    for micro_batch in _micro_batches(recipe, replicas):
                        for recompute in (False, True):
                            yield {
                                "world_size": world,
                                "tensor_parallel_size": tensor,
                                "pipeline_parallel_size": pipeline,
                                "context_parallel_size": context,
                                "virtual_pipeline_size": virtual,
                                "micro_batch_size": micro_batch,
                                "recompute": recompute,
                            }


def _context_sizes(recipe: LanguageModelRecipe, cluster: Cluster, tensor: int) -> list[int]:
    """The recipe's own, and powers of two that stay in a node and leave pieces worth a kernel."""
    longest = min(cluster.gpus_per_node // tensor, recipe.padded_length // SHORTEST_PIECE)
    return sorted({*_powers_of_two(max(1, longest)), recipe.parallel.context_parallel_size})


def _micro_batches(recipe: LanguageModelRecipe, replicas: int) -> list[int]:
    largest = max(1, recipe.training.global_batch_size // max(1, replicas))
    return sorted({*_powers_of_two(largest), min(recipe.training.micro_batch_size, largest)})


def _layout_of(recipe: LanguageModelRecipe) -> dict[str, Any]:
    """The changes that `search` made to get this recipe."""
    names = (
        *("world_size", "tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size"),
        *("virtual_pipeline_size", "recompute", "distributed_optimizer", "overlap_grad_reduce"),
        *("overlap_param_gather", "overlap_p2p"),
    )
    layout = {name: getattr(recipe.parallel, name) for name in names}
    return layout | {"micro_batch_size": recipe.training.micro_batch_size}


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
    # Nothing to shard, hide or interleave.
    replicas = layout["world_size"] // (
        layout["tensor_parallel_size"] * layout["pipeline_parallel_size"]
    )
    if replicas == 1:
        layout |= dict.fromkeys(_FOR_REPLICAS & layout.keys(), False)
    if layout["virtual_pipeline_size"] is None:
        layout |= dict.fromkeys({"overlap_p2p"} & layout.keys(), False)
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
