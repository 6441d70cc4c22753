"""The frame of every training: launch, world, run directory."""

from __future__ import annotations

import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Generic

from calm_dist.errors import UserError
from calm_dist.files import replace_text
from calm_dist.parallel.launch import (
    World,
    cuda_environment,
    join_world,
    read_world,
    select_device,
)
from calm_dist.parallel.processes import children_die_with_us
from calm_dist.progress import duration
from calm_dist.recipe import LanguageModelRecipe, Recipe
from calm_dist.redact import redact_arguments
from calm_dist.runs.directory import acquire_lock, end_recorded, release_lock, write_environment
from calm_dist.training.changes import check_changes
from calm_dist.training.phases import Phases
from calm_dist.training.resolve import KindOfRecipe, resolve
from calm_dist.training.stop import StopRequest

if TYPE_CHECKING:
    import torch

    from calm_dist.models.attention_kernel import Choice

_log = logging.getLogger(__name__)

LIBRARIES = ("torch", "megatron-core", "deepspeed", "mosaicml-streaming", "flash-attn", "triton")


@dataclass(frozen=True)
class Session(Generic[KindOfRecipe]):
    """The context of a training.

    Attributes:
        recipe: the resolved recipe.
        stop: records signals to stop.
        phases: the current phase of the training, for the watchdog.
        begin: records the start in the run directory; all ranks must call it once the run can no
            longer be refused, before the first step.
    """

    recipe: KindOfRecipe
    device: torch.device
    stop: StopRequest
    phases: Phases
    begin: Callable[[], None]


@contextmanager
def launched(recipe: KindOfRecipe) -> Iterator[Session[KindOfRecipe]]:
    """Connect the processes that a launcher started.

    A rank that makes no progress for ``health.timeout_seconds`` ends this process; see `watchdog`.

    Raises:
        UserError: recipe, data or launch are wrong, before any process group exists.
        PeerLostError: another process died inside the context.
        HungError: another process detected that a rank hangs.
    """
    started = time.monotonic()
    children_die_with_us()
    world = read_world()
    world.export()
    recipe = resolve(recipe.with_world_size(world.size))
    run_dir = Path(recipe.run.dir)
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    if world.rank == 0:
        # Before loading the libraries, which takes long.
        _log.info(_introduction(recipe, world))
    if recipe.parallel.device == "cpu":
        # Before torch is imported: Megatron-core and DeepSpeed use any GPU that they see.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for name, value in cuda_environment(recipe.parallel.tensor_parallel_size).items():
        os.environ.setdefault(name, value)

    import torch.distributed as dist

    from calm_dist.parallel.rank_zero import on_rank_zero
    from calm_dist.training.watchdog import watched

    device = select_device(world, recipe.parallel.device)
    attention = _attention(recipe, device)
    if world.rank == 0 and attention is not None and attention.warning is not None:
        _log.warning(attention.warning)
    # A rank may be busy with downloads that are retried.
    seconds = recipe.health.timeout_seconds + recipe.data.patience_seconds
    store = join_world(world, device, seconds)
    stop, phases = StopRequest(), Phases()
    with watched(store, world, phases, recipe.health.timeout_seconds), stop.listening():
        phases.enter("look at the run directory")
        try:
            lock = on_rank_zero(lambda: prepare_run_directory(recipe))
        except (UserError, OSError):
            # All ranks get this error and end at the same time. A rank that kept its process groups
            # has been seen to abort at exit.
            dist.destroy_process_group()
            raise
        try:
            with _recorded(recipe, world, attention) as begin:
                yield Session(recipe, device, stop, phases, begin)
                phases.enter("end")
                dist.barrier()
        finally:
            if world.rank == 0:
                release_lock(lock)
    # Not after an error: it could wait for a dead peer.
    dist.destroy_process_group()
    if world.rank == 0:
        _log.info(f"done in {duration(time.monotonic() - started)}: {run_dir}")


@contextmanager
def _recorded(
    recipe: Recipe, world: World, attention: Choice | None
) -> Iterator[Callable[[], None]]:
    """Gives a function that records the start of a training, and finally records how it ended.

    A refused start leaves the records of the previous one.
    """
    from calm_dist.parallel.rank_zero import on_rank_zero

    begun: list[bool] = []

    def begin() -> None:
        on_rank_zero(lambda: record_start(recipe, world, attention))
        begun.append(True)

    if world.rank != 0:
        yield begin
        return
    with end_recorded(Path(recipe.run.dir), lambda: bool(begun)):
        try:
            yield begin
        except (UserError, OSError):
            raise
        except Exception:
            # Not refused but failed, for example while building the model.
            if not begun:
                record_start(recipe, world, attention)
                begun.append(True)
            raise


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


def prepare_run_directory(recipe: Recipe) -> int:
    """Lock the run directory, and check that the recipe may continue in it.

    Returns:
        A descriptor that keeps other runs out of the directory while it is open.

    Raises:
        CheckpointError: the directory holds checkpoints of another model.
        LaunchError: another run is using the directory.
    """
    run_dir = Path(recipe.run.dir)
    lock = acquire_lock(run_dir)
    try:
        check_changes(run_dir, recipe)
    except BaseException:
        release_lock(lock)
        raise
    return lock


def record_start(recipe: Recipe, world: World, attention: Choice | None = None) -> None:
    """Write the resolved ``recipe.yaml`` and ``environment.json``.

    Only after all checks: a refused start must leave the files of the previous one.
    """
    run_dir = Path(recipe.run.dir)
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
        "attention": None if attention is None else attention.kernel,
        "attention_reason": None if attention is None else attention.reason,
        "libraries": {name: _version(name) for name in LIBRARIES},
    }
    write_environment(run_dir, environment)


def _attention(recipe: Recipe, device: torch.device) -> Choice | None:
    """The implementation of attention; None for an autoencoder, which has none."""
    from calm_dist.models.attention_kernel import attention_kernel

    return attention_kernel(recipe, device) if isinstance(recipe, LanguageModelRecipe) else None


def _gpu(recipe: Recipe) -> str | None:
    """The GPU's name; None if the run computes on CPUs."""
    import torch

    if recipe.parallel.device == "cpu" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
