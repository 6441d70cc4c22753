"""Seconds of one training step: work of the slowest stage, bubble, collectives, optimizer, waits.

Overlap is assumed only if the recipe enables it (``overlap_grad_reduce``, ``overlap_param_gather``,
``overlap_p2p``); computation waits for collectives of tensor parallelism and of the head's ZeRO
engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from calm_dist.costs import flops
from calm_dist.costs.clusters import Cluster
from calm_dist.costs.memory import (
    FP32_BYTES,
    backbone_parameters,
    element_bytes,
    last_stage_tables,
    layer_counts,
)
from calm_dist.costs.work import Work, micro_batch_work, optimizer_work, positions
from calm_dist.planner.collectives import Group, Groups, groups, send
from calm_dist.recipe import LanguageModelRecipe

# Fraction of a micro-batch's time during which gradients can be reduced.
BACKWARD_SHARE = 2 / 3
# Kernels that CUDA lets the host launch ahead of the device.
QUEUED_LAUNCHES = 1024
# Number of small all-reduces per step: the backbone's norm, loss and flags, the schedule's token
# counts.
STEP_REDUCTIONS = 4


@dataclass(frozen=True)
class StepTime:
    """Seconds of one training step, as a sum of terms."""

    terms: dict[str, float]
    """For all micro-batches, the mean over the stages; then the extra time of the slowest stage,
    the filling and draining of the pipeline, and the work after the last micro-batch."""
    stages: tuple[dict[str, float], ...]
    """Terms of each stage for one micro-batch."""

    @property
    def seconds(self) -> float:
        return sum(self.terms.values())


def step_time(
    recipe: LanguageModelRecipe, cluster: Cluster, *, layers: list[int] | None = None
) -> StepTime:
    """Predict a step of a language model's recipe.

    Args:
        layers: number of layers of each stage, if already known from `layer_counts`.
    """
    number, links = recipe.num_micro_batches, groups(recipe, cluster)
    counts = layer_counts(recipe) if layers is None else layers
    last = len(counts) - 1
    # Stages between the first and the last are equal if they have the same number of layers.
    kinds = [(n, stage if stage in (0, last) else None) for stage, n in enumerate(counts)]
    first = {kind: kinds.index(kind) for kind in kinds}
    known = {
        kind: _micro_batch(recipe, stage, kind[0], cluster, links) for kind, stage in first.items()
    }
    stages = [known[kind] for kind in kinds]
    sums = [sum(stage.values()) for stage in stages]
    terms: dict[str, float] = {}
    for stage in stages:
        for name, seconds in stage.items():
            terms[name] = terms.get(name, 0.0) + number * seconds / len(stages)
    terms["stage imbalance"] = number * (max(sums) - sum(sums) / len(sums))
    # Filling and draining: each of the other stages works once while the slowest waits.
    terms["pipeline bubble"] = (sum(sums) - max(sums)) / recipe.parallel.chunks_per_stage
    # Stages reduce and update at the same time.
    ends = [
        _step_end(recipe, stage, kind[0], cluster, links, sums[stage])
        for kind, stage in first.items()
    ]
    longest = max(range(len(ends)), key=lambda number: sum(ends[number].values()))
    for name, seconds in ends[longest].items():
        terms[name] = terms.get(name, 0.0) + seconds
    return StepTime({name: value for name, value in terms.items() if value > 0}, tuple(stages))


def peak_flops(recipe: LanguageModelRecipe, cluster: Cluster) -> float:
    """Peak FLOP/s of the recipe's precision."""
    return cluster.peak_flops if recipe.precision == "bf16" else cluster.fp32_flops


def _micro_batch(
    recipe: LanguageModelRecipe, stage: int, layers: int, cluster: Cluster, links: Groups
) -> dict[str, float]:
    """Terms of one micro-batch on a stage."""
    peak = peak_flops(recipe, cluster)
    work = micro_batch_work(recipe, stage, layers, cluster)
    terms = {name: part.seconds(cluster, peak) for name, part in work.items()}
    terms["tensor-parallel collectives"] = _tensor_collectives(
        recipe, stage, layers, cluster, links
    )
    terms["context-parallel collectives"] = _context_collectives(recipe, layers, cluster)
    terms["pipeline sends"] = _sends(recipe, cluster)
    model, parallel = recipe.model, recipe.parallel
    if (
        model.kind == "calm"
        and stage == parallel.pipeline_parallel_size - 1
        and parallel.zero_stage == 3
    ):
        # Weights are gathered for both passes of each micro-batch; gradients are scattered.
        size = flops.head_parameters(model) * element_bytes(recipe)
        terms["head's gradient reduction"] = 3 * links.head.half(size, cluster)
        if not cluster.rates.synchronous:
            # Before it has reduced the gradients, DeepSpeed goes no further (zero/stage3.py).
            terms["waits of the host"] = cluster.rates.wait_seconds
    if not cluster.rates.synchronous:
        # The host launches ahead; the device waits for it only if that takes longer than all work.
        launching = sum(part.launching(cluster) for part in work.values())
        terms["kernel launches"] = max(
            launching - sum(terms.values()), _stalls(work.values(), cluster, peak), 0.0
        )
    return terms


def _stalls(parts: Iterable[Work], cluster: Cluster, peak: float) -> float:
    """Seconds of a micro-batch in which the device waits for launches: other parts hide no more of
    a part's launches than the queue holds."""
    ahead = QUEUED_LAUNCHES * cluster.rates.dispatch_seconds
    return sum(
        max(0.0, part.launching(cluster) - part.seconds(cluster, peak) - ahead) for part in parts
    )


def _tensor_collectives(
    recipe: LanguageModelRecipe, stage: int, layers: int, cluster: Cluster, links: Groups
) -> float:
    """All-reduces of each layer's two outputs and, backward, of its two inputs. With sequence
    parallelism these are reduce-scatters and all-gathers, with two more gathers backward."""
    parallel, model = recipe.parallel, recipe.model
    if parallel.tensor_parallel_size == 1:
        return 0.0
    size = positions(recipe) * model.hidden_size * element_bytes(recipe)
    half = links.tensor.half(size, cluster)
    forward = 4 * half
    backward = (6 if parallel.use_sequence_parallel else 4) * half
    seconds = layers * (forward + backward + (forward if parallel.recompute else 0))
    if stage == 0:
        # Forward: the embeddings of all tokens and the compressor's result. Backward: its input.
        whole = links.tensor.all_reduce(model.patch_size * size, cluster)
        seconds += whole + (whole + 2 * half if model.kind == "calm" else 0)
    if stage == parallel.pipeline_parallel_size - 1:
        seconds += 2 * half
        if model.kind == "calm" and (tables := last_stage_tables(model)):
            # Output layer: states are gathered and their gradient is summed. Embeddings of a
            # patch's tokens: summed, and their gradient is gathered.
            whole = links.tensor.all_reduce(model.patch_size * size, cluster)
            seconds += tables * (whole + links.tensor.half(model.patch_size * size, cluster))
    return seconds


def _context_collectives(recipe: LanguageModelRecipe, layers: int, cluster: Cluster) -> float:
    """Keys and values of each layer are gathered forward, their gradients scattered backward."""
    parallel, model = recipe.parallel, recipe.model
    pieces = parallel.context_parallel_size
    if pieces == 1:
        return 0.0
    kv = model.hidden_size * model.key_value_heads // model.num_attention_heads
    size = positions(recipe) * pieces * 2 * kv * element_bytes(recipe)
    size //= parallel.tensor_parallel_size
    node = max(1, cluster.gpus_per_node // parallel.tensor_parallel_size)
    half = Group(pieces, min(pieces, node)).half(size, cluster)
    return layers * half * (3 if parallel.recompute else 2)


def _sends(recipe: LanguageModelRecipe, cluster: Cluster) -> float:
    """Sends between stages, forward and backward, for each chunk; 0 if computation hides them."""
    parallel, model = recipe.parallel, recipe.model
    stages = parallel.pipeline_parallel_size
    if stages == 1 or parallel.overlap_p2p:
        return 0.0
    size = positions(recipe) * model.hidden_size * element_bytes(recipe)
    if parallel.use_sequence_parallel:
        size //= parallel.tensor_parallel_size
    # The interleaved schedule also sends from the last stage to the first.
    senders = stages if parallel.chunks_per_stage > 1 else stages - 1
    slowest = max(send(recipe, cluster, stage, size) for stage in range(senders))
    return 2 * parallel.chunks_per_stage * slowest


def _step_end(
    recipe: LanguageModelRecipe,
    stage: int,
    layers: int,
    cluster: Cluster,
    links: Groups,
    micro_batch: float,
) -> dict[str, float]:
    """Terms after the last micro-batch on a stage."""
    parallel, model = recipe.parallel, recipe.model
    parameters, width = backbone_parameters(recipe, stage, layers), element_bytes(recipe)
    reduce = links.data.half(parameters * FP32_BYTES, cluster)
    if not parallel.distributed_optimizer:
        reduce *= 2
    if parallel.overlap_grad_reduce:
        reduce = max(0.0, reduce - BACKWARD_SHARE * micro_batch)
    gather = links.data.half(parameters * width, cluster) if parallel.distributed_optimizer else 0.0
    if parallel.overlap_param_gather:
        gather = max(0.0, gather - (1 - BACKWARD_SHARE) * micro_batch)
    head = 0.0
    if model.kind == "calm" and stage == parallel.pipeline_parallel_size - 1:
        size = flops.head_parameters(model) * width
        if parallel.zero_stage < 3:
            # DeepSpeed reduces in the weights' precision, once a step, and gathers the new weights.
            head += links.head.all_reduce(size, cluster) + links.head.half(size, cluster)
    update = optimizer_work(recipe, stage, layers, cluster)
    updating = update.seconds(cluster, peak_flops(recipe, cluster))
    waits = 0.0
    if not cluster.rates.synchronous:
        # The host has read loss and norm, and begins to launch with the device idle.
        updating = max(updating, update.launching(cluster))
        waits = cluster.rates.wait_seconds
    world = STEP_REDUCTIONS * 2 * links.head.latency(cluster)
    return {
        "gradient reduction": reduce,
        "weight gather": gather,
        "head's collectives": head,
        "optimizer": updating,
        "small reductions": world,
        "waits of the host": waits,
    }
