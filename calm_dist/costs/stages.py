"""Which layers each pipeline stage holds, balanced so that all stages take about the same time."""

from __future__ import annotations

from calm_dist.costs import flops
from calm_dist.recipe import LanguageModelRecipe, Recipe


def chunk_sizes(recipe: Recipe) -> list[list[int]]:
    """Layers in each chunk of each stage, ``[stage][chunk]``.

    ``parallel.stage_layers`` is used if the recipe has it. Otherwise layers are assigned one by one
    to the stage with the least work: the first stage also runs the embedding, the last one the head
    or the output layer, which in a CALM is about half of all FLOPs.
    """
    if not isinstance(recipe, LanguageModelRecipe):
        return [[0]]
    parallel = recipe.parallel
    stages, chunks = parallel.pipeline_parallel_size, parallel.chunks_per_stage
    per_stage = list(parallel.stage_layers or _balanced(recipe, stages, chunks))
    # Spread over a stage's chunks as evenly as possible; later ones are at most one layer smaller.
    return [
        [(layers + chunks - 1 - chunk) // chunks for chunk in range(chunks)] for layers in per_stage
    ]


def stage_layers(recipe: Recipe, stage: int) -> list[int]:
    """Numbers of the layers on a pipeline stage: the first chunk of every stage, then the second
    chunk of every stage, ..."""
    sizes = chunk_sizes(recipe)
    layers: list[int] = []
    first = 0
    for chunk in range(len(sizes[0])):
        for number, stage_chunks in enumerate(sizes):
            if number == stage:
                layers += range(first, first + stage_chunks[chunk])
            first += stage_chunks[chunk]
    return layers


def work_shares(recipe: Recipe) -> list[float]:
    """Each stage's part of one replica's training FLOPs."""
    if not isinstance(recipe, LanguageModelRecipe):
        return [1.0]
    layer, first, last = _costs(recipe)
    stages = [layer * sum(chunks) for chunks in chunk_sizes(recipe)]
    stages[0] += first
    stages[-1] += last
    return [work / sum(stages) for work in stages]


def _balanced(recipe: LanguageModelRecipe, stages: int, chunks: int) -> list[int]:
    """Layers of each stage such that the slowest stage has the least possible work.

    The greedy choice is optimal because all layers cost the same. Among equal stages the later one
    gets the layer, since the earlier one keeps the activations of more micro-batches.
    """
    layer, first, last = _costs(recipe)
    sizes = [chunks] * stages
    work = [layer * chunks] * stages
    work[0] += first
    work[-1] += last
    for _ in range(recipe.model.num_hidden_layers - sum(sizes)):
        stage = min(reversed(range(stages)), key=work.__getitem__)
        sizes[stage] += 1
        work[stage] += layer
    return sizes


def _costs(recipe: LanguageModelRecipe) -> tuple[float, float, float]:
    """Training FLOPs per token of a layer, of the first stage's extra work and of the last's."""
    counts = flops.count(recipe, tokens=0)
    work = {part.name: part.train_flops_per_token_ours for part in counts.parts}
    layer = (work["attention"] + work["mlp"]) / recipe.model.num_hidden_layers
    last = work.get("head", 0.0) + work.get("output_layer", 0.0)
    return layer, work.get("patch_compressor", 0.0), last
