"""Writes checkpoints of a language model while its training continues."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from calm_dist.log import NOTE
from calm_dist.parallel.processes import hurry
from calm_dist.parallel.rank_zero import on_rank_zero
from calm_dist.parallel.topology import Topology
from calm_dist.recipe import LanguageModelRecipe
from calm_dist.runs import checkpoints
from calm_dist.runs.checkpoints.run_state import RunState
from calm_dist.training.build import Parts
from calm_dist.training.checkpoint import forks, model_state
from calm_dist.training.checkpoint.attempts import Attempts
from calm_dist.training.checkpoint.staging import not_forked
from calm_dist.training.checkpoint.tensor_files import TensorWriter

_log = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time; all ranks call every method together.

    A checkpoint that cannot be written does not end the training, see `Attempts`.
    """

    def __init__(self, recipe: LanguageModelRecipe, topology: Topology) -> None:
        self._recipe, self._recipe_text, self._topology = recipe, recipe.to_yaml(), topology
        self._writer = TensorWriter(topology.groups.dp_cp)
        # Persistent writer processes hang on CPU (megatron-core 0.16.1).
        self._calls = AsyncCallsQueue(persistent=False)
        self._temporary = Path()
        self._started, self._waited, self._polls = 0.0, 0.0, 0
        self._committed: str | None = None
        self._attempts = Attempts()
        self._rotation = checkpoints.Rotation(Path(recipe.run.dir), recipe.checkpoint)

    def prepare(self, parts: Parts) -> None:
        """Make the first checkpoint as cheap as later ones; call once the optimizers have state."""
        self._writer.prepare(self._state(parts))

    def start(self, parts: Parts, state: RunState, is_last: bool = False) -> None:
        """Begin to write a checkpoint; returns once the state is copied or, with
        ``checkpoint.async: false``, once the checkpoint is committed.

        Args:
            is_last: the training ends after this step.
        """
        self.wait()
        self._attempts.forget()
        self._started, self._waited, self._polls = time.perf_counter(), 0.0, 0
        run_dir = Path(self._recipe.run.dir)
        self._temporary = checkpoints.step_directory(run_dir, state.step).with_suffix(".tmp")
        urgent = is_last or not self._recipe.checkpoint.asynchronous
        self._attempt(lambda: self._start(parts, state, urgent))
        if not self._recipe.checkpoint.asynchronous:
            self.wait()

    def poll(self, updates: int) -> None:
        """Call after each step: commits the checkpoint being written once all ranks have written
        their parts.

        Args:
            updates: number of updates that the optimizers have made, this step included.
        """
        self._polls += 1
        if self._topology.rank == 0:
            self._rotation.step_taken(updates)
        # On a fully loaded machine, low priority could keep the writer from finishing before the
        # next checkpoint is due, which would then wait for it.
        if self._polls == -(-self._recipe.checkpoint.every // 2):
            self._hurry()
        self._finalize(blocking=False)

    def wait(self) -> None:
        """Wait for the checkpoint being written, and commit it."""
        self._finalize(blocking=True)

    def finish(self) -> None:
        """Wait for the checkpoint being written, at the end of the run.

        Raises:
            CheckpointError: the last checkpoint could not be written.
        """
        self.wait()
        self._attempts.finish()

    def _start(self, parts: Parts, state: RunState, urgent: bool) -> None:
        run_dir = Path(self._recipe.run.dir)

        def begin() -> Path:
            temporary = checkpoints.begin(run_dir, state.step)
            (temporary / checkpoints.TENSORS).mkdir()
            state.write(temporary)
            (temporary / checkpoints.RECIPE_FILE).write_text(self._recipe_text, encoding="utf-8")
            return temporary

        temporary = on_rank_zero(begin)
        tensors = self._state(parts)
        # Collected first, because planning takes the state apart.
        memory = list(model_state.tensors_in_memory(parts.chunks, tensors))
        request = self._writer.plan(
            tensors,
            temporary / checkpoints.TENSORS,
            urgent,
            lambda: self._rotation.commit(temporary),
        )
        try:
            with not_forked(memory if self._writer.has_copies else ()):
                forks.schedule(self._calls, request)
        except OSError as error:
            # This rank has no memory or no process left, which the others cannot know. It takes
            # part without a process, so that all learn that it has written nothing.
            rank = self._topology.rank
            _log.log(NOTE, f"rank {rank}: cannot fork a process to write the checkpoint ({error})")
            forks.schedule(self._calls, request._replace(async_fn=None))

    def _state(self, parts: Parts) -> dict[str, Any]:
        moments = self._recipe.training.optimizer_spec.moments
        return model_state.training_state(parts.chunks, parts.optimizer, parts.head, moments)

    def _finalize(self, blocking: bool) -> None:
        calls = self._calls
        if not calls.get_num_unfinalized_calls() and not self._writer.is_ending:
            return
        if blocking:
            self._hurry()
        self._attempt(lambda: self._advance(blocking))
        if self._committed is not None and self._topology.rank == 0:
            seconds = time.perf_counter() - self._started
            _log.info(
                f"checkpoint {self._committed} written in {seconds:.1f} s, of which training "
                f"waited {self._waited:.2f} s"
            )
        self._committed = None

    def _hurry(self) -> None:
        for call in self._calls.async_calls:
            if (process := call.async_caller.process) is not None and process.is_alive():
                hurry(process.pid)

    def _advance(self, blocking: bool) -> None:
        """Go from the tensors written by all ranks to the final work of rank 0."""
        if self._calls.get_num_unfinalized_calls():
            self._calls.maybe_finalize_async_calls(blocking)
        if self._writer.is_ending and self._writer.ended(wait=blocking):
            self._committed = self._temporary.stem

    def _attempt(self, work: Callable[[], object]) -> None:
        began = time.perf_counter()
        self._attempts.make(self._temporary, work)
        self._waited += time.perf_counter() - began
