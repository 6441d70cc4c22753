"""Describe a recipe before anything is started: sizes, FLOPs, layout and memory per rank.

The memory does not include buffers of the communication library and of the device.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from calm_dist.costs import flops
from calm_dist.costs.memory import stage_memory
from calm_dist.costs.stages import stage_layers, work_shares
from calm_dist.planner.storage import size_text
from calm_dist.recipe import Recipe


def plan(recipe: Recipe) -> dict[str, Any]:
    """Everything shown by ``--dry-run``, as plain values.

    Raises:
        RecipeError: the recipe leaves a size to its data store; `Recipe.with_store` fills it in.
    """
    counts = flops.count(recipe)
    shares = work_shares(recipe)
    stages = [
        {**_stage(recipe, stage), "train_flops_share": share} for stage, share in enumerate(shares)
    ]
    chunks = recipe.num_micro_batches * recipe.parallel.chunks_per_stage
    return {
        "name": recipe.run.display_name,
        "kind": recipe.model.kind,
        "parameters": counts.parameters,
        "steps": recipe.training.steps,
        "tokens": counts.tokens,
        "tokens_per_step": recipe.tokens_per_step,
        "train_flops": counts.train_flops_ours,
        "train_flops_released": counts.train_flops,
        "inference_flops_per_token": counts.inference_flops_per_token,
        "parts": [asdict(part) for part in counts.parts],
        "layout": _layout(recipe),
        "stages": stages,
        "stage_balance": sum(shares) / len(shares) / max(shares),
        "pipeline_bubble": (len(stages) - 1) / (chunks + len(stages) - 1),
        "data": [
            {"path": source.path, "weight": source.weight, "found": _found(source.path)}
            for source in recipe.data.sources
        ],
    }


def format_plan(values: dict[str, Any]) -> str:
    """`plan` as text for a terminal."""
    layout = values["layout"]
    lines = [
        f"{values['name']}: {values['kind']}, {values['parameters']:,} parameters",
        f"training: {values['steps']:,} steps x {values['tokens_per_step']:,} tokens = "
        f"{values['tokens']:.3g} tokens, {values['train_flops']:.3g} FLOPs "
        f"({values['train_flops_released']:.3g} as the released code counts)",
        f"inference: {values['inference_flops_per_token']:.3g} FLOPs a token",
        f"layout: {layout['world_size']} ranks = tensor {layout['tensor']} x pipeline "
        f"{layout['pipeline']} x context {layout['context']} x data {layout['data']}, "
        f"{layout['num_micro_batches']} micro-batches of {layout['micro_batch_size']} blocks, "
        f"{layout['precision']}"
        + (", sequence parallel" if layout["sequence_parallel"] else "")
        + (", distributed optimizer" if layout["distributed_optimizer"] else "")
        + (f", ZeRO-{layout['zero_stage']} head" if layout["zero_stage"] else ""),
        "",
        f"{'part':<26}{'parameters':>16}{'training FLOPs':>16}{'inference':>11}",
    ]
    total_inference = values["inference_flops_per_token"]
    total_training = sum(part["train_flops_per_token_ours"] for part in values["parts"])
    lines += [
        f"{part['name']:<26}{part['parameters']:>16,}"
        f"{part['train_flops_per_token_ours'] / total_training:>16.1%}"
        f"{part['inference_flops_per_token'] / total_inference:>11.1%}"
        for part in values["parts"]
    ]
    lines += [
        "",
        f"{'stage':<6}{'layers':<10}{'FLOPs':>7}{'weights':>10}{'gradients':>10}{'optimizer':>10}"
        f"{'activations':>12}{'head':>10}{'other':>10}{'per rank':>11}",
    ]
    for stage in values["stages"]:
        memory = stage["memory_bytes"]
        lines.append(
            f"{stage['stage']:<6}{_ranges(stage['layers']):<10}{stage['train_flops_share']:>7.1%}"
            f"{size_text(memory['weights']):>10}{size_text(memory['gradients']):>10}"
            f"{size_text(memory['optimizer']):>10}{size_text(memory['activations']):>12}"
            f"{size_text(memory['head_samples']):>10}"
            f"{size_text(memory['energy_score'] + memory['buffers']):>10}"
            f"{size_text(memory['total']):>11}"
        )
    lines.append(
        f"stage balance {values['stage_balance']:.0%} (mean / largest), pipeline bubble "
        f"{values['pipeline_bubble']:.0%}; memory at its peak"
    )
    found = {True: "found", False: "NOT FOUND", None: "remote, not looked up"}
    lines += [f"data: {source['path']}: {found[source['found']]}" for source in values["data"]]
    return "\n".join(lines)


def _layout(recipe: Recipe) -> dict[str, Any]:
    parallel, training = recipe.parallel, recipe.training
    return {
        "world_size": recipe.world_size,
        "tensor": parallel.tensor_parallel_size,
        "pipeline": parallel.pipeline_parallel_size,
        "virtual_pipeline": parallel.chunks_per_stage,
        "context": parallel.context_parallel_size,
        "data": recipe.data_parallel_size,
        "sequence_parallel": parallel.use_sequence_parallel,
        "distributed_optimizer": parallel.distributed_optimizer,
        "zero_stage": parallel.zero_stage if recipe.model.kind == "calm" else None,
        "precision": recipe.precision,
        "micro_batch_size": training.micro_batch_size,
        "num_micro_batches": recipe.num_micro_batches,
    }


def _stage(recipe: Recipe, stage: int) -> dict[str, Any]:
    memory = stage_memory(recipe, stage)
    return {
        "stage": stage,
        "layers": stage_layers(recipe, stage),
        "memory_bytes": {**asdict(memory), "total": memory.total},
    }


def _found(path: str) -> bool | None:
    """Whether a store exists; None for a remote store, which is not looked up."""
    return None if "://" in path else (Path(path) / "meta.json").is_file()


def _ranges(numbers: list[int]) -> str:
    """``0-3,8-11`` for a list of ascending numbers; ``-`` for an empty list."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts) or "-"
