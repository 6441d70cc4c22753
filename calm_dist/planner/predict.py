"""Predict whether a recipe fits on a cluster, how long it takes, and what it costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from calm_dist.costs import flops
from calm_dist.costs.clusters import Cluster
from calm_dist.costs.memory import Memory, layer_counts, stage_memory
from calm_dist.planner.steptime import StepTime, peak_flops, step_time
from calm_dist.planner.storage import (
    HOUR,
    Goodput,
    Reliability,
    checkpoint_bytes,
    goodput,
    latent_bytes_per_token,
    with_other_latents,
)
from calm_dist.recipe import LanguageModelRecipe


@dataclass(frozen=True)
class Prediction:
    """One layout of a recipe on a cluster."""

    recipe: LanguageModelRecipe
    cluster: Cluster
    memory: tuple[Memory, ...]
    """Memory of a rank of each stage."""
    time: StepTime

    @property
    def largest_stage(self) -> int:
        """The stage whose ranks need the most memory."""
        return max(range(len(self.memory)), key=lambda stage: self.memory[stage].total)

    @property
    def peak_memory(self) -> int:
        return self.memory[self.largest_stage].total

    @property
    def fits(self) -> bool:
        return self.peak_memory <= self.cluster.usable_memory

    @property
    def tokens_per_second(self) -> float:
        return self.recipe.tokens_per_step / self.time.seconds

    def mfu(self, *, causal: bool = False) -> float:
        """Model FLOPs utilisation: FLOPs of forward and backward, as counted by `flops`, over peak.

        Attention counts in full, as in the paper's tables and Megatron's papers, or with ``causal``
        only the half that a causal mask leaves. Recomputation does not count.
        """
        recipe = self.recipe
        per_token = flops.count(recipe, tokens=0).train_flops_per_token_ours
        if causal:
            per_token -= _masked_flops_per_token(recipe)
        done = per_token * recipe.tokens_per_step / self.time.seconds
        return done / recipe.world_size / peak_flops(recipe, self.cluster)


def predict(recipe: LanguageModelRecipe, cluster: Cluster) -> Prediction:
    """Predict memory and time of a recipe's own layout.

    Raises:
        RecipeError: the recipe leaves a size to a data store that does not exist.
    """
    counts = layer_counts(recipe)
    memory = tuple(
        stage_memory(recipe, stage, layers=layers, on_cpu=cluster.on_cpu)
        for stage, layers in enumerate(counts)
    )
    return Prediction(recipe, cluster, memory, step_time(recipe, cluster, layers=counts))


def training_cost(
    prediction: Prediction, reliability: Reliability, *, best_interval: bool = False
) -> dict[str, Any]:
    """Time and money of the whole run, its data and its checkpoints, as plain values.

    Args:
        best_interval: assume the best interval between checkpoints instead of the recipe's own.
    """
    recipe, cluster = prediction.recipe, prediction.cluster
    best = goodput(recipe, cluster, reliability, None)
    step = prediction.time.seconds
    own = goodput(recipe, cluster, reliability, recipe.checkpoint.every * step)
    counted = best if best_interval else own
    hours = recipe.training.steps * step / HOUR
    gpu_hours = hours / counted.goodput * recipe.world_size
    per_token = latent_bytes_per_token(recipe)
    return {
        "hours_without_failures": hours,
        "hours": hours / counted.goodput,
        "gpu_hours": gpu_hours,
        "price": None if cluster.price is None else gpu_hours * cluster.price,
        "data": {
            "bytes_per_token": per_token,
            "bytes_per_token_int8": latent_bytes_per_token(recipe, int8=True),
            "bytes_of_all_tokens": per_token * recipe.tokens_per_step * recipe.training.steps,
            "read_bytes_per_second": per_token * prediction.tokens_per_second,
            "other_latents": _other_latents(prediction),
        },
        "checkpoint": {
            "bytes": checkpoint_bytes(recipe),
            "write_seconds": counted.write_seconds,
            "stall_seconds": counted.stall_seconds,
        },
        "failures": {
            "mtbf_hours": best.mtbf_seconds / HOUR,
            "best": _interval(best, step),
            "recipe": _interval(own, step),
        },
        "reliability": asdict(reliability),
    }


def _other_latents(prediction: Prediction) -> dict[str, Any] | None:
    """What the other way to get latents, stored or on the fly, would cost."""
    other = with_other_latents(prediction.recipe)
    if other is None:
        return None
    return {
        "latents": other.data.latents,
        "bytes_per_token": latent_bytes_per_token(other),
        "step_longer_by": step_time(other, prediction.cluster).seconds / prediction.time.seconds
        - 1,
    }


def _interval(chosen: Goodput, step: float) -> dict[str, float]:
    return {
        "interval_seconds": chosen.interval_seconds,
        "interval_steps": max(1, round(chosen.interval_seconds / step)),
        "goodput": chosen.goodput,
    }


def _masked_flops_per_token(recipe: LanguageModelRecipe) -> float:
    """Training FLOPs of full attention that a causal mask makes unnecessary."""
    model = recipe.model
    scores = flops.attention_flops(model.hidden_size, recipe.num_patches)
    scores -= flops.attention_flops(model.hidden_size, 0)
    layers = model.num_hidden_layers * scores / model.patch_size
    return flops.BACKWARD_AND_FORWARD * layers / 2
