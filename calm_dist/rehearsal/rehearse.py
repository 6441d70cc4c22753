"""Rehearse a recipe: a process for each rank, one after the other, and the planner beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import calm_dist
from calm_dist.costs.clusters import Cluster
from calm_dist.costs.memory import Memory, stage_memory
from calm_dist.errors import RecipeError, UserError
from calm_dist.parallel.launch import cuda_environment
from calm_dist.recipe import Recipe
from calm_dist.rehearsal.stand_in import compile_libraries, cuda_of_torch, environment

NOT_PROVEN = (
    "numerics: no number is computed; reads of the host get made-up finite ones",
    "NCCL: the other ranks do not exist, and collectives return at once",
    "timing, and what depends on it: races between streams, overlap",
    "paths that depend on data: skipped steps; results of data-dependent size are the largest",
    "memory outside torch's tensors, and the allocator's fragmentation",
    "kernels fused by torch.compile, which is off, and operations of several kernels: one each",
)
# The sources of the planner's terms for the categories of the rehearsal.
_TERMS = {
    "weights": ("weights",),
    "gradients": ("gradients",),
    "optimizer": ("optimizer",),
    "activations": ("activations", "head_samples", "energy_score"),
    "other": ("buffers",),
}
CATEGORIES = tuple(_TERMS)


def rehearse(
    recipe: Recipe,
    gpu: Cluster,
    ranks: Sequence[int] | None = None,
    announce: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Take steps of some ranks of a run on GPUs that need not exist.

    Args:
        recipe: as `training.resolve.resolve` returns it.
        gpu: their kind, of which each node has ``gpus_per_node``.
        ranks: default: the first one of each pipeline stage.
        announce: told what is about to be done.

    Returns:
        Plain values; a rank that failed has ``failed`` instead of results.

    Raises:
        UserError: the rank does not exist, the recipe is not for GPUs, or torch is a CPU build.
    """
    if recipe.parallel.device == "cpu":
        raise RecipeError("parallel.device: cpu; a rehearsal is of a run on GPUs; use auto or cuda")
    ranks = first_ranks(recipe) if ranks is None else ranks
    if wrong := [rank for rank in ranks if rank >= recipe.world_size]:
        raise UserError(f"--rank {wrong[0]}: the run has ranks 0 to {recipe.world_size - 1}")
    # Before anything is started: it also finds sizes that are missing.
    planned = {rank: stage_memory(recipe, stage_of(recipe, rank)) for rank in ranks}
    cuda = cuda_of_torch()
    libraries = compile_libraries()
    results = []
    for rank in ranks:
        announce(f"rank {rank} of {recipe.world_size} ...")
        result = _run_rank(recipe, rank, gpu, libraries)
        if "failed" not in result:
            result |= compare(result, planned[rank], gpu)
        results.append(result)
    return {
        "name": recipe.run.display_name,
        "gpu": gpu.name,
        "world_size": recipe.world_size,
        "cuda": cuda,
        "layout": layout(recipe),
        "ranks": results,
        "not_proven": list(NOT_PROVEN),
    }


def first_ranks(recipe: Recipe) -> list[int]:
    """The first rank of each pipeline stage."""
    parallel = recipe.parallel
    per_stage = parallel.model_parallel_size // parallel.pipeline_parallel_size
    return [stage * per_stage for stage in range(parallel.pipeline_parallel_size)]


def stage_of(recipe: Recipe, rank: int) -> int:
    """The pipeline stage of a rank, in the order of `parallel.topology`."""
    parallel = recipe.parallel
    per_stage = parallel.model_parallel_size // parallel.pipeline_parallel_size
    return rank % parallel.model_parallel_size // per_stage


def layout(recipe: Recipe) -> dict[str, int]:
    parallel = recipe.parallel
    return {
        "tensor": parallel.tensor_parallel_size,
        "pipeline": parallel.pipeline_parallel_size,
        "chunks": parallel.chunks_per_stage,
        "context": parallel.context_parallel_size,
        "data": recipe.data_parallel_size,
        "micro_batches": recipe.num_micro_batches,
        "micro_batch_size": recipe.training.micro_batch_size,
    }


def compare(result: dict[str, Any], planned: Memory, gpu: Cluster) -> dict[str, Any]:
    """The peak by category beside the planner's numbers, in bytes.

    Args:
        result: with ``peak`` and ``at_peak``, bytes by label ``category: part``.
    """
    found = dict.fromkeys(CATEGORIES, 0)
    for label, size in result["at_peak"].items():
        found[label.partition(":")[0]] += size
    terms = asdict(planned)
    return {
        "memory": found,
        "planned": {name: sum(terms[t] for t in parts) for name, parts in _TERMS.items()},
        "planned_peak": planned.total,
        "difference": result["peak"] / planned.total - 1,
        "usable_memory": int(gpu.usable_memory),
        "fits": result["peak"] <= gpu.usable_memory,
    }


def _run_rank(recipe: Recipe, rank: int, gpu: Cluster, libraries: Path) -> dict[str, Any]:
    """The result of a rank's process; ``failed`` says why there is none.

    Raises:
        UserError: the trainer refuses the recipe.
    """
    with tempfile.TemporaryDirectory(prefix="calm_rehearsal_") as directory:
        file = Path(directory) / "request.json"
        file.write_text(json.dumps({"recipe": recipe.to_dict()}), encoding="utf-8")
        done = subprocess.run(
            # -P: a package in the current directory would come before this one.
            [sys.executable, "-P", "-m", "calm_dist.rehearsal.worker", str(file)],
            env={
                **os.environ,
                **environment(libraries, gpu),
                **_rank_environment(recipe, rank, gpu.gpus_per_node),
            },
            capture_output=True,
            text=True,
        )
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if "refused" in result:
        raise UserError(result["refused"])
    if done.returncode or "recipe" in result:
        result = {
            "failed": {
                "error": f"the process of the rank ended with exit code {done.returncode}",
                "where": [],
                "traceback": done.stderr[-8000:],
            }
        }
    return {"rank": rank, "stage": stage_of(recipe, rank), **result}


def _rank_environment(recipe: Recipe, rank: int, gpus_per_node: int) -> dict[str, str]:
    """What a launcher would set."""
    settings = cuda_environment(recipe.parallel.tensor_parallel_size)
    # The few tensors that are not fake are the stand-in's, which has no virtual memory.
    del settings["PYTORCH_CUDA_ALLOC_CONF"]
    path = [str(Path(calm_dist.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return settings | {
        "RANK": str(rank),
        "WORLD_SIZE": str(recipe.world_size),
        "LOCAL_RANK": str(rank % gpus_per_node),
        "LOCAL_WORLD_SIZE": str(min(gpus_per_node, recipe.world_size)),
        # torch.compile would need values.
        "TORCHDYNAMO_DISABLE": "1",
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus_per_node))),
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
    }
