"""A trained language model in one plain process: no launcher, no port, no optimizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from calm_dist.errors import CheckpointError
from calm_dist.files import file_sha256
from calm_dist.interop.huggingface import load_autoencoder
from calm_dist.interop.layout import weights_file
from calm_dist.models.autoencoder import Autoencoder
from calm_dist.models.backbone import Backbone, transformer_config
from calm_dist.models.heads.energy import EnergyHead
from calm_dist.parallel import cpu
from calm_dist.parallel.launch import World, join_world
from calm_dist.parallel.topology import Topology, build_topology, destroy_topology
from calm_dist.recipe import CalmRecipe, Recipe, load_recipe
from calm_dist.training import checkpoint, model_state
from calm_dist.training.build import build_body, build_head
from calm_dist.training.resolve import autoencoder_directory


@dataclass(frozen=True)
class LoadedModel:
    """A CALM or a discrete Transformer in eval mode, fp32, on ``device``."""

    recipe: Recipe
    checkpoint: Path
    step: int
    tokens_seen: int
    tokenizer_sha256: str
    device: torch.device
    body: Backbone
    _head: EnergyHead | None
    autoencoder: Autoencoder | None
    autoencoder_sha256: str | None

    @property
    def kind(self) -> str:
        """``calm`` or ``transformer``."""
        return self.recipe.model.kind

    @property
    def head(self) -> EnergyHead:
        """The generative head of a CALM."""
        assert self._head is not None
        return self._head

    def hidden(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """CALM: hidden states of all patches, tokens [B, T] -> [B, T/K, d].

        Args:
            positions: rotary position of each patch [T/K]; default 0, 1, 2, ...
            mask: [T/K, T/K], True where a patch may attend; default causal.
        """
        assert self.kind == "calm"
        return self._run(tokens, tokens.shape[1] // self.recipe.model.patch_size, positions, mask)

    def logits(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Transformer: next-token logits, tokens [B, T] -> [B, T, V]."""
        assert self.kind == "transformer"
        return self._run(tokens, tokens.shape[1], positions, mask)[
            ..., : self.recipe.model.vocab_size
        ]

    @torch.no_grad()
    def _run(
        self,
        tokens: torch.Tensor,
        steps: int,
        positions: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        return self.body(tokens.to(self.device), steps, positions, mask).transpose(0, 1)


def load_model(
    path: str | Path, autoencoder: str | Path | None = None, device: str = "cpu"
) -> LoadedModel:
    """Load a checkpoint of any layout into this process.

    Args:
        path: a run directory (its newest valid checkpoint) or a checkpoint.
        autoencoder: overrides the recipe's ``model.autoencoder`` (CALM).

    Raises:
        CheckpointError: the checkpoint or the autoencoder is missing, damaged or does not fit.
    """
    directory = checkpoint.find_checkpoint(path)
    recipe = single_process_recipe(load_recipe(directory / checkpoint.RECIPE_FILE))
    state = json.loads((directory / checkpoint.STATE_FILE).read_text(encoding="utf-8"))
    topology = single_process_topology(recipe, torch.device(device))
    model = recipe.model
    body = build_body(recipe, transformer_config(recipe, torch.float32), topology, None)
    head, decoder, decoder_sha256 = None, None, None
    if isinstance(model, CalmRecipe):
        decoder_directory = _autoencoder_directory(model, autoencoder)
        decoder = load_autoencoder(decoder_directory).to(topology.device)
        decoder_sha256 = file_sha256(weights_file(decoder_directory))
        head = build_head(model, recipe.run.seed).to(topology.device)
    model_state.load_weights(directory, body, head)
    if head is not None:
        head.eval().requires_grad_(False)
    return LoadedModel(
        recipe,
        directory,
        state["step"],
        state["tokens"],
        state["tokenizer_sha256"],
        topology.device,
        body.eval().requires_grad_(False),
        head,
        decoder,
        decoder_sha256,
    )


def single_process_recipe(recipe: Recipe) -> Recipe:
    """The same model without parallelism, in fp32."""
    values = recipe.to_dict()
    values["parallel"] = {"world_size": 1}
    values["precision"] = "fp32"
    values["training"]["global_batch_size"] = values["training"]["micro_batch_size"] = 1
    return Recipe.from_dict(values)


def single_process_topology(recipe: Recipe, device: torch.device) -> Topology:
    """Groups of one rank, made without opening a port; made again for each model."""
    cpu.install()
    if not dist.is_initialized():
        join_world(World(0, 1, 0, 1, "", 0, "single process"), device, timeout_seconds=60.0)
    if parallel_state.is_initialized():
        destroy_topology()
    return build_topology(recipe, device)


def _autoencoder_directory(model: CalmRecipe, override: str | Path | None) -> Path:
    """The released-layout directory of the autoencoder: given, or the recipe's."""
    path = override or model.autoencoder
    if path is None or not Path(path).is_dir():
        raise CheckpointError(f"model.autoencoder: {path} is no directory; give --autoencoder")
    return autoencoder_directory(path)
