"""Layouts drawn at random from those that recipes allow."""

from __future__ import annotations

import random

from launches import ROOT

from calm_dist.errors import RecipeError
from calm_dist.recipe import load_recipe

HEADS = (
    "{kind: energy}",
    "{kind: flow, num_mlp_layers: 4}",
    "{kind: diffusion, num_mlp_layers: 4}",
)


def random_layout(seed: int) -> tuple[str, ...]:
    """Recipe and overrides of a layout, the same for equal seeds: of `calm_m` or `transformer_m`,
    with few layers, on 8 or 16 GPUs."""
    numbers = random.Random(seed)
    while True:
        recipe, overrides = _draw(numbers)
        try:
            load_recipe(str(ROOT / "recipes" / f"{recipe}.yaml"), list(overrides))
        except RecipeError:
            continue
        return recipe, *overrides


def _draw(numbers: random.Random) -> tuple[str, tuple[str, ...]]:
    """A layout that may be impossible."""

    def maybe(chance: float = 0.5) -> str:
        return str(numbers.random() < chance).lower()

    recipe = numbers.choice(["calm_m", "calm_m", "transformer_m"])
    world = numbers.choice([8, 16])
    tensor, stages, pieces = (numbers.choice(sizes) for sizes in ([1, 2, 4], [1, 2, 4], [1, 1, 2]))
    replicas = max(1, world // (tensor * stages * pieces))
    size = numbers.choice([1, 2, 4])
    values = {
        "model.num_hidden_layers": numbers.choice([4, 8]),
        "parallel.world_size": world,
        "parallel.tensor_parallel_size": tensor,
        "parallel.pipeline_parallel_size": stages,
        "parallel.context_parallel_size": pieces,
        "parallel.sequence_parallel": maybe() if tensor > 1 else "false",
        "parallel.distributed_optimizer": maybe(),
        "parallel.overlap_grad_reduce": maybe(),
        "parallel.overlap_param_gather": maybe(0.3),
        "parallel.recompute": maybe(0.3),
        "training.micro_batch_size": size,
        "training.global_batch_size": size * replicas * stages * numbers.choice([1, 2, 4]),
        "precision": numbers.choice(["bf16", "bf16", "fp32"]),
    }
    if stages > 1 and numbers.random() < 0.4:
        values["parallel.virtual_pipeline_size"] = 2
        values["parallel.overlap_p2p"] = maybe()
    if recipe == "calm_m":
        values["parallel.zero_stage"] = numbers.choice([1, 2, 3])
        values["model.head"] = numbers.choice(HEADS)
    return recipe, tuple(f"{name}={value}" for name, value in values.items())
