"""What every training has around it: launch, world, run directory."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calm_dist.errors import CheckpointError, LaunchError
from calm_dist.files import replace_text
from calm_dist.parallel.launch import World, join_world, read_world, select_device
from calm_dist.recipe import Recipe, load_recipe
from calm_dist.training import checkpoint
from calm_dist.training.resolve import resolve
from calm_dist.training.stop import StopRequest

if TYPE_CHECKING:
    import torch

# A run cannot go on with another of these; what its data must keep, the stream checks.
_FIXED = ("precision", "run.seed")
_FREE_AFTER_IMPORT = ("model.init", "model.initializer_range")

LIBRARIES = ("torch", "megatron-core", "deepspeed", "mosaicml-streaming", "flash-attn", "triton")


@contextmanager
def launched(recipe: Recipe) -> Iterator[tuple[Recipe, torch.device, StopRequest]]:
    """Connect the processes that a launcher started; gives the resolved recipe, the device and
    what notes the signals to stop.

    Raises:
        UserError: recipe, data or launch are wrong, before any process group exists.
        PeerLostError: another process died inside the block.
    """
    world = read_world()
    world.export()
    recipe = resolve(recipe.with_world_size(world.size))
    (Path(recipe.run.dir) / "logs").mkdir(parents=True, exist_ok=True)
    if recipe.parallel.device == "cpu":
        # Before torch looks: Megatron-core and DeepSpeed use a GPU that they see.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

    import torch.distributed as dist

    from calm_dist.parallel.peers import name_lost_peers
    from calm_dist.parallel.rank_zero import on_rank_zero

    device = select_device(world, recipe.parallel.device)
    store = join_world(world, device, recipe.health.timeout_seconds)
    stop = StopRequest()
    with name_lost_peers(store, world), stop.listening():
        lock = on_rank_zero(lambda: prepare_run_directory(recipe, world))
        try:
            yield recipe, device, stop
            dist.barrier()
        finally:
            if world.rank == 0:
                os.close(lock)
    # Not after an error: it could wait for a peer that is gone.
    dist.destroy_process_group()


def prepare_run_directory(recipe: Recipe, world: World) -> int:
    """Write what the run is made of: ``recipe.yaml`` as resolved and ``environment.json``.

    Returns:
        A descriptor that keeps other runs out of the directory while it is open.

    Raises:
        CheckpointError: the directory holds checkpoints of another model.
        LaunchError: another run is at work in the directory.
    """
    run_dir = Path(recipe.run.dir)
    lock = _lock(run_dir)
    _check_changes(run_dir, recipe)
    replace_text(run_dir / "recipe.yaml", recipe.to_yaml())
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
    replace_text(run_dir / "environment.json", json.dumps(environment, indent=2) + "\n")
    return lock


def _lock(run_dir: Path) -> int:
    """Hold the run directory; the kernel lets go of it however this process ends."""
    path = run_dir / ".lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(descriptor, 100).decode(errors="replace").strip()
        os.close(descriptor)
        raise LaunchError(
            f"run.dir: another run is at work in {run_dir} ({holder}); wait for it or end it, or "
            "use another run.dir"
        ) from error
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())
    return descriptor


def _check_changes(run_dir: Path, recipe: Recipe) -> None:
    """Say what the recipe has changed since the newest checkpoint, and refuse what it may not."""
    path = checkpoint.newest_recipe(run_dir)
    if path is None:
        return
    before, now = _fields(load_recipe(path)), _fields(recipe)
    # Where things lie is no part of them: data and autoencoder are known by their fingerprints.
    names = sorted((before.keys() | now.keys()) - {"run.dir", "model.autoencoder"})
    changed = {
        n: f"{n}: {before.get(n)} -> {now.get(n)}" for n in names if before.get(n) != now.get(n)
    }
    if checkpoint.has_only_weights(path.parent):
        # They say nothing of how to go on, nor of how weights would be drawn.
        changed = {n: text for n, text in changed.items() if n.startswith("model.")}
        changed = {n: text for n, text in changed.items() if n not in _FREE_AFTER_IMPORT}
    refused = [text for n, text in changed.items() if n.startswith("model.") or n in _FIXED]
    if refused:
        raise CheckpointError(
            f"{run_dir}: its checkpoints were written for another model or noise "
            f"({', '.join(refused)}); use the recipe that lies in them, or another run.dir"
        )
    if changed:
        print(f"changed since {path.parent.name}: {', '.join(changed.values())}", flush=True)


def _fields(recipe: Recipe) -> dict[str, Any]:
    """All fields by their dotted names."""
    fields: dict[str, Any] = {}
    for section, values in recipe.to_dict().items():
        if isinstance(values, dict):
            fields |= {f"{section}.{name}": value for name, value in values.items()}
        else:
            fields[section] = values
    return fields


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
