"""Checkpoints of a running language model, written while it trains on."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from calm_dist import flops
from calm_dist.errors import CheckpointError
from calm_dist.parallel.rank_zero import on_rank_zero
from calm_dist.parallel.topology import Topology
from calm_dist.recipe import Recipe
from calm_dist.training import checkpoint, model_state
from calm_dist.training.build import Parts
from calm_dist.training.run_state import RunState
from calm_dist.training.tensor_files import TensorWriter


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time; all ranks call every method together.

    A checkpoint that cannot be written (a full disk) does not end the training: it is reported,
    the ones before it stay, and the next one is tried when it is due. `finish` raises if the last
    one failed.
    """

    def __init__(self, recipe: Recipe, topology: Topology) -> None:
        self._recipe, self._topology = recipe, topology
        self._writer = TensorWriter(topology.groups.dp_cp)
        # Persistent writer processes hang on CPU (megatron-core 0.16.1).
        self._calls = AsyncCallsQueue(persistent=False)
        self._temporary = Path()
        self._started, self._waited = 0.0, 0.0
        self._committed: str | None = None
        self._failure: str | None = None

    def start(self, parts: Parts, state: RunState) -> None:
        """Begin to write a checkpoint; returns once the state is copied, or with
        ``checkpoint.async: false`` once it is committed."""
        self.wait()
        self._failure, self._started, self._waited = None, time.perf_counter(), 0.0
        run_dir = Path(self._recipe.run.dir)
        self._temporary = checkpoint.step_directory(run_dir, state.step).with_suffix(".tmp")
        self._attempt(lambda: self._start(parts, state))
        if not self._recipe.checkpoint.asynchronous:
            self.wait()

    def poll(self) -> None:
        """Commit the checkpoint that is being written, if all ranks have written their part."""
        self._finalize(blocking=False)

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, and commit it."""
        self._finalize(blocking=True)

    def finish(self) -> None:
        """Wait for what is being written.

        Raises:
            CheckpointError: the last checkpoint could not be written.
        """
        self.wait()
        if self._failure is not None:
            error = CheckpointError(self._failure)
            error.reported = True  # type: ignore[attr-defined]
            raise error

    def check_room(self) -> None:
        """Look at the disk before the training starts.

        Raises:
            CheckpointError: there is no room for even one checkpoint, on every rank.
        """
        recipe = self._recipe
        # Weights and Adam's moments in fp32, and a bf16 body's own weights.
        per_parameter = 12 if recipe.precision == "fp32" else 14
        needed = per_parameter * flops.count(recipe, tokens=0).parameters

        def look() -> None:
            free = shutil.disk_usage(recipe.run.dir).free
            if free < needed:
                raise CheckpointError(
                    f"run.dir: {recipe.run.dir} has {free / 1e9:.1f} GB free, a checkpoint takes "
                    f"about {needed / 1e9:.1f} GB; make room, or use another run.dir"
                )

        on_rank_zero(look)

    def _start(self, parts: Parts, state: RunState) -> None:
        recipe, run_dir = self._recipe, Path(self._recipe.run.dir)

        def begin() -> Path:
            temporary = checkpoint.begin(run_dir, state.step)
            (temporary / checkpoint.TENSORS).mkdir()
            state.write(temporary)
            text = recipe.to_yaml()
            (temporary / checkpoint.RECIPE_FILE).write_text(text, encoding="utf-8")
            return temporary

        temporary = on_rank_zero(begin)
        tensors = model_state.training_state(
            parts.chunks, parts.optimizer, parts.head, self._topology
        )
        request = self._writer.plan(tensors, temporary / checkpoint.TENSORS)
        request.add_finalize_fn(self._commit)
        self._calls.schedule_async_request(request)

    def _finalize(self, blocking: bool) -> None:
        if not self._calls.get_num_unfinalized_calls():
            return
        self._attempt(lambda: self._calls.maybe_finalize_async_calls(blocking))
        if self._committed is not None and self._topology.rank == 0:
            seconds = time.perf_counter() - self._started
            print(
                f"checkpoint {self._committed} written in {seconds:.1f} s, of which training "
                f"waited {self._waited:.2f} s",
                flush=True,
            )
        self._committed = None

    def _commit(self) -> None:
        settings, temporary = self._recipe.checkpoint, self._temporary
        on_rank_zero(lambda: checkpoint.commit(temporary, settings.keep, settings.keep_every))
        self._committed = temporary.stem

    def _attempt(self, work: Callable[[], object]) -> None:
        """Do a part of the writing; an error is the same on all ranks, and is kept."""
        began = time.perf_counter()
        try:
            work()
        except (CheckpointError, OSError) as error:
            self._failure = (
                f"{self._temporary}: {error}; no checkpoint of this step, those before it are as "
                "they were"
            )
            if self._topology.rank == 0:
                print(f"warning: {self._failure}", file=sys.stderr, flush=True)
                shutil.rmtree(self._temporary, ignore_errors=True)
        self._waited += time.perf_counter() - began


def newest_valid_for_all(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, each rank reading its share of the files.

    Says on stderr why newer ones are passed over, and removes what killed runs left half-written.
    A collective of the world.
    """

    def candidates() -> list[Path]:
        (run_dir / checkpoint.CHECKPOINTS).mkdir(exist_ok=True)
        checkpoint.clean(run_dir)
        return checkpoint.step_directories(run_dir)

    rank, size = dist.get_rank(), dist.get_world_size()
    for directory in on_rank_zero(candidates):
        problem = None
        try:
            checkpoint.verify(directory, rank, size)
        except (CheckpointError, OSError) as error:
            problem = str(error)
        problems: list[str | None] = [None] * size
        dist.all_gather_object(problems, problem)
        found = [text for text in problems if text is not None]
        if not found:
            return directory
        if rank == 0:
            checkpoint.pass_over(found[0])
    return None
