"""The loop of a training run, common to all models: resume, read ahead, step, count, save, stop."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from calm_dist.data.download import Downloads
from calm_dist.data.stream import Batch, TrainingStream, open_training_stream
from calm_dist.errors import CheckpointError, StoppedError, TrainingDivergedError, listed
from calm_dist.log import NOTE
from calm_dist.parallel.launch import patience
from calm_dist.parallel.rank_zero import on_rank_zero
from calm_dist.recipe import Recipe
from calm_dist.released.files import is_released
from calm_dist.runs import checkpoints
from calm_dist.runs.checkpoints.run_state import RunState
from calm_dist.runs.metrics import MetricsLog
from calm_dist.runs.run_progress import RunProgress
from calm_dist.training.batches import LookAhead
from calm_dist.training.changes import latents_sha256
from calm_dist.training.checkpoint.restart import (
    check_checkpoint_room,
    newest_valid_for_all,
    source_for_all,
    taken_over,
    tidy,
)
from calm_dist.training.phases import Phases
from calm_dist.training.stop import StopRequest

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step; the same on every rank."""

    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool
    stop: bool
    """Whether any rank was asked to stop."""
    data_failed: bool
    """Whether any rank could not read its next batch."""

    def numbers(self) -> dict[str, float]:
        """The logged numbers."""
        return {
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
        }


class TrainingRun(ABC):
    """One rank of a run, from its newest checkpoint to the recipe's last step.

    A trainer builds its model and calls `open_data`, then `resume`; it implements `train_step`,
    `load`, `save` and the waiting for checkpoints. All ranks call every method together.
    """

    def __init__(
        self,
        recipe: Recipe,
        rank: int,
        stop: StopRequest | None,
        phases: Phases | None,
        begin: Callable[[], None],
    ) -> None:
        """
        Args:
            stop: records signals to stop.
            phases: receives the current phase of this rank.
            begin: called once the run can no longer be refused; see `session.Session`.
        """
        self.recipe, self.rank = recipe, rank
        self.run_dir = Path(recipe.run.dir)
        self.phases = phases or Phases()
        self.progress = RunProgress()
        self._stop = stop or StopRequest()
        self._record_start = begin
        self._resumed_from: Path | None = None
        self._metrics: MetricsLog | None = None
        self._stream: TrainingStream
        self._batches: LookAhead

    @property
    def used_of_batches(self) -> tuple[str, ...]:
        """What of a batch this rank uses; the rest is not copied to its device."""
        return "index", "tokens"

    @abstractmethod
    def train_step(self, batch: Batch) -> StepResult:
        """Take one optimizer step on this rank's part of a global batch; call `read_ahead` once the
        batch has been used."""

    @abstractmethod
    def load(self, directory: Path, state: RunState) -> None:
        """Load the weights of a checkpoint and, unless it holds only weights, the moments."""

    @abstractmethod
    def save(self, is_last: bool = False) -> None:
        """Write a checkpoint of all ranks, or begin to write it.

        Args:
            is_last: the training ends after this step.
        """

    @abstractmethod
    def check_resumed(self, directory: Path, state: RunState) -> None:
        """Raises CheckpointError if this run cannot continue from a checkpoint of its own."""

    @abstractmethod
    def after_step(self, updates: int) -> None:
        """Called after each step.

        Args:
            updates: number of updates that the optimizers have made, this step included.
        """

    @abstractmethod
    def wait_for_save(self) -> None:
        """Wait until the checkpoint being written is committed or has failed."""

    @abstractmethod
    def take_weights(self, directory: Path) -> list[str]:
        """Load the weights alone of a checkpoint or a released directory.

        Returns:
            what did not fit of a head, which then keeps its initial weights.

        Raises:
            CheckpointError: other weights do not fit.
        """

    @abstractmethod
    def finish_saving(self) -> None:
        """`wait_for_save` at the end of the run.

        Raises:
            CheckpointError: the last checkpoint could not be written.
        """

    def open_data(self, device: torch.device, replicas: int, replication: int = 1) -> None:
        """Open the training data.

        Args:
            device: of this rank.
            replicas: parts that a global batch is split into.
            replication: consecutive ranks that read the same part.
        """
        recipe = self.recipe
        self.phases.enter("open the data")
        self._stream = open_training_stream(
            [source.path for source in recipe.data.sources],
            recipe.data.weights,
            batch_size=recipe.training.global_batch_size // replicas,
            most_epochs=[source.max_epochs for source in recipe.data.sources],
            replication=replication,
            seed=recipe.data.seed,
            num_workers=recipe.data.num_workers,
            cache_dir=recipe.data.cache_dir,
            cache_limit=recipe.data.cache_limit,
            timeout_seconds=patience(recipe.health.timeout_seconds),
            downloads=Downloads.of(recipe.data),
        )
        self._batches = LookAhead(self._stream, device, self.used_of_batches)

    def resume(self) -> None:
        """Continue from the newest valid checkpoint of the run directory, if it has one; otherwise
        start from ``run.continue_from`` or ``run.init_from``, if one is set."""
        directory = newest_valid_for_all(self.run_dir)
        if directory is not None:
            self._resume_from(directory)
        elif self.recipe.run.continue_from is not None:
            self._continue_from(source_for_all(self.recipe.run.continue_from))
        elif self.recipe.run.init_from is not None:
            self._init_from(self.recipe.run.init_from)
        self._resumed_from = directory
        if self.progress.step < self.recipe.training.steps:
            check_checkpoint_room(self.recipe)
        for line in self._stream.describe(self.progress.step, self.recipe.training.steps):
            self.say(line)

    def run(self) -> None:
        """Train until the last step, until asked to stop, or until the data fails; all of these
        leave a checkpoint.

        Raises:
            StoppedError: a signal asked the run to stop.
            DataError: a rank cannot read its next batch.
            CheckpointError: the last checkpoint could not be written.
            TrainingDivergedError: see `RunProgress.count`.
        """
        last = self.recipe.training.steps
        if self.progress.step >= last:
            self.say(f"nothing to do: training.steps={last} are done")
            return
        # Without the step: the first batch has the time limit of the start.
        self.phases.enter("data")
        self._batches.read()
        self._batches.check()
        self._begin()
        try:
            result = self._train_to(last)
        finally:
            self._batches.close()
        self.phases.enter("checkpoint", self.progress.step - 1)
        try:
            self.finish_saving()
        finally:
            if self._metrics is not None:
                self._metrics.close()
            # After the checkpoint, because a reader in a download ends late.
            self._stream.close()
        self.say(self._stream.describe_read(self.progress.step))
        if self.rank == 0 and (doubt := checkpoints.doubt(self.run_dir, self.progress)):
            _log.warning(doubt)
        # A signal to all processes of a job ends its readers, too.
        if result.data_failed and not result.stop:
            self._batches.check()
        if self.progress.step < last:
            raise StoppedError(self._stop.message(self.progress.step))

    def read_ahead(self) -> None:
        """Read the next batch, unless this step is the last one."""
        if self.progress.step + 1 < self.recipe.training.steps:
            self.phases.enter("data", self.progress.step)
            self._batches.read()

    def run_state(
        self, autoencoder_sha256: str | None = None, latents_sha256: str | None = None
    ) -> RunState:
        """The state of the run at this step, for a checkpoint."""
        step = self.progress.step
        return RunState(
            **asdict(self.progress),
            tokens=step * self.recipe.tokens_per_step,
            tokenizer_sha256=self._stream.metas[0].tokenizer.sha256,
            autoencoder_sha256=autoencoder_sha256,
            latents_sha256=latents_sha256,
            data=self._stream.state_dict(step),
        )

    def say(self, text: str) -> None:
        """Log a line on rank 0."""
        if self.rank == 0:
            _log.info(text)

    def _begin(self) -> None:
        """Make the first changes to the run directory, once the run can no longer be refused."""
        tidy(self.run_dir, self._resumed_from)
        self._record_start()
        if self.rank == 0:
            self._metrics = MetricsLog(self.recipe, self.run_dir, self.progress.step)

    def _train_to(self, last: int) -> StepResult:
        """Take steps until the ``last`` one, or until the result of one ends the run."""
        while True:
            started = time.perf_counter()
            result = self.train_step(self._batches.take())
            self.after_step(self.progress.adam_steps + (not result.skipped))
            step = self.progress.step + 1
            ends = result.stop or result.data_failed or step == last
            if self._metrics is not None:
                seconds = time.perf_counter() - started
                self._metrics.training_step(step, result.numbers(), result.skipped, seconds, ends)
            self._count(result.skipped)
            if ends or step % self.recipe.checkpoint.every == 0:
                self.save(is_last=ends)
            if ends:
                return result

    def _count(self, skipped: bool) -> None:
        try:
            self.progress.count(skipped, self.recipe.health.max_skipped_steps)
        except TrainingDivergedError as error:
            # The checkpoint being written is from before the divergence and worth keeping.
            self.wait_for_save()
            what_next = on_rank_zero(lambda: checkpoints.go_back(self.run_dir, self.progress))
            raise TrainingDivergedError(f"{error}. {what_next}") from None

    def _resume_from(self, directory: Path) -> None:
        state = RunState.read(directory)
        if state.weights_only:
            self._start_from_weights(directory, state)
            return
        self.check_resumed(directory, state)
        assert state.data is not None
        note = self._stream.load_state_dict(state.data)
        if note is not None:
            self.say(note)
        self.load(directory, state)
        self.progress = RunProgress.from_state(state.model_dump())
        self.say(f"resumed from {directory} at step {self.progress.step}")

    def _continue_from(self, directory: Path) -> None:
        """Begin with the weights and moments of another run."""
        state = RunState.read(directory)
        self.progress = RunProgress.continuing(directory, state.adam_steps)
        if state.weights_only:
            self._start_from_weights(directory, state)
            return
        self.load(directory, state)
        self.say(taken_over(directory, state))

    def _init_from(self, path: str) -> None:
        """Begin with the weights of another run or of a released model, and nothing else."""
        name = "run.init_from"
        released = is_released(path)
        directory = Path(path) if released else source_for_all(path, name)
        if not released and self.rank == 0:
            self._warn_of_other_data(directory, name)
        try:
            left_out = self.take_weights(directory)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {directory}: {error}") from error
        self.say(f"starting from the weights in {directory}")
        if left_out and self.rank == 0:
            _log.log(
                NOTE,
                f"note: {name}: the head of {directory} does not fit this recipe's, which starts "
                f"with new weights: {listed(left_out, 5)}",
            )

    def _warn_of_other_data(self, directory: Path, name: str) -> None:
        state, meta = RunState.read(directory), self._stream.metas[0]
        trained, given = state.tokenizer_sha256, meta.tokenizer.sha256
        if trained not in (None, given):
            _log.warning(
                f"{name}: {directory} was trained with the tokenizer of sha256 {trained[:12]}…, "
                f"the data was made with {given[:12]}…: its embeddings are of other tokens"
            )
        encoded, latents = state.latents_sha256, latents_sha256(self.recipe, meta)
        if encoded is not None and latents is not None and encoded != latents:
            _log.warning(
                f"{name}: {directory} was trained on latents of the autoencoder of sha256 "
                f"{encoded[:12]}…, the data has latents of {latents[:12]}…: its head draws latents "
                "of the former and has to learn those of the latter; encode the data with the "
                "former to keep what it knows"
            )

    def _start_from_weights(self, directory: Path, state: RunState) -> None:
        """Begin with imported weights, without a state of optimizer or data."""
        self.load(directory, state)
        self.say(f"starting from the weights in {directory}")
