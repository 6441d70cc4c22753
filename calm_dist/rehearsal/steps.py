"""The trainer's own steps on fake blocks, with numbers of micro-batches that show what each costs.

A step of a large batch repeats what a few micro-batches show. After short steps, which make the
optimizer's state, come two: one with as many micro-batches as all stages hold at a time, whose peak
of memory is that of a whole step, and one with another number, so that the work of a micro-batch
and that of a step can be told apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from calm_dist.benchmark.random_steps import random_batch
from calm_dist.compat.deepspeed import averaged_gradients
from calm_dist.compat.megatron import single_optimizers
from calm_dist.parallel.topology import Topology
from calm_dist.recipe import LanguageModelRecipe
from calm_dist.rehearsal.accounting import separate
from calm_dist.rehearsal.observer import Observer
from calm_dist.training.batches import LookAhead
from calm_dist.training.build import Parts, make_forward_step
from calm_dist.training.engine import TrainingRun
from calm_dist.training.language_model import Trainer

# Some of DeepSpeed's waits for the device begin in the third step.
WARM_UP_STEPS = 2
KEPT = "other: kept between steps"


class RehearsedTrainer(Trainer):
    """The trainer without data, run directory and checkpoints."""

    recipe: LanguageModelRecipe

    def __init__(self, recipe: LanguageModelRecipe, topology: Topology) -> None:
        # Not the trainer's own: it opens files.
        TrainingRun.__init__(self, recipe, topology.rank, None, None, lambda: None)
        self.topology = topology
        self.build()

    def take_step(self, micro_batches: int) -> None:
        """One step of that many micro-batches."""
        size = recipe_batch(self.recipe, micro_batches)
        self.recipe = self.recipe.with_global_batch(size)
        forward_step = make_forward_step(
            self.recipe, self.topology, self.parts.chunks, self.parts.head
        )
        self.parts = replace(self.parts, forward_step=forward_step)
        batch = random_batch(self.recipe, self.topology)
        self._batches = LookAhead(itertools.repeat(batch))
        self._batches.read()
        self.train_step(self._batches.take())


def recipe_batch(recipe: LanguageModelRecipe, micro_batches: int) -> int:
    """Blocks of a global batch that has ``micro_batches`` on every replica."""
    return micro_batches * recipe.training.micro_batch_size * recipe.data_parallel_size


def step_sizes(recipe: LanguageModelRecipe) -> tuple[int, int]:
    """Micro-batches of the two steps that count. The first one has no more than the recipe's, since
    more could need more memory than its steps do."""
    stages = recipe.parallel.pipeline_parallel_size
    first = min(recipe.num_micro_batches, 2 * stages)
    return first, stages if first != stages else 2 * stages


def rehearse_steps(
    recipe: LanguageModelRecipe, topology: Topology, observer: Observer
) -> dict[str, Any]:
    """Build a rank's model and take its steps.

    Returns:
        Bytes of the peak and of its categories, the peak while the model is built, and the counts.
    """
    first, second = step_sizes(recipe)
    is_interleaved = recipe.parallel.virtual_pipeline_size is not None
    short = recipe.parallel.pipeline_parallel_size if is_interleaved else 1
    trainer = RehearsedTrainer(recipe, topology)
    built = observer.memory.peak
    for _ in range(WARM_UP_STEPS):
        _settle(trainer.parts, observer)
        trainer.take_step(short)
    _settle(trainer.parts, observer)
    observer.restart()
    trainer.take_step(first)
    peak, at_peak = observer.memory.peak, observer.memory.at_peak
    _settle(trainer.parts, observer)
    one = observer.restart()
    trainer.take_step(second)
    return {
        "micro_batches": recipe.num_micro_batches,
        "rehearsed_micro_batches": [first, second],
        "peak": peak,
        "at_peak": at_peak,
        "built": built,
        "counts": separate(one, first, observer.restart(), second),
    }


def _settle(parts: Parts, observer: Observer) -> None:
    """Label what is kept between steps as what it is."""
    memory = observer.memory
    memory.relabel_all(KEPT)
    # Later ones win: an fp32 weight is also the optimizer's.
    for label, tensors in (
        ("optimizer", _optimizer_tensors(parts)),
        ("gradients", _gradient_tensors(parts)),
        ("weights", _weight_tensors(parts)),
    ):
        for tensor in tensors:
            memory.relabel(tensor.untyped_storage()._cdata, label)


def _optimizers(parts: Parts) -> Iterator[torch.optim.Optimizer]:
    for single in single_optimizers(parts.optimizer):
        if getattr(single, "optimizer", None) is not None:
            yield single.optimizer
    if parts.head is not None:
        yield parts.head._zero.optimizer


def _optimizer_tensors(parts: Parts) -> Iterator[torch.Tensor]:
    for optimizer in _optimizers(parts):
        for group in optimizer.param_groups:
            yield from group["params"]
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))
    zero = parts.head and parts.head._zero
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        yield from getattr(zero, name, ())


def _gradient_tensors(parts: Parts) -> Iterator[torch.Tensor]:
    for chunk in parts.chunks:
        yield from (buffer.grad_data for buffer in chunk.buffers)
    if parts.head is not None:
        yield from averaged_gradients(parts.head._zero)


def _weight_tensors(parts: Parts) -> Iterator[torch.Tensor]:
    modules: list[nn.Module] = [*parts.chunks, *([parts.head.module] if parts.head else [])]
    for module in modules:
        for parameter in module.parameters():
            # ZeRO-3 keeps a part of the parameter, and empties the parameter itself.
            part = getattr(parameter, "ds_tensor", None)
            yield parameter if part is None else part
