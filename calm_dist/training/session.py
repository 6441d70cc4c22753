"""What every training has around it: launch, world, run directory."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from calm_dist.errors import CheckpointError
from calm_dist.parallel.launch import World, join_world, read_world, select_device
from calm_dist.recipe import Recipe, load_recipe
from calm_dist.training import checkpoint
from calm_dist.training.resolve import resolve

if TYPE_CHECKING:
    import torch

LIBRARIES = ("torch", "megatron-core", "deepspeed", "mosaicml-streaming", "flash-attn", "triton")


@contextmanager
def launched(recipe: Recipe) -> Iterator[tuple[Recipe, torch.device]]:
    """Connect the processes that a launcher started; gives the resolved recipe and the device.

    Raises:
        UserError: recipe, data or launch are wrong, before any process group exists.
        PeerLostError: another process died inside the block.
    """
    world = read_world()
    world.export()
    recipe = resolve(recipe.with_world_size(world.size))
    if recipe.parallel.device == "cpu":
        # Before torch looks: Megatron-core and DeepSpeed use a GPU that they see.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

    import torch.distributed as dist

    from calm_dist.parallel.peers import name_lost_peers
    from calm_dist.parallel.rank_zero import on_rank_zero

    device = select_device(world, recipe.parallel.device)
    store = join_world(world, device, recipe.health.timeout_seconds)
    with name_lost_peers(store, world):
        on_rank_zero(lambda: prepare_run_directory(recipe, world))
        yield recipe, device
        dist.barrier()
    # Not after an error: it could wait for a peer that is gone.
    dist.destroy_process_group()


def prepare_run_directory(recipe: Recipe, world: World) -> None:
    """Write what the run is made of: ``recipe.yaml`` as resolved and ``environment.json``.

    Raises:
        CheckpointError: the directory holds checkpoints of another model.
    """
    run_dir = Path(recipe.run.dir)
    _refuse_other_model(run_dir, recipe)
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


def _refuse_other_model(run_dir: Path, recipe: Recipe) -> None:
    path = run_dir / "recipe.yaml"
    if not checkpoint.has_checkpoints(run_dir) or not path.is_file():
        return
    before, now = load_recipe(path).to_dict()["model"], recipe.to_dict()["model"]
    # Where the autoencoder lies is no part of the model; its sha256 is checked with the data.
    names = sorted((before.keys() | now.keys()) - {"autoencoder"})
    changed = [name for name in names if before.get(name) != now.get(name)]
    if changed:
        listed = ", ".join(f"model.{n}: {before.get(n)} -> {now.get(n)}" for n in changed)
        raise CheckpointError(
            f"{run_dir}: its checkpoints were written for another model ({listed}); use the "
            "recipe that lies there, or another run.dir"
        )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
