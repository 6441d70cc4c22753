"""Training of the autoencoder: plain torch, data parallel.

A checkpoint is a directory in the released layout (``config.json``, ``model.safetensors``), so that
`interop.huggingface.load_autoencoder` reads it, plus the state that a resume needs.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from calm_dist.data.store import StoreMeta
from calm_dist.data.stream import Batch, Store, open_store
from calm_dist.errors import (
    CheckpointError,
    DataError,
    RecipeError,
    listed,
)
from calm_dist.log import NOTE
from calm_dist.losses.autoencoder import (
    AutoencoderLoss,
    TrainingNoise,
    autoencoder_loss,
    draw_training_noise,
)
from calm_dist.losses.reconstruction import Reconstruction
from calm_dist.models.autoencoder import Autoencoder, AutoencoderConfig
from calm_dist.models.weights import init_std, initialize_module
from calm_dist.optimizers.make import decay_groups, make_optimizer
from calm_dist.parallel.rank_zero import on_rank_zero
from calm_dist.progress import progress
from calm_dist.randomness import key_seed
from calm_dist.recipe import AutoencoderRecipe, Recipe
from calm_dist.released.autoencoder import load_autoencoder, save_autoencoder
from calm_dist.released.files import CONFIG_FILE
from calm_dist.runs import checkpoints
from calm_dist.runs.checkpoints.run_state import RunState
from calm_dist.training.checkpoint.attempts import Attempts
from calm_dist.training.checkpoint.moments import load_moments, save_moments
from calm_dist.training.engine import StepResult, TrainingRun
from calm_dist.training.phases import Phases
from calm_dist.training.schedule import learning_rate
from calm_dist.training.session import launched
from calm_dist.training.stop import StopRequest

_log = logging.getLogger(__name__)

HELD_OUT = "valid"


def train_autoencoder(recipe: Recipe) -> None:
    """Train the autoencoder of a recipe in the world that the launcher made.

    Raises:
        UserError: recipe, data, checkpoint or launch are wrong.
        PeerLostError: another process died.
        HungError: another process detected that a rank hangs.
        StoppedError: a signal asked the run to stop; a checkpoint was written.
        TrainingDivergedError: too many steps in a row were not finite.
    """
    with launched(of_autoencoder(recipe)) as session:
        AutoencoderTrainer(
            session.recipe, session.device, session.stop, session.phases, session.begin
        ).run()


def of_autoencoder(recipe: Recipe) -> AutoencoderRecipe:
    """Return ``recipe``; raises RecipeError for the recipe of a language model."""
    if not isinstance(recipe, AutoencoderRecipe):
        raise RecipeError(
            f"model.kind: {recipe.model.kind}; this command trains autoencoders, use "
            "tools/train.py for language models"
        )
    return recipe


def autoencoder_config(recipe: AutoencoderRecipe) -> AutoencoderConfig:
    """The model's configuration from a recipe that `resolve` has completed."""
    model = recipe.model
    assert model.vocab_size is not None
    return AutoencoderConfig(
        vocab_size=model.vocab_size,
        patch_size=model.patch_size,
        latent_size=model.latent_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_encoder_layers=model.num_encoder_layers,
        num_decoder_layers=model.num_decoder_layers,
        ae_dropout=model.latent_dropout,
        token_dropout=model.token_dropout,
        # Absent only if token_dropout is 0 and no token is replaced.
        replaced_token_id=model.replaced_token_id or 0,
        kl_weight=model.kl_weight,
        kl_clamp=model.kl_clamp,
        latent_slots=model.latent_slots,
    )


def build_autoencoder(recipe: AutoencoderRecipe) -> Autoencoder:
    """The initialised autoencoder, fp32 on the CPU."""
    autoencoder = Autoencoder(autoencoder_config(recipe))
    initialize_module(autoencoder, "autoencoder", init_std(recipe.model), recipe.run.seed)
    return autoencoder


def block_noise(
    model: Autoencoder, tokens: torch.Tensor, index: torch.Tensor, seed: int, step: int
) -> TrainingNoise:
    """Noise keyed by (seed, step, number of the block), hence the same for any number of ranks.

    Args:
        tokens: [B, T], on the device of the noise.
        index: [B], number of each block in its stores.
    """
    drawn = [
        draw_training_noise(model, block[None], _generator(tokens.device, seed, step, number))
        for block, number in zip(tokens, index.tolist(), strict=True)
    ]
    return TrainingNoise(*(torch.cat(parts) for parts in zip(*drawn, strict=True)))


def _generator(device: torch.device, *key: int | str) -> torch.Generator:
    return torch.Generator(device).manual_seed(key_seed(*key))


@dataclass(frozen=True)
class AutoencoderStep(StepResult):
    """The result of a step, with the parts of its loss in nats."""

    cross_entropy: float
    kl: float

    def numbers(self) -> dict[str, float]:
        parts = {"loss": self.loss, "cross_entropy": self.cross_entropy, "kl": self.kl}
        return parts | super().numbers()


class _LossModule(nn.Module):
    """The loss as a module: DDP averages gradients of computations in its forward."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, tokens: torch.Tensor, noise: TrainingNoise) -> AutoencoderLoss:
        return autoencoder_loss(self.autoencoder, tokens, noise)


class AutoencoderTrainer(TrainingRun):
    """One rank of an autoencoder's run: data parallel, with the whole model on every rank."""

    recipe: AutoencoderRecipe

    def __init__(
        self,
        recipe: AutoencoderRecipe,
        device: torch.device,
        stop: StopRequest | None = None,
        phases: Phases | None = None,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(recipe, dist.get_rank(), stop, phases, begin)
        self.device, self.world_size = device, dist.get_world_size()
        self.build()
        self.open_data(self.device, self.world_size)
        self._held_out = open_held_out(recipe, self._stream.metas[0])
        self._attempts = Attempts()
        self._rotation = checkpoints.Rotation(self.run_dir, recipe.checkpoint)
        self._recipe_text = recipe.to_yaml()
        self.phases.enter("load the checkpoint")
        self.resume()
        if self.rank == 0:
            self._announce()

    def build(self) -> None:
        """Build what `train_step` works with, apart from the data."""
        self.phases.enter("build the model")
        self.model = build_autoencoder(self.recipe).to(self.device)
        training = self.recipe.training
        groups = decay_groups(self.model.parameters(), training)
        self.optimizer = make_optimizer(training.optimizer_spec, groups, training)
        self._loss: nn.Module = _LossModule(self.model)
        if self.world_size > 1:
            self._loss = DistributedDataParallel(self._loss, gradient_as_bucket_view=True)

    def train_step(self, batch: Batch) -> AutoencoderStep:
        """One optimizer step on this rank's blocks of a global batch."""
        training = self.recipe.training
        self.phases.enter("forward and backward", self.progress.step)
        self.optimizer.zero_grad()
        # Loss, cross entropy, KL, ranks asked to stop, ranks without a next batch.
        sums = torch.zeros(5, device=self.device)
        parts = list(
            zip(
                batch["tokens"].split(training.micro_batch_size),
                batch["index"].split(training.micro_batch_size),
                strict=True,
            )
        )
        for number, (tokens, index) in enumerate(parts):
            self.phases.progress()
            noise = block_noise(self.model, tokens, index, self.recipe.run.seed, self.progress.step)
            with self._gradient_exchange(number == len(parts) - 1), self._autocast():
                losses = self._loss(tokens, noise)
                (losses.total / len(parts)).backward()
            sums[:3] += torch.stack(losses).detach() / len(parts)
        total_norm = nn.utils.clip_grad_norm_(self.model.parameters(), training.clip_grad_norm)
        self.read_ahead()
        self.phases.enter("optimizer", self.progress.step)
        # Assignments would copy from the host.
        sums[3:4].fill_(float(self._stop.requested))
        sums[4:5].fill_(float(self._batches.failed))
        dist.all_reduce(sums)
        # One wait of the host for the device.
        numbers = torch.cat([sums / self.world_size, total_norm[None]]).tolist()
        loss, cross_entropy, kl, stopping, failed, norm = numbers
        rate = learning_rate(training, self.progress.step)
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if not skipped:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        return AutoencoderStep(
            loss=loss,
            grad_norm=norm,
            learning_rate=rate,
            skipped=skipped,
            stop=stopping > 0,
            data_failed=failed > 0,
            cross_entropy=cross_entropy,
            kl=kl,
        )

    @property
    def _moments(self) -> tuple[str, ...]:
        return self.recipe.training.optimizer_spec.moments

    def after_step(self, updates: int) -> None:
        if self.rank == 0:
            self._rotation.step_taken(updates)

    def _gradient_exchange(self, wanted: bool) -> contextlib.AbstractContextManager[None]:
        """Average gradients over ranks only in the last micro-batch's backward pass."""
        if wanted or not isinstance(self._loss, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._loss.no_sync()

    def _autocast(self) -> torch.autocast:
        """bf16 matrix products on GPUs; weights, moments and the loss stay fp32."""
        enabled = self.recipe.precision == "bf16" and self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def evaluate(self) -> dict[str, Any] | None:
        """Reconstruction on the held-out store, the same on every rank; None without one."""
        store, settings = self._held_out, self.recipe.evaluation
        if store is None:
            return None
        wanted = min(settings.blocks or len(store), len(store))
        numbers = [i * len(store) // wanted for i in range(wanted)]
        config = self.model.config
        result = Reconstruction(config.latent_size, self.device)
        mine: Iterable[int] = numbers[self.rank :: self.world_size]
        if self.rank == 0:
            mine = progress(mine, -(-wanted // self.world_size), label="evaluate", unit="blocks")
        for number in mine:
            self.phases.progress()
            tokens = torch.from_numpy(store[number]["tokens"].astype(np.int64)).to(self.device)
            generator = _generator(self.device, settings.seed, "evaluation", number)
            shape = (len(tokens) // config.patch_size, config.latent_size)
            eps = torch.randn(shape, generator=generator, device=self.device)
            result.add_block(self.model, tokens, eps)
        dist.all_reduce(result.latent_sums)
        dist.all_reduce(result.counts)
        dist.all_reduce(result.right_under_noise)
        return result.summary(config.patch_size)

    def _evaluate(self) -> None:
        self.phases.enter("evaluation", self.progress.step - 1)
        values = self.evaluate()
        if values is None or self._metrics is None:
            return
        self._metrics.evaluation(self.progress.step, values)
        _log.info(
            f"step {self.progress.step}  held-out tokens right {values['token_accuracy']:.3%}  "
            f"{values['collapsed_dims']} of {values['latent_size']} dimensions collapsed"
        )

    def save(self, is_last: bool = False) -> None:
        step = self.progress.step
        # First, so that every checkpoint has a score. But a run that was asked to stop may have
        # only seconds to write one.
        if not is_last or step == self.recipe.training.steps:
            self._evaluate()
        self.phases.enter("checkpoint", step - 1)
        self._attempts.forget()
        temporary = checkpoints.step_directory(self.run_dir, step).with_suffix(".tmp")
        self._attempts.make(temporary, lambda: on_rank_zero(self._write))

    def wait_for_save(self) -> None:
        """`save` returns once the checkpoint is committed."""

    def finish_saving(self) -> None:
        self._attempts.finish()

    def check_resumed(self, directory: Path, state: RunState) -> None:
        """Nothing to check: `changes` has compared everything."""

    def load(self, directory: Path, state: RunState) -> None:
        self.model.load_state_dict(load_autoencoder(directory).state_dict())
        if not state.weights_only:
            load_moments(self.optimizer, self.model, directory, self._moments, state.adam_steps)

    def take_weights(self, directory: Path) -> list[str]:
        if not (directory / CONFIG_FILE).is_file():
            raise CheckpointError("is not an autoencoder")
        theirs, ours = load_autoencoder(directory).state_dict(), self.model.state_dict()
        misfits = [
            f"{name} {list(theirs[name].shape) if name in theirs else 'is not'} there, "
            f"{list(ours[name].shape) if name in ours else 'is not'} here"
            for name in sorted(theirs.keys() | ours.keys())
            if name not in theirs or name not in ours or theirs[name].shape != ours[name].shape
        ]
        if misfits:
            raise CheckpointError(f"does not fit the recipe's model: {listed(misfits, 5)}")
        self.model.load_state_dict(theirs)
        return []

    def _write(self) -> None:
        """Write and commit a checkpoint, on one rank."""
        temporary = checkpoints.begin(self.run_dir, self.progress.step)
        try:
            save_autoencoder(self.model, temporary)
            save_moments(self.optimizer, self.model, temporary, self._moments)
        except SafetensorError as error:
            raise CheckpointError(f"the tensors cannot be written ({error})") from error
        self.run_state().write(temporary)
        (temporary / checkpoints.RECIPE_FILE).write_text(self._recipe_text, encoding="utf-8")
        self._rotation.commit(temporary)

    def _announce(self) -> None:
        """Log facts that a user may not expect."""
        if self._held_out is None:
            _log.log(
                NOTE,
                f"note: there is no store {HELD_OUT!r} next to data.path, so reconstruction is not "
                "measured; set evaluation.data to a held-out store",
            )
        if self.recipe.precision == "bf16" and self.device.type != "cuda":
            _log.log(NOTE, "note: precision bf16 is for GPUs; this run computes in fp32")


def open_held_out(recipe: AutoencoderRecipe, training: StoreMeta) -> Store | None:
    """The store on which reconstruction is measured, if there is one.

    Raises:
        DataError: it is damaged, or its tokens do not fit the training store's.
    """
    path = recipe.evaluation.data
    if path is None:
        first = recipe.data.sources[0].path
        sibling = Path(first).with_name(HELD_OUT)
        if "://" in first or sibling == Path(first) or not sibling.is_dir():
            return None
        path = str(sibling)
    store = open_store(path)
    meta = store.meta
    if meta.tokenizer.sha256 != training.tokenizer.sha256:
        raise DataError(
            f"evaluation.data: {path} was made with another tokenizer "
            f"({meta.tokenizer.sha256[:12]}…) than the training data "
            f"({training.tokenizer.sha256[:12]}…); encode it again with the same tokenizer"
        )
    ends = [(info.begin_id, info.end_id) for info in (meta.tokenizer, training.tokenizer)]
    if ends[0] != ends[1]:
        raise DataError(
            f"evaluation.data: {path} has the begin and end tokens {ends[0]}, the training data "
            f"{ends[1]}; encode it again with the same --begin-token and --end-token"
        )
    if meta.block_size % recipe.model.patch_size:
        raise DataError(
            f"evaluation.data: {path} has blocks of {meta.block_size} tokens, not a multiple of "
            f"model.patch_size {recipe.model.patch_size}; encode it again"
        )
    return store
