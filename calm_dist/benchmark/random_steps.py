"""Training steps on random blocks, like those of a run but without data and checkpoints."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.profiler import record_function

from calm_dist.parallel.pipeline import micro_batches
from calm_dist.parallel.topology import Topology
from calm_dist.recipe import LanguageModelRecipe
from calm_dist.training.build import build_parts, make_forward_step
from calm_dist.training.engine import StepResult
from calm_dist.training.optimizer import JointOptimizer

OPTIMIZER_RANGE = "part: optimizer"
"""Name of the range around clipping and AdamW in a profile."""


@dataclass(frozen=True)
class StepTimes:
    """Times of one step on one rank, in seconds."""

    schedule: float
    """Forward and backward passes of all micro-batches."""
    busy: float
    """Processor time during the schedule, of all threads of this process."""
    optimizer: float

    @property
    def total(self) -> float:
        return self.schedule + self.optimizer


class RandomSteps:
    """Trains a language model on one rank, with the same random batch in every step."""

    def __init__(self, recipe: LanguageModelRecipe, topology: Topology) -> None:
        # DeepSpeed needs it even without a launcher.
        os.environ.setdefault("LOCAL_RANK", "0")
        self.recipe = recipe
        self.batch = random_batch(recipe, topology)
        if topology.device.type == "cuda":
            # As the trainer's batches are: other copies to the device wait for it.
            self.batch = {name: tensor.pin_memory() for name, tensor in self.batch.items()}
        self.parts = build_parts(recipe, topology)
        self._topology = topology
        self._joint = JointOptimizer(recipe, self.parts.optimizer, self.parts.head, topology)
        self._schedule = get_forward_backward_func()
        self.result: StepResult | None = None
        """The result of the last step."""

    def step(self, number: int = 0) -> StepTimes:
        """Training step ``number``; on a GPU the times are those of launching its kernels."""
        recipe, parts = self.recipe, self.parts
        started, busy = time.perf_counter(), time.process_time()
        for chunk in parts.chunks:
            chunk.zero_grad_buffer()
        parts.optimizer.zero_grad()
        parts.forward_step.begin(number)
        size = recipe.training.micro_batch_size
        outputs = self._schedule(
            forward_step_func=parts.forward_step,
            data_iterator=[micro_batches(self.batch, size) for _ in parts.chunks],
            model=parts.chunks,
            num_microbatches=recipe.num_micro_batches,
            seq_length=recipe.padded_length,
            micro_batch_size=size,
            forward_only=False,
        )
        scheduled, busy = time.perf_counter(), time.process_time() - busy
        zero = torch.zeros((), device=self._topology.device)
        with record_function(OPTIMIZER_RANGE):
            loss = sum((output["loss"] for output in outputs), zero)
            self.result = self._joint.step(number, loss)
        return StepTimes(scheduled - started, busy, time.perf_counter() - scheduled)

    def resize(self, micro_batches: int) -> None:
        """Take smaller steps, on the first ``micro_batches`` micro-batches of the batch."""
        rows = micro_batches * self.recipe.training.micro_batch_size
        self.recipe = self.recipe.with_global_batch(rows * self.recipe.data_parallel_size)
        self.batch = {name: tensor[:rows] for name, tensor in self.batch.items()}
        forward_step = make_forward_step(
            self.recipe, self._topology, self.parts.chunks, self.parts.head
        )
        self.parts = replace(self.parts, forward_step=forward_step)

    def close(self) -> None:
        """Close the head's engine; must be called before the process groups are destroyed."""
        if self.parts.head is not None:
            self.parts.head.close()


def random_batch(recipe: LanguageModelRecipe, topology: Topology, seed: int = 0) -> dict[str, Any]:
    """Blocks of one replica for one step; for a CALM with a plausible posterior."""
    model = recipe.model
    assert model.vocab_size
    rows = recipe.training.global_batch_size // topology.dp_size
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(
        model.vocab_size, (rows, recipe.num_patches * model.patch_size), generator=generator
    )
    batch = {"tokens": tokens, "index": torch.arange(rows)}
    if model.kind != "calm" or not model.has_latents or recipe.data.latents == "on_the_fly":
        return batch
    assert model.latent_size
    mean = torch.randn(rows, recipe.num_patches, model.latent_size, generator=generator)
    log_std = 0.3 * torch.randn(mean.shape, generator=generator) - 1
    return batch | {"mean": mean, "log_std": log_std}
