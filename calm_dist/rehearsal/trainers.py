"""The trainers, without data, run directories and checkpoints."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from calm_dist.benchmark.random_steps import random_batch
from calm_dist.compat.deepspeed import averaged_gradients
from calm_dist.compat.megatron import single_optimizers
from calm_dist.data.stream import Batch
from calm_dist.models.autoencoder import Autoencoder, config_of
from calm_dist.parallel.topology import Topology
from calm_dist.recipe import AutoencoderRecipe, CalmModel, LanguageModelRecipe
from calm_dist.training import build
from calm_dist.training.autoencoder import AutoencoderTrainer
from calm_dist.training.batches import LookAhead
from calm_dist.training.engine import TrainingRun
from calm_dist.training.language_model import Trainer


class RehearsedRun(Protocol):
    """A trainer whose steps can be of any size."""

    @abstractmethod
    def take_step(self, micro_batches: int) -> None:
        """One step of that many micro-batches."""

    @abstractmethod
    def kept(self) -> Iterator[tuple[str, Iterable[torch.Tensor]]]:
        """Tensors kept between steps, by category. A tensor of two categories, such as an fp32
        weight, which is also the optimizer's, counts in the later one."""


class RehearsedTrainer(Trainer):
    """The trainer of language models."""

    def __init__(self, recipe: LanguageModelRecipe, topology: Topology) -> None:
        # Not the trainer's own: it opens files.
        TrainingRun.__init__(self, recipe, topology.rank, None, None, lambda: None)
        self.topology = topology
        self._micro_batches_of_recipe = recipe.num_micro_batches
        # No checkpoint is read. One encoder for the forward steps of all sizes: a training moves it
        # to the device once.
        self._encoder = cache(lambda: untrained_encoder(recipe))
        build.on_the_fly_encoder = lambda recipe: self._encoder()
        self.build()

    def take_step(self, micro_batches: int) -> None:
        training, replicas = self.recipe.training, self.recipe.data_parallel_size
        row = training.micro_batch_size * replicas
        # Of the recipe's size also in a shorter step: it takes memory as a whole.
        read = max(micro_batches, self._micro_batches_of_recipe)
        batch = random_batch(self.recipe.with_global_batch(read * row), self.topology)
        self.recipe = self.recipe.with_global_batch(micro_batches * row)
        forward_step = build.make_forward_step(
            self.recipe, self.topology, self.parts.chunks, self.parts.head
        )
        self.parts = replace(self.parts, forward_step=forward_step)
        step_on(self, batch, self.topology.device)

    def kept(self) -> Iterator[tuple[str, Iterable[torch.Tensor]]]:
        parts = self.parts
        optimizers = [single.optimizer for single in single_optimizers(parts.optimizer)]
        modules: list[nn.Module] = list(parts.chunks)
        gradients = [buffer.grad_data for chunk in parts.chunks for buffer in chunk.buffers]
        if parts.head is not None:
            zero = parts.head._zero
            optimizers.append(zero.optimizer)
            for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
                yield "optimizer", getattr(zero, name, ())
            modules.append(parts.head.module)
            gradients += averaged_gradients(zero)
        if self.topology.is_last_stage and self.recipe.data.latents == "on_the_fly":
            modules.append(self._encoder())
        for optimizer in optimizers:
            if optimizer is not None:
                yield "optimizer", optimizer_tensors(optimizer)
        yield "gradients", gradients
        yield "weights", itertools.chain.from_iterable(map(module_tensors, modules))


class RehearsedAutoencoder(AutoencoderTrainer):
    """The trainer of autoencoders."""

    def __init__(self, recipe: AutoencoderRecipe, device: torch.device) -> None:
        TrainingRun.__init__(self, recipe, dist.get_rank(), None, None, lambda: None)
        self.device, self.world_size = device, dist.get_world_size()
        self.build()

    def take_step(self, micro_batches: int) -> None:
        recipe = self.recipe
        rows = micro_batches * recipe.training.micro_batch_size
        assert recipe.model.vocab_size is not None
        shape = (rows, recipe.num_patches * recipe.model.patch_size)
        tokens = torch.randint(recipe.model.vocab_size, shape)
        step_on(self, {"tokens": tokens, "index": torch.arange(rows)}, self.device)

    def kept(self) -> Iterator[tuple[str, Iterable[torch.Tensor]]]:
        yield "optimizer", optimizer_tensors(self.optimizer)
        yield "gradients", (p.grad for p in self.model.parameters() if p.grad is not None)
        yield "weights", module_tensors(self.model)


def step_on(trainer: Trainer | AutoencoderTrainer, batch: Batch, device: torch.device) -> None:
    """The trainer's own step on a batch, reading the same one ahead."""
    trainer._batches = LookAhead(itertools.repeat(batch), device, trainer.used_of_batches)
    trainer._batches.read()
    trainer.train_step(trainer._batches.take())


def untrained_encoder(recipe: LanguageModelRecipe) -> Autoencoder:
    """An autoencoder of the recipe's shape, which need not exist."""
    assert isinstance(recipe.model, CalmModel)
    return Autoencoder(config_of(recipe.model)).eval().requires_grad_(False)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """What an optimizer updates, and its state."""
    for group in optimizer.param_groups:
        yield from group["params"]
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def module_tensors(module: nn.Module) -> Iterator[Any]:
    """Parameters as they are stored: ZeRO-3 keeps a part of each, and empties the parameter."""
    for parameter in module.parameters():
        part = getattr(parameter, "ds_tensor", None)
        yield parameter if part is None else part
