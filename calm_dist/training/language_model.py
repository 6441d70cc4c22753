"""Training of both language models: CALM and the discrete Transformer."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from calm_dist.data.stream import Batch
from calm_dist.errors import CheckpointError
from calm_dist.parallel.pipeline import micro_batches
from calm_dist.parallel.rank_zero import on_rank_zero
from calm_dist.parallel.topology import Topology
from calm_dist.recipe import LanguageModelRecipe, load_recipe
from calm_dist.released.config import calm_values
from calm_dist.released.files import is_released
from calm_dist.runs.checkpoints import RECIPE_FILE
from calm_dist.runs.checkpoints.run_state import STATE_FILE, RunState
from calm_dist.training.build import build_parts
from calm_dist.training.changes import latents_sha256
from calm_dist.training.checkpoint import model_state
from calm_dist.training.checkpoint.released_weights import take_released_weights
from calm_dist.training.checkpoint.writer import CheckpointWriter
from calm_dist.training.engine import StepResult, TrainingRun
from calm_dist.training.optimizer import JointOptimizer
from calm_dist.training.phases import Phases
from calm_dist.training.resolve import encoder_sha256
from calm_dist.training.stop import StopRequest

# Python 3.12 itself freezes some hundred objects in each collection; a program that does so freezes
# those of the libraries, a hundred thousand.
_FROZEN_BY_PYTHON = 10_000


class Trainer(TrainingRun):
    """One rank of a language model's run: its part of backbone and head."""

    recipe: LanguageModelRecipe

    def __init__(
        self,
        recipe: LanguageModelRecipe,
        topology: Topology,
        stop: StopRequest | None = None,
        phases: Phases | None = None,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(recipe, topology.rank, stop, phases, begin)
        self.topology = topology
        self.build()
        self.open_data(topology.device, topology.dp_size, recipe.parallel.model_parallel_size)
        self.phases.enter("load the checkpoint")
        self._encoder_sha256 = on_rank_zero(lambda: encoder_sha256(recipe))
        self._latents_sha256 = on_rank_zero(lambda: latents_sha256(recipe, self._stream.metas[0]))
        self._checkpoints = CheckpointWriter(recipe, topology)
        self._has_stepped = False
        self.resume()

    def build(self) -> None:
        """Build what `train_step` works with, apart from the data."""
        self.phases.enter("build the model")
        recipe, topology = self.recipe, self.topology
        self.parts = build_parts(recipe, topology)
        self.optimizer = JointOptimizer(recipe, self.parts.optimizer, self.parts.head, topology)
        self._schedule = get_forward_backward_func()

    @property
    def used_of_batches(self) -> tuple[str, ...]:
        # Latents take 2 * 4 * l bytes a patch, tokens 8 * K. Only the loss reads them.
        latents = self.topology.is_last_stage and self.recipe.reads_latents
        return (*super().used_of_batches, *(("mean", "log_std") if latents else ()))

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
        self.read_ahead()
        self.phases.enter("optimizer", self.progress.step)
        return self.optimizer.step(
            self.progress.step, loss, self._stop.requested, self._batches.failed
        )

    def _micro_batches(self, batch: Batch) -> Iterator[Batch]:
        for micro_batch in micro_batches(batch, self.recipe.training.micro_batch_size):
            self.phases.progress()
            yield micro_batch

    def run(self) -> None:
        were_frozen = gc.get_freeze_count() > _FROZEN_BY_PYTHON
        try:
            super().run()
        finally:
            # A program that does more than this training gets its memory back, with the process
            # groups' threads. What it had frozen itself stays so.
            if not were_frozen:
                gc.unfreeze()

    def after_step(self, updates: int) -> None:
        if not self._has_stepped:
            # In the first step, because that is slow anyway.
            self.phases.enter("checkpoint", self.progress.step)
            self._checkpoints.prepare(self.parts)
            _freeze_long_lived_objects()
            self._has_stepped = True
        self._checkpoints.poll(updates)

    def save(self, is_last: bool = False) -> None:
        """Begin a checkpoint of all ranks or, with ``checkpoint.async: false``, write it."""
        self.phases.enter("checkpoint", self.progress.step - 1)
        state = self.run_state(
            autoencoder_sha256=self._encoder_sha256, latents_sha256=self._latents_sha256
        )
        self._checkpoints.start(self.parts, state, is_last)

    def wait_for_save(self) -> None:
        self._checkpoints.wait()

    def finish_saving(self) -> None:
        self._checkpoints.finish()

    def check_resumed(self, directory: Path, state: RunState) -> None:
        if state.autoencoder_sha256 != self._encoder_sha256:
            raise CheckpointError(
                f"{directory / STATE_FILE}: trained on latents of the autoencoder "
                f"{state.autoencoder_sha256}, model.autoencoder is {self._encoder_sha256}; "
                "give the former autoencoder, or use another run.dir"
            )

    def load(self, directory: Path, state: RunState) -> None:
        parts, topology = self.parts, self.topology
        if state.weights_only:
            model_state.start_from_weights(
                directory, parts.chunks, parts.optimizer, parts.head, topology
            )
            return
        moments = self.recipe.training.optimizer_spec.moments
        model_state.load(
            directory,
            parts.chunks,
            parts.optimizer,
            parts.head,
            topology,
            moments,
            state.adam_steps,
        )

    def take_weights(self, directory: Path) -> list[str]:
        parts, topology = self.parts, self.topology
        inputs = (parts.chunks, parts.optimizer, parts.head, topology)
        check_attention_heads(directory, self.recipe)
        if is_released(directory):
            return take_released_weights(directory, self.recipe, *inputs)
        return model_state.take_weights(directory, *inputs)


def check_attention_heads(directory: Path, recipe: LanguageModelRecipe) -> None:
    """Refuse weights of other attention heads, which may have the same shapes.

    Raises:
        CheckpointError: their numbers differ, or ``directory`` does not hold a language model.
    """
    if is_released(directory):
        model = SimpleNamespace(**calm_values(directory)["model"])
        there = model.num_attention_heads, getattr(model, "num_key_value_heads", None)
    elif (directory / RECIPE_FILE).is_file():
        source = load_recipe(directory / RECIPE_FILE)
        if not isinstance(source, LanguageModelRecipe):
            raise CheckpointError("is an autoencoder; give a run of a language model")
        there = source.model.num_attention_heads, source.model.num_key_value_heads
    else:
        return
    here = recipe.model.num_attention_heads, recipe.model.num_key_value_heads
    for number, name in enumerate(("num_attention_heads", "num_key_value_heads")):
        # Without groups, each head has keys and values of its own.
        one, other = there[number] or there[0], here[number] or here[0]
        if one != other:
            raise CheckpointError(
                f"its backbone does not fit the recipe's: {name} is {one} there, {other} here"
            )


def _freeze_long_lived_objects() -> None:
    """Exclude the libraries' million long-lived objects from all later garbage collections.

    A collection that visits them takes 0.4 s and writes to each of their pages, which the kernel
    must then copy while a forked writer of a checkpoint is running.
    """
    gc.collect()
    gc.freeze()
