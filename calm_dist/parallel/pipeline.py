"""The forward step that Megatron's pipeline schedules call, for CALM and for the baseline."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region

from calm_dist.models.autoencoder import Autoencoder
from calm_dist.models.heads.base import NoiseSource
from calm_dist.models.patch_tokens import PatchTokens
from calm_dist.parallel.noise import KeyedNoise
from calm_dist.parallel.topology import Topology
from calm_dist.parallel.zero_head import ZeroHead
from calm_dist.recipe import LanguageModelRecipe

Batch = dict[str, torch.Tensor]
LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def micro_batches(batch: Batch, size: int) -> Iterator[Batch]:
    """Cut this rank's part of a global batch into micro-batches."""
    for start in range(0, len(batch["index"]), size):
        yield {name: tensor[start : start + size] for name, tensor in batch.items()}


class ForwardStep(ABC):
    """Base of all forward steps: pads, runs a stage, scales the loss.

    Each context-parallel rank runs a piece of consecutive steps. A later piece attends to more
    steps than an earlier one, so with C ranks the last does up to 2C - 1 times the attention work
    of the first; all other work, which is most of it unless blocks are very long, is equal. In
    return, positions, targets and noise of a rank are one slice each. (Megatron's zigzag of two
    pieces per rank balances attention.)

    A loss function returns the loss for the schedule, and ``loss``: this rank's contribution to
    the mean over all valid positions of the global batch. The contributions of all ranks add up.
    """

    def __init__(self, recipe: LanguageModelRecipe, topology: Topology) -> None:
        self._topology = topology
        self._patch_size = recipe.model.patch_size
        self._steps = recipe.num_patches
        self._padded_steps = recipe.padded_length
        length = self._padded_steps // topology.cp_size
        # This rank's piece of the padded block.
        self._first, self._end = topology.cp_rank * length, (topology.cp_rank + 1) * length
        self._positions = torch.arange(self._first, self._end) if topology.cp_size > 1 else None
        if self._positions is not None and topology.device.type == "cuda":
            # Otherwise the host waits for the device with each copy.
            self._positions = self._positions.pin_memory()
        # The last step of a block predicts nothing inside it; padding predicts nothing at all.
        valid = torch.arange(self._padded_steps, device=topology.device) < self._steps - 1
        count = recipe.training.global_batch_size * (self._steps - 1)
        self._weight = valid.float() / count
        # The schedule divides by the number of micro-batches, and Megatron's DDP by the numbers of
        # replicas and of pieces; the schedule multiplies by the number of pieces.
        self._schedule_factor = float(recipe.num_micro_batches * topology.dp_size)
        self._num_micro_batches = recipe.num_micro_batches
        self._step = 0
        self._forwarded = 0

    def begin(self, step: int) -> None:
        """Called before the schedule runs training step ``step``."""
        self._step, self._forwarded = step, 0

    def __call__(self, batches: Iterator[Batch], model: Any) -> tuple[torch.Tensor, LossFunction]:
        device = self._topology.device
        # The index is read on the host.
        batch = {
            name: value if name == "index" else value.to(device, non_blocking=True)
            for name, value in next(batches).items()
        }
        padding = (self._padded_steps - self._steps) * self._patch_size
        tokens = F.pad(batch["tokens"], (0, padding))
        tokens = tokens[:, self._first * self._patch_size : self._end * self._patch_size]
        length = self._end - self._first
        output = model(tokens, length, self._positions, **self._model_inputs(batch))
        return output, partial(self._loss, batch)

    def _model_inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """What else the model takes."""
        return {}

    @abstractmethod
    def _loss(
        self, batch: Batch, output: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The last stage's loss from its output; see the class."""


class TransformerForwardStep(ForwardStep):
    """Vocabulary-parallel cross entropy of the next token in nats, which the model computes itself
    so that no logits leave it."""

    def _model_inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        # The target of the last step of a piece is in the next piece.
        targets = F.pad(batch["tokens"], (0, self._padded_steps + 1 - self._steps))
        targets = targets[:, self._first + 1 : self._end + 1]
        return {"targets": targets, "weight": self._weight[self._first : self._end]}

    def _loss(
        self, batch: Batch, output: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        # Every tensor-parallel rank has the whole loss; count it once.
        counted = output.detach() if self._topology.tp_rank == 0 else torch.zeros_like(output)
        return output * self._schedule_factor, {"loss": counted}


class HeadForwardStep(ForwardStep):
    """Base of the forward steps of a CALM: the head works on this rank's shard of the sequence."""

    def __init__(
        self, recipe: LanguageModelRecipe, topology: Topology, head: ZeroHead | None
    ) -> None:
        super().__init__(recipe, topology)
        self._head = head
        self._sequence_parallel = recipe.parallel.use_sequence_parallel
        shard = (self._end - self._first) // topology.tp_size
        self._start = self._first + topology.tp_rank * shard
        self._stop = self._start + shard

    def _shard(self, output: torch.Tensor) -> torch.Tensor:
        """Hidden states [positions of this shard, B, d] of the last stage's output."""
        if self._sequence_parallel:
            return output
        return scatter_to_sequence_parallel_region(output, group=self._topology.groups.tp)

    def _is_last_micro_batch(self) -> bool:
        """Count the micro-batches; must be called once for each."""
        self._forwarded += 1
        return self._forwarded == self._num_micro_batches


class LatentForwardStep(HeadForwardStep):
    """The head's loss on the next patch's latent."""

    def __init__(
        self,
        recipe: LanguageModelRecipe,
        topology: Topology,
        head: ZeroHead | None,
        autoencoder: Autoencoder | None,
    ) -> None:
        super().__init__(recipe, topology, head)
        self._autoencoder = autoencoder
        self._seed = recipe.run.seed

    def _loss(
        self, batch: Batch, output: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert self._head is not None
        # [positions of this shard, B, d] -> [B * positions, d], sample by sample like the noise.
        hidden = self._shard(output).transpose(0, 1).flatten(0, 1)
        mean, log_std = self._targets(batch)
        loss = self._head.loss(
            hidden,
            mean.flatten(0, 1),
            log_std.flatten(0, 1),
            self._noise_source(batch),
            self._weight[self._start : self._stop].repeat(len(mean)),
            last_micro_batch=self._is_last_micro_batch(),
        )
        return loss * self._schedule_factor, {"loss": loss.detach()}

    def _targets(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior of the patch that each position of this shard predicts, [B, positions, l]."""
        if self._autoencoder is not None:
            tokens = batch["tokens"][
                :, (self._start + 1) * self._patch_size : (self._stop + 1) * self._patch_size
            ]
            with torch.no_grad():
                mean, log_std = self._autoencoder.encode(tokens)
        else:
            mean, log_std = (
                batch[name][:, self._start + 1 : self._stop + 1] for name in ("mean", "log_std")
            )
        missing = self._stop - self._start - mean.shape[1]
        return F.pad(mean, (0, 0, 0, missing)), F.pad(log_std, (0, 0, 0, missing))

    def _noise_source(self, batch: Batch) -> NoiseSource:
        """The random numbers of this shard's positions, sample by sample."""
        return KeyedNoise(
            self._seed,
            self._step,
            batch["index"].tolist(),
            self._start,
            self._stop,
            self._topology.device,
        )


class TokensForwardStep(HeadForwardStep):
    """Vocabulary-parallel cross entropy of the next patch's tokens, in nats per token."""

    def __init__(
        self,
        recipe: LanguageModelRecipe,
        topology: Topology,
        head: ZeroHead | None,
        tables: PatchTokens | None,
    ) -> None:
        super().__init__(recipe, topology, head)
        self._tables = tables

    def _loss(
        self, batch: Batch, output: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert self._head is not None and self._tables is not None
        hidden = self._shard(output)
        targets = self._targets(batch)
        previous = self._tables.embed(targets[..., :-1])
        states = self._head.states(
            hidden.flatten(0, 1),
            None if previous is None else previous.flatten(0, 1),
            last_micro_batch=self._is_last_micro_batch(),
        )
        # [positions of this shard * B, K, d] -> [positions of this shard, B * K, d]
        weight = self._weight[self._first : self._end] / self._patch_size
        loss = self._tables.loss(
            states.unflatten(0, hidden.shape[:2]).flatten(1, 2), targets.flatten(1).T, weight
        )
        # Every tensor-parallel rank has the whole loss; count it once.
        counted = loss.detach() if self._topology.tp_rank == 0 else torch.zeros_like(loss)
        return loss * self._schedule_factor, {"loss": counted}

    def _targets(self, batch: Batch) -> torch.Tensor:
        """Tokens of the patch that each position of this piece predicts, [positions, B, K]."""
        size = self._patch_size
        tokens = F.pad(batch["tokens"], (0, (self._padded_steps + 1 - self._steps) * size))
        tokens = tokens[:, (self._first + 1) * size : (self._end + 1) * size]
        return tokens.unflatten(1, (-1, size)).transpose(0, 1).contiguous()
