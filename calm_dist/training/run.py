"""From a recipe to a finished run: the one entry of every launcher."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path

from calm_dist.parallel.launch import World, join_world, read_world, select_device
from calm_dist.recipe import Recipe
from calm_dist.training.resolve import resolve

LIBRARIES = ("torch", "megatron-core", "deepspeed", "mosaicml-streaming", "flash-attn", "triton")


def train(recipe: Recipe) -> None:
    """Train the language model of a recipe in the world that the launcher made.

    Raises:
        UserError: recipe, data, checkpoint or launch are wrong.
        PeerLostError: another process died.
    """
    world = read_world()
    world.export()
    recipe = resolve(recipe.with_world_size(world.size))

    import torch.distributed as dist

    from calm_dist.parallel import cpu

    device = select_device(world, recipe.parallel.device)
    cpu.install()
    from calm_dist.parallel.peers import name_lost_peers
    from calm_dist.parallel.topology import build_topology
    from calm_dist.training.loop import Trainer

    store = join_world(world, device, recipe.health.timeout_seconds)
    try:
        with name_lost_peers(store, world):
            if world.rank == 0:
                prepare_run_directory(recipe, world)
            Trainer(recipe, build_topology(recipe, device)).run()
            dist.barrier()
    finally:
        dist.destroy_process_group()


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
