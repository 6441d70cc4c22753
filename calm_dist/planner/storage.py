"""Data that a training reads and writes, and the time lost to failures and checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass

from calm_dist.costs import flops
from calm_dist.costs.clusters import Cluster
from calm_dist.costs.memory import (
    FP32_BYTES,
    UINT16_ENTRIES,
    backbone_parameters,
    element_bytes,
    layer_counts,
)
from calm_dist.recipe import LanguageModelRecipe

FP16_BYTES = 2
HOUR = 3600.0
# The part of a checkpoint's stall that does not grow with the state; measured, docs/checkpoints.md.
STALL_SECONDS = 0.08


def size_text(size: float) -> str:
    """Format bytes in the units in which GPU memory is sold: 1 GB is 10^9 bytes."""
    for unit, one in (("GB", 1e9), ("MB", 1e6)):
        if size >= 0.1 * one:
            return f"{size / one:,.1f} {unit}"
    return f"{size / 1e3:.1f} kB"


@dataclass(frozen=True)
class Reliability:
    """How often nodes fail, and the cost of a failure; every number can be replaced."""

    node_mtbf_hours: float = 6300.0
    """Llama 3 (arXiv 2407.21783, section 3.3.4): 419 unexpected interruptions in 54 days on 2,048
    nodes of 8 H100; 54 x 24 x 2,048 / 419 = 6,334 node-hours per interruption."""
    restart_seconds: float = 600.0
    """Time to detect the failure, requeue, start and load (assumption)."""
    write_bandwidth: float = 1e9
    """Bytes/s that each node writes to the file system (assumption)."""
    write_bandwidth_limit: float = 1e11
    """Bytes/s that the file system accepts from all nodes together (assumption)."""
    copy_bandwidth: float = 1e10
    """Bytes/s of a rank's copy from GPU to host memory, for which training waits (assumption)."""
    gather_bandwidth: float = 1e9
    """Bytes/s at which the distributed optimizer's state is gathered over gloo to the first
    replica's host memory, for which training waits (assumption)."""


def latent_bytes_per_token(recipe: LanguageModelRecipe, *, int8: bool = False) -> float:
    """Bytes per token in the store: the token, and its share of mean and log_std of the patches.

    Args:
        int8: the latents are stored as int8, with four fp16 scales per dimension of a block.
    """
    model = recipe.model
    token = 2 if flops.known_size(model, "vocab_size") <= UINT16_ENTRIES else 4
    if model.kind != "calm" or not recipe.reads_latents:
        return token
    latent = flops.known_size(model, "latent_size")
    if int8:
        return token + 2 * latent / model.patch_size + 4 * FP16_BYTES * latent / recipe.block_size
    return token + 2 * FP16_BYTES * latent / model.patch_size


def with_other_latents(recipe: LanguageModelRecipe) -> LanguageModelRecipe | None:
    """The recipe with latents encoded on the fly if it stores them, and the other way round; None
    if it has none."""
    if recipe.model.kind != "calm" or not recipe.model.has_latents:
        return None
    other = "on_the_fly" if recipe.data.latents == "stored" else "stored"
    data = recipe.data.model_copy(update={"latents": other})
    return recipe.model_copy(update={"data": data})


def checkpoint_bytes(recipe: LanguageModelRecipe) -> int:
    """Bytes of weights and optimizer state of backbone and head; fp32 master weights count once."""
    counts = flops.count(recipe, tokens=0)
    state = FP32_BYTES + recipe.training.optimizer_spec.state_bytes
    head = flops.head_parameters(recipe.model) if recipe.model.kind == "calm" else 0
    working = element_bytes(recipe) if recipe.precision == "bf16" else 0
    return (counts.parameters - head) * (state + working) + head * state


@dataclass(frozen=True)
class Goodput:
    """Fraction of time spent on useful training, with a checkpoint every ``interval_seconds``.

    A checkpoint makes training wait for ``stall_seconds`` and is usable ``write_seconds`` after it
    began. A failure loses the work since the last usable checkpoint began, on average half an
    interval plus the writing time, and the time of a restart:

        goodput = interval / (interval + stall) x MTBF / (MTBF + interval / 2 + write + restart)

    which is largest near interval = sqrt(2 x stall x MTBF) (Young 1974, Daly 2006, with the stall
    of the training in place of the whole writing time). A checkpoint begins only when the previous
    one is written: the best interval is at least the writing time, and with a shorter interval
    training waits for the rest of it.
    """

    mtbf_seconds: float
    write_seconds: float
    stall_seconds: float
    restart_seconds: float
    interval_seconds: float

    @property
    def goodput(self) -> float:
        lost = self.interval_seconds / 2 + self.write_seconds + self.restart_seconds
        waits = self.interval_seconds / (self.interval_seconds + self.stall_seconds)
        return waits * self.mtbf_seconds / (self.mtbf_seconds + lost)


def goodput(
    recipe: LanguageModelRecipe,
    cluster: Cluster,
    reliability: Reliability,
    interval_seconds: float | None,
) -> Goodput:
    """Goodput of a recipe with a checkpoint every ``interval_seconds``, or the best interval."""
    nodes = -(-recipe.world_size // cluster.gpus_per_node)
    mtbf = reliability.node_mtbf_hours * HOUR / nodes
    size = checkpoint_bytes(recipe)
    bandwidth = min(nodes * reliability.write_bandwidth, reliability.write_bandwidth_limit)
    write = size / bandwidth
    stall = write
    if recipe.checkpoint.asynchronous:
        # Replicas share the copying.
        copying = size / recipe.world_size / reliability.copy_bandwidth
        stall = min(write, STALL_SECONDS + copying)
    stall += _gather_seconds(recipe, reliability)
    interval = interval_seconds or max(math.sqrt(2 * stall * mtbf), write)
    if recipe.checkpoint.asynchronous:
        stall += max(0.0, write - interval)
    return Goodput(mtbf, write, stall, reliability.restart_seconds, interval)


def _gather_seconds(recipe: LanguageModelRecipe, reliability: Reliability) -> float:
    """Seconds to gather the distributed optimizer's state of the largest stage."""
    if not recipe.parallel.distributed_optimizer:
        return 0.0
    counts = enumerate(layer_counts(recipe))
    largest = max(backbone_parameters(recipe, stage, layers) for stage, layers in counts)
    state = largest * (recipe.training.optimizer_spec.state_bytes + FP32_BYTES)
    return state / reliability.gather_bandwidth
