"""The training loop of both language models."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from calm_dist.data.stream import open_training_stream
from calm_dist.errors import StoppedError
from calm_dist.parallel.pipeline import micro_batches
from calm_dist.parallel.rank_zero import on_rank_zero
from calm_dist.parallel.topology import Topology
from calm_dist.recipe import Recipe
from calm_dist.training import checkpoint, model_state
from calm_dist.training.build import build_parts
from calm_dist.training.health import RunProgress
from calm_dist.training.metrics import MetricsLog
from calm_dist.training.optimizer import JointOptimizer, StepResult
from calm_dist.training.phases import Phases
from calm_dist.training.stop import StopRequest


class Trainer:
    """One rank of a run: builds or resumes it, and trains to the recipe's last step."""

    def __init__(
        self,
        recipe: Recipe,
        topology: Topology,
        stop: StopRequest | None = None,
        phases: Phases | None = None,
    ) -> None:
        self.recipe, self.topology = recipe, topology
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
        )
        self.phases.enter("load the checkpoint")
        self._resume()
        self._metrics: MetricsLog | None = None
        if topology.rank == 0:
            self._metrics = MetricsLog(recipe, self.run_dir, self.progress.step)

    def run(self) -> None:
        """Train until the last step, or until asked to stop; both leave a checkpoint.

        Raises:
            StoppedError: a signal asked for it.
        """
        recipe = self.recipe
        batches = iter(self._stream)
        last = recipe.training.steps
        if self.progress.step >= last and self._metrics is not None:
            print(f"nothing to do: training.steps={last} are done", flush=True)
        stopping = False
        while self.progress.step < last and not stopping:
            started = time.perf_counter()
            self.phases.enter("data", self.progress.step)
            result = self.train_step(next(batches))
            self.progress.count(result.skipped, recipe.health.max_skipped_steps)
            step = self.progress.step
            if self._metrics is not None:
                seconds = time.perf_counter() - started
                self._metrics.training_step(step, result.numbers(), result.skipped, seconds)
            stopping = result.stop
            if step % recipe.checkpoint.every == 0 or step == last or stopping:
                self.save()
        if self._metrics is not None:
            self._metrics.close()
        if self.progress.step < last:
            raise StoppedError(self._stop.message(self.progress.step))

    def train_step(self, batch: dict[str, torch.Tensor]) -> StepResult:
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
            data_iterator=[micro_batches(batch, size) for _ in parts.chunks],
            model=parts.chunks,
            num_microbatches=recipe.num_micro_batches,
            seq_length=recipe.padded_length,
            micro_batch_size=size,
            forward_only=False,
        )
        self.phases.enter("optimizer", self.progress.step)
        # Only the last stage has outputs.
        zero = torch.zeros((), device=self.topology.device)
        loss = sum((output["loss"] for output in outputs), zero)
        return self.optimizer.step(self.progress.step, loss, self._stop.requested)

    def save(self) -> None:
        """Write a checkpoint of all ranks, then commit it as a whole."""
        self.phases.enter("checkpoint", self.progress.step)
        step, rank = self.progress.step, self.topology.rank
        temporary = on_rank_zero(lambda: checkpoint.begin(self.run_dir, step))
        parts = self.parts
        model_state.save(temporary, parts.chunks, parts.optimizer, parts.head, self.topology)
        if rank == 0:
            text = json.dumps(self._state(), indent=1) + "\n"
            (temporary / checkpoint.STATE_FILE).write_text(text, encoding="utf-8")
            (temporary / checkpoint.RECIPE_FILE).write_text(self.recipe.to_yaml(), encoding="utf-8")
        on_rank_zero(lambda: checkpoint.commit(temporary, self.recipe.checkpoint.keep))

    def _state(self) -> dict[str, Any]:
        """What a resumed run must know besides the tensors."""
        return {
            "format": 1,
            **asdict(self.progress),
            "tokens": self.progress.step * self.recipe.tokens_per_step,
            "tokenizer_sha256": self._stream.metas[0].tokenizer.sha256,
            "data": self._stream.state_dict(self.progress.step),
        }

    def _resume(self) -> None:
        """Go on from the newest valid checkpoint of the run directory, if it has one."""
        directory = on_rank_zero(lambda: checkpoint.newest_valid(self.run_dir))
        if directory is None:
            return
        state = json.loads((directory / checkpoint.STATE_FILE).read_text(encoding="utf-8"))
        parts, head = self.parts, self.parts.head
        if state.get(checkpoint.WEIGHTS_ONLY):
            # Imported: neither optimizer nor data has a state to go on from.
            model_state.start_from_weights(directory, parts.chunks, head, self.topology)
            report = f"starts from the weights in {directory}"
        else:
            model_state.load(
                directory, parts.chunks, parts.optimizer, head, self.topology, state["adam_steps"]
            )
            self._stream.load_state_dict(state["data"])
            self.progress = RunProgress.from_state(state)
            report = f"resumed from {directory} at step {self.progress.step}"
        if self.topology.rank == 0:
            print(report, flush=True)
