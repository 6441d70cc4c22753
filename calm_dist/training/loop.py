"""The training loop of both language models."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from calm_dist.data.stream import open_training_stream
from calm_dist.errors import CheckpointError, TrainingDivergedError
from calm_dist.parallel.pipeline import micro_batches
from calm_dist.parallel.rank_zero import on_rank_zero
from calm_dist.parallel.topology import Topology
from calm_dist.recipe import Recipe
from calm_dist.training import checkpoint, model_state
from calm_dist.training.build import build_parts
from calm_dist.training.metrics import MetricsLog
from calm_dist.training.optimizer import JointOptimizer, StepResult


class Trainer:
    """One rank of a run: builds or resumes it, and trains to the recipe's last step."""

    def __init__(self, recipe: Recipe, topology: Topology) -> None:
        self.recipe, self.topology = recipe, topology
        self.run_dir = Path(recipe.run.dir)
        self.step = 0
        self.adam_steps = 0
        self.skipped_in_a_row = 0
        self.parts = build_parts(recipe, topology)
        self.optimizer = JointOptimizer(recipe, self.parts.optimizer, self.parts.head, topology)
        self._schedule = get_forward_backward_func()
        self._stream = open_training_stream(
            [source.path for source in recipe.data.sources],
            [source.weight for source in recipe.data.sources],
            batch_size=recipe.training.global_batch_size // topology.dp_size,
            replication=recipe.parallel.model_parallel_size,
            seed=recipe.data.seed,
            num_workers=recipe.data.num_workers,
            cache_dir=recipe.data.cache_dir,
        )
        self._resume()
        self._metrics: MetricsLog | None = None
        if topology.rank == 0:
            self._metrics = MetricsLog(recipe, self.run_dir, self.step)

    def run(self) -> None:
        """Train until the last step; the last step always leaves a checkpoint."""
        recipe = self.recipe
        batches = iter(self._stream)
        while self.step < recipe.training.steps:
            started = time.perf_counter()
            result = self.train_step(next(batches))
            self.step += 1
            self._log(result, time.perf_counter() - started)
            self._check_health(result)
            if self.step % recipe.checkpoint.every == 0 or self.step == recipe.training.steps:
                self.save()
        if self._metrics is not None:
            self._metrics.close()

    def train_step(self, batch: dict[str, torch.Tensor]) -> StepResult:
        """One optimizer step on this rank's part of a global batch."""
        parts, recipe = self.parts, self.recipe
        for chunk in parts.chunks:
            chunk.zero_grad_buffer()
        parts.optimizer.zero_grad()
        parts.forward_step.begin(self.step)
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
        # Only the last stage has outputs.
        zero = torch.zeros((), device=self.topology.device)
        loss = sum((output["loss"] for output in outputs), zero)
        result = self.optimizer.step(self.step, loss)
        self.adam_steps += not result.skipped
        return result

    def save(self) -> None:
        """Write a checkpoint of all ranks, then commit it as a whole."""
        step, rank = self.step, self.topology.rank
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
            "step": self.step,
            "tokens": self.step * self.recipe.tokens_per_step,
            "adam_steps": self.adam_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "tokenizer_sha256": self._stream.metas[0].tokenizer.sha256,
            "data": self._stream.state_dict(self.step),
        }

    def _resume(self) -> None:
        """Go on from the newest valid checkpoint of the run directory, if it has one."""
        directory = on_rank_zero(lambda: checkpoint.newest_valid(self.run_dir))
        if directory is None:
            return
        state = json.loads((directory / checkpoint.STATE_FILE).read_text(encoding="utf-8"))
        _check_same_model(directory, self.recipe)
        parts = self.parts
        model_state.load(
            directory,
            parts.chunks,
            parts.optimizer,
            parts.head,
            self.topology,
            state["adam_steps"],
        )
        self._stream.load_state_dict(state["data"])
        self.step, self.adam_steps = state["step"], state["adam_steps"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        if self.topology.rank == 0:
            print(f"resumed from {directory} at step {self.step}", flush=True)

    def _log(self, result: StepResult, seconds: float) -> None:
        every, step = self.recipe.logging.every, self.step
        if self._metrics is None or (step % every and step != self.recipe.training.steps):
            return
        tokens = self.recipe.tokens_per_step
        self._metrics.training(
            {
                "step": step,
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "learning_rate": result.learning_rate,
                "tokens": step * tokens,
                "tokens_per_second": tokens / seconds,
                "step_seconds": seconds,
                "skipped": int(result.skipped),
            }
        )

    def _check_health(self, result: StepResult) -> None:
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
        limit = self.recipe.health.max_skipped_steps
        if self.skipped_in_a_row > limit:
            raise TrainingDivergedError(
                f"step {self.step}: loss or gradient not finite for {self.skipped_in_a_row} steps "
                f"in a row (health.max_skipped_steps={limit}); lower training.learning_rate or "
                "look at the data"
            )


def _check_same_model(directory: Path, recipe: Recipe) -> None:
    """A checkpoint goes on only with the model that it was written for."""
    from calm_dist.recipe import load_recipe

    before = load_recipe(directory / checkpoint.RECIPE_FILE).to_dict()["model"]
    now = recipe.to_dict()["model"]
    changed = [name for name in now if name != "autoencoder" and before.get(name) != now[name]]
    if changed:
        listed = ", ".join(f"model.{n}: {before.get(n)} -> {now[n]}" for n in changed)
        raise CheckpointError(
            f"{directory}: was written for another model ({listed}); use its recipe, or another "
            "run.dir"
        )
