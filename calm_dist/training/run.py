"""From a recipe to a finished run: the one entry of every launcher."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from calm_dist.parallel.launch import World, join_world, read_world, select_device
from calm_dist.recipe import Recipe
from calm_dist.training.resolve import resolve

if TYPE_CHECKING:
    import torch

LIBRARIES = ("torch", "megatron-core", "deepspeed", "mosaicml-streaming", "flash-attn", "triton")


def train(recipe: Recipe) -> None:
    """Train the language model of a recipe in the world that the launcher made.

    Raises:
        UserError: recipe, data, checkpoint or launch are wrong.
        PeerLostError: another process died.
    """
    world = read_world()
    world.export()
    # Everything that can be refused is, before any process group exists.
    recipe = resolve(recipe.with_world_size(world.size))
    if recipe.parallel.device == "cpu":
        # Before torch looks: Megatron-core and DeepSpeed use a GPU that they see.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

    import torch.distributed as dist

    from calm_dist.parallel import cpu

    device = select_device(world, recipe.parallel.device)
    cpu.install()
    from calm_dist.parallel.peers import name_lost_peers

    store = join_world(world, device, recipe.health.timeout_seconds)
    with name_lost_peers(store, world):
        train_in_world(recipe, world, device)
    # Not after an error: it could wait for a peer that is gone.
    dist.destroy_process_group()


def train_in_world(recipe: Recipe, world: World, device: torch.device) -> None:
    """`train` once the processes are connected; may be called again for another recipe."""
    import torch.distributed as dist

    from calm_dist.parallel.rank_zero import on_rank_zero
    from calm_dist.parallel.topology import build_topology, destroy_topology
    from calm_dist.training.loop import Trainer

    on_rank_zero(lambda: prepare_run_directory(recipe, world))
    Trainer(recipe, build_topology(recipe, device)).run()
    dist.barrier()
    destroy_topology()


def prepare_run_directory(recipe: Recipe, world: World) -> None:
    """Write what the run is made of: ``recipe.yaml`` as resolved and ``environment.json``."""
    run_dir = Path(recipe.run.dir)
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    (run_dir / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    environment = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "launcher": world.launcher,
        "world_size": world.size,
        "host": platform.node(),
        "python": platform.python_version(),
        "cpu_count": os.cpu_count(),
        "libraries": {name: _version(name) for name in LIBRARIES},
    }
    text = json.dumps(environment, indent=2) + "\n"
    (run_dir / "environment.json").write_text(text, encoding="utf-8")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
