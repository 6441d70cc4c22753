"""The training loop of both language models."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from calm_dist.data.download import Downloads
from calm_dist.data.stream import Batch, open_training_stream
from calm_dist.errors import CheckpointError, StoppedError, TrainingDivergedError
from calm_dist.parallel.launch import patience
from calm_dist.parallel.pipeline import micro_batches
from calm_dist.parallel.rank_zero import on_rank_zero
from calm_dist.parallel.topology import Topology
from calm_dist.recipe import Recipe
from calm_dist.runs import checkpoints
from calm_dist.runs.checkpoints.run_state import STATE_FILE, RunState
from calm_dist.runs.metrics import MetricsLog
from calm_dist.runs.run_progress import RunProgress
from calm_dist.training.batches import LookAhead
from calm_dist.training.build import build_parts
from calm_dist.training.changes import latents_sha256
from calm_dist.training.checkpoint import model_state
from calm_dist.training.checkpoint.restart import (
    check_room,
    newest_valid_for_all,
    source_for_all,
    taken_over,
    tidy,
)
from calm_dist.training.checkpoint.writer import CheckpointWriter
from calm_dist.training.optimizer import JointOptimizer, StepResult
from calm_dist.training.phases import Phases
from calm_dist.training.resolve import encoder_sha256
from calm_dist.training.stop import StopRequest


class Trainer:
    """One rank of a run: builds or resumes it, and trains to the recipe's last step."""

    def __init__(
        self,
        recipe: Recipe,
        topology: Topology,
        stop: StopRequest | None = None,
        phases: Phases | None = None,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        self.recipe, self.topology = recipe, topology
        self._record_start = begin
        self._stop = stop or StopRequest()
        self.phases = phases or Phases()
        self.phases.enter("build the model")
        self.run_dir = Path(recipe.run.dir)
        self.progress = RunProgress()
        self.parts = build_parts(recipe, topology)
        self.optimizer = JointOptimizer(recipe, self.parts.optimizer, self.parts.head, topology)
        self._schedule = get_forward_backward_func()
        self.phases.enter("open the data")
        self._stream = open_training_stream(
            [source.path for source in recipe.data.sources],
            [source.weight for source in recipe.data.sources],
            batch_size=recipe.training.global_batch_size // topology.dp_size,
            replication=recipe.parallel.model_parallel_size,
            seed=recipe.data.seed,
            num_workers=recipe.data.num_workers,
            cache_dir=recipe.data.cache_dir,
            timeout_seconds=patience(recipe.health.timeout_seconds),
            downloads=Downloads.of(recipe.data),
        )
        self.phases.enter("load the checkpoint")
        self._encoder_sha256 = on_rank_zero(lambda: encoder_sha256(recipe))
        self._latents_sha256 = on_rank_zero(lambda: latents_sha256(recipe, self._stream.metas[0]))
        self._batches = LookAhead(self._stream)
        self._checkpoints = CheckpointWriter(recipe, topology)
        self._resumed_from = self._resume()
        check_room(recipe)
        self._metrics: MetricsLog | None = None

    def run(self) -> None:
        """Train until the last step, until asked to stop, or until the data fails; each leaves a
        checkpoint.

        Raises:
            StoppedError: a signal asked for it.
            DataError: a rank cannot read its next batch.
            CheckpointError: the last checkpoint could not be written.
            TrainingDivergedError: see `RunProgress.count`.
        """
        last = self.recipe.training.steps
        if self.progress.step >= last:
            if self.topology.rank == 0:
                print(f"nothing to do: training.steps={last} are done", flush=True)
            return
        self.phases.enter("data", self.progress.step)
        self._batches.read()
        self._batches.check()
        self._begin()
        result = self._train_to(last)
        self.phases.enter("checkpoint", self.progress.step - 1)
        self._checkpoints.finish()
        if self._metrics is not None:
            self._metrics.close()
            if doubt := checkpoints.doubt(self.run_dir, self.progress):
                print(doubt, file=sys.stderr, flush=True)
        if result.data_failed:
            self._batches.check()
        if self.progress.step < last:
            raise StoppedError(self._stop.message(self.progress.step))

    def _begin(self) -> None:
        """Change the run directory, now that nothing can be refused any more."""
        tidy(self.run_dir, self._resumed_from)
        self._record_start()
        if self.topology.rank == 0:
            self._metrics = MetricsLog(self.recipe, self.run_dir, self.progress.step)

    def _train_to(self, last: int) -> StepResult:
        """Steps until the ``last`` one, or until one says that the run ends."""
        recipe = self.recipe
        is_first = True
        while True:
            started = time.perf_counter()
            result = self.train_step(self._batches.take())
            if is_first:
                # The first step is slow anyway.
                self.phases.enter("checkpoint", self.progress.step)
                self._checkpoints.prepare(self.parts)
                _spare_the_collector()
                is_first = False
            self._checkpoints.poll(self.progress.adam_steps + (not result.skipped))
            step = self.progress.step + 1
            if self._metrics is not None:
                seconds = time.perf_counter() - started
                self._metrics.training_step(step, result.numbers(), result.skipped, seconds)
            self._count(result.skipped)
            ends = result.stop or result.data_failed or step == last
            if ends or step % recipe.checkpoint.every == 0:
                self.save(is_last=ends)
            if ends:
                return result

    def _count(self, skipped: bool) -> None:
        try:
            self.progress.count(skipped, self.recipe.health.max_skipped_steps)
        except TrainingDivergedError as error:
            # What is being written is from before, and worth having.
            self._checkpoints.wait()
            what_next = on_rank_zero(lambda: checkpoints.go_back(self.run_dir, self.progress))
            raise TrainingDivergedError(f"{error}. {what_next}") from None

    def train_step(self, batch: Batch) -> StepResult:
        """One optimizer step on this rank's part of a global batch."""
        parts, recipe = self.parts, self.recipe
        self.phases.enter("forward and backward", self.progress.step)
        for chunk in parts.chunks:
            chunk.zero_grad_buffer()
        parts.optimizer.zero_grad()
        parts.forward_step.begin(self.progress.step)
        size = recipe.training.micro_batch_size
        outputs = self._schedule(
            forward_step_func=parts.forward_step,
            data_iterator=[self._micro_batches(batch) for _ in parts.chunks],
            model=parts.chunks,
            num_microbatches=recipe.num_micro_batches,
            seq_length=recipe.padded_length,
            micro_batch_size=size,
            forward_only=False,
        )
        # Only the last stage has outputs.
        zero = torch.zeros((), device=self.topology.device)
        loss = sum((output["loss"] for output in outputs), zero)
        if self.progress.step + 1 < recipe.training.steps:
            self.phases.enter("data", self.progress.step)
            self._batches.read()
        self.phases.enter("optimizer", self.progress.step)
        return self.optimizer.step(
            self.progress.step, loss, self._stop.requested, self._batches.failed
        )

    def _micro_batches(self, batch: Batch) -> Iterator[Batch]:
        for micro_batch in micro_batches(batch, self.recipe.training.micro_batch_size):
            self.phases.progress()
            yield micro_batch

    def save(self, is_last: bool = False) -> None:
        """Begin a checkpoint of all ranks, or write it, as ``checkpoint.async`` says."""
        step = self.progress.step
        self.phases.enter("checkpoint", step - 1)
        state = RunState(
            **asdict(self.progress),
            tokens=step * self.recipe.tokens_per_step,
            tokenizer_sha256=self._stream.metas[0].tokenizer.sha256,
            autoencoder_sha256=self._encoder_sha256,
            latents_sha256=self._latents_sha256,
            data=self._stream.state_dict(step),
        )
        self._checkpoints.start(self.parts, state, is_last)

    def _resume(self) -> Path | None:
        """Go on from the newest valid checkpoint of the run directory, if it has one; otherwise
        take over what ``run.continue_from`` says."""
        directory = newest_valid_for_all(self.run_dir)
        if directory is None:
            if self.recipe.run.continue_from is not None:
                self._continue(source_for_all(self.recipe.run.continue_from))
            return None
        state = RunState.read(directory)
        if state.weights_only:
            self._start_from_weights(directory)
            return directory
        if state.autoencoder_sha256 != self._encoder_sha256:
            raise CheckpointError(
                f"{directory / STATE_FILE}: trained on latents of the autoencoder "
                f"{state.autoencoder_sha256}, model.autoencoder is {self._encoder_sha256}; "
                "name that autoencoder, or use another run.dir"
            )
        assert state.data is not None
        self._stream.load_state_dict(state.data)
        self._load(directory, state.adam_steps)
        self.progress = RunProgress.from_state(state.model_dump())
        self._say(f"resumed from {directory} at step {self.progress.step}")
        return directory

    def _continue(self, directory: Path) -> None:
        """Begin with weights and moments of another run."""
        state = RunState.read(directory)
        self.progress = RunProgress.continuing(directory, state.adam_steps)
        if state.weights_only:
            self._start_from_weights(directory)
            return
        self._load(directory, state.adam_steps)
        self._say(taken_over(directory, state))

    def _load(self, directory: Path, adam_steps: int) -> None:
        parts = self.parts
        model_state.load(
            directory, parts.chunks, parts.optimizer, parts.head, self.topology, adam_steps
        )

    def _start_from_weights(self, directory: Path) -> None:
        """Of an import, where neither optimizer nor data has a state to go on from."""
        parts = self.parts
        model_state.start_from_weights(
            directory, parts.chunks, parts.optimizer, parts.head, self.topology
        )
        self._say(f"starts from the weights in {directory}")

    def _say(self, text: str) -> None:
        if self.topology.rank == 0:
            print(text, flush=True)


def _spare_the_collector() -> None:
    """Take what stays, a million objects of the libraries, out of all later collections.

    One that looked at them took 0.4 s, in which it wrote to every page of theirs, which a forked
    writer of a checkpoint makes the kernel map anew.
    """
    gc.collect()
    gc.freeze()
