"""What every training has around it: launch, world, run directory."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calm_dist.data.download import Downloads
from calm_dist.data.progress import duration
from calm_dist.data.store import read_meta
from calm_dist.errors import CheckpointError, UserError
from calm_dist.files import replace_text
from calm_dist.parallel.launch import World, join_world, read_world, select_device
from calm_dist.parallel.processes import children_die_with_us
from calm_dist.recipe import Recipe, load_recipe
from calm_dist.redact import redact_arguments, redact_values
from calm_dist.training import checkpoint
from calm_dist.training.checkpoint.run_state import RunState
from calm_dist.training.phases import Phases
from calm_dist.training.resolve import resolve
from calm_dist.training.run_directory import end_recorded, hold, let_go, write_environment
from calm_dist.training.stop import StopRequest

if TYPE_CHECKING:
    import torch

# A run cannot go on with another of these; what its data must keep, the stream checks.
_FIXED = ("precision", "run.seed")
_FREE_AFTER_IMPORT = ("model.init", "model.initializer_range")

LIBRARIES = ("torch", "megatron-core", "deepspeed", "mosaicml-streaming", "flash-attn", "triton")


@dataclass(frozen=True)
class Session:
    """What a training has around it.

    Attributes:
        recipe: the resolved recipe.
        stop: notes the signals to stop.
        phases: what the training is doing, for the watchdog.
    """

    recipe: Recipe
    device: torch.device
    stop: StopRequest
    phases: Phases


@contextmanager
def launched(recipe: Recipe) -> Iterator[Session]:
    """Connect the processes that a launcher started.

    A rank that makes no progress for ``health.timeout_seconds`` ends this process; see `watchdog`.

    Raises:
        UserError: recipe, data or launch are wrong, before any process group exists.
        PeerLostError: another process died inside the block.
        HungError: another process found out that a rank hangs.
    """
    started = time.monotonic()
    children_die_with_us()
    world = read_world()
    world.export()
    recipe = resolve(recipe.with_world_size(world.size))
    run_dir = Path(recipe.run.dir)
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    if world.rank == 0:
        # Before the libraries are loaded, which takes long.
        print(_introduction(recipe, world), flush=True)
    if recipe.parallel.device == "cpu":
        # Before torch looks: Megatron-core and DeepSpeed use a GPU that they see.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

    import torch.distributed as dist

    from calm_dist.parallel.rank_zero import on_rank_zero
    from calm_dist.training.watchdog import watched

    device = select_device(world, recipe.parallel.device)
    # A rank may be busy with downloads that are tried again.
    seconds = recipe.health.timeout_seconds + recipe.data.patience_seconds
    store = join_world(world, device, seconds)
    stop, phases = StopRequest(), Phases()
    with watched(store, world, phases, recipe.health.timeout_seconds), stop.listening():
        phases.enter("look at the run directory")
        try:
            lock = on_rank_zero(lambda: prepare_run_directory(recipe, world))
        except (UserError, OSError):
            # All ranks have it, and end at the same time. One with its groups still there has been
            # seen to abort on its way out.
            dist.destroy_process_group()
            raise
        try:
            with end_recorded(run_dir) if world.rank == 0 else nullcontext():
                yield Session(recipe, device, stop, phases)
                phases.enter("end")
                dist.barrier()
        finally:
            if world.rank == 0:
                let_go(lock)
    # Not after an error: it could wait for a peer that is gone.
    dist.destroy_process_group()
    if world.rank == 0:
        print(f"done in {duration(time.monotonic() - started)}: {run_dir}", flush=True)


def _introduction(recipe: Recipe, world: World) -> str:
    parallel = recipe.parallel
    cuts = {
        "TP": parallel.tensor_parallel_size,
        "PP": parallel.pipeline_parallel_size,
        "CP": parallel.context_parallel_size,
        "DP": recipe.data_parallel_size,
    }
    layout = ", ".join(f"{name} {size}" for name, size in cuts.items() if size > 1)
    processes = f"{world.size} processes ({layout})" if world.size > 1 else "1 process"
    name, kind = recipe.run.display_name, recipe.model.kind
    return (
        f"{name if name == kind else f'{name} ({kind})'}: {processes}, {recipe.training.steps:,} "
        f"steps of {recipe.tokens_per_step:,} tokens\nloading libraries, building the model ..."
    )


def prepare_run_directory(recipe: Recipe, world: World) -> int:
    """Write what the run is made of: ``recipe.yaml`` as resolved and ``environment.json``.

    Returns:
        A descriptor that keeps other runs out of the directory while it is open.

    Raises:
        CheckpointError: the directory holds checkpoints of another model.
        LaunchError: another run is at work in the directory.
    """
    run_dir = Path(recipe.run.dir)
    lock = hold(run_dir)
    _check_changes(run_dir, recipe)
    replace_text(run_dir / "recipe.yaml", recipe.to_yaml())
    environment = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": redact_arguments(sys.argv),
        "launcher": world.launcher,
        "world_size": world.size,
        "host": platform.node(),
        "python": platform.python_version(),
        "cpu_count": os.cpu_count(),
        "gpu": _gpu(recipe),
        "libraries": {name: _version(name) for name in LIBRARIES},
    }
    write_environment(run_dir, environment)
    return lock


def _gpu(recipe: Recipe) -> str | None:
    """The GPU's name; None where the run computes on CPUs."""
    import torch

    if recipe.parallel.device == "cpu" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name()


def _check_changes(run_dir: Path, recipe: Recipe) -> None:
    """Say what the recipe has changed since the newest checkpoint, and refuse what it may not."""
    directory, saved = _newest_readable(run_dir)
    if saved is None:
        return
    _check_tokenizer(directory, recipe)
    before, now = _fields(saved), _fields(recipe)
    # Where things lie is no part of them: data and autoencoder are known by their fingerprints.
    names = sorted((before.keys() | now.keys()) - {"run.dir", "model.autoencoder"})
    changed = {
        n: f"{n}: {before.get(n)} -> {now.get(n)}" for n in names if before.get(n) != now.get(n)
    }
    if checkpoint.has_only_weights(directory):
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
        print(f"changed since {directory.name}: {', '.join(changed.values())}", flush=True)


def _newest_readable(run_dir: Path) -> tuple[Path, Recipe | None]:
    """The newest checkpoint whose recipe and state are whole, whether the rest is or not."""
    for directory in checkpoint.step_directories(run_dir):
        # A damaged one is reported and passed over when checkpoints are loaded.
        with suppress(UserError, OSError):
            checkpoint.verify_description(directory)
            return directory, load_recipe(directory / checkpoint.RECIPE_FILE)
    return run_dir, None


def _check_tokenizer(directory: Path, recipe: Recipe) -> None:
    """Raises CheckpointError where a checkpoint and the data speak of different tokens."""
    try:
        trained = RunState.read(directory).tokenizer_sha256
    except CheckpointError:
        return
    path = recipe.data.sources[0].path
    given = read_meta(path, Downloads.of(recipe.data)).tokenizer.sha256
    if trained not in (None, given):
        raise CheckpointError(
            f"{directory / checkpoint.STATE_FILE}: written with the tokenizer of sha256 "
            f"{trained[:12]}…, but {path} was made with {given[:12]}…; use the data of the same "
            "tokenizer, or another run.dir"
        )


def _fields(recipe: Recipe) -> dict[str, Any]:
    """All fields by their dotted names, masked as they are in the recipe of a checkpoint."""
    fields: dict[str, Any] = {}
    for section, values in redact_values(recipe.to_dict()).items():
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
