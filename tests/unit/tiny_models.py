"""Language models with random weights, small enough to run thousands of steps in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from calm_dist.inference.load import LoadedModel, single_process_topology
from calm_dist.models.autoencoder import Autoencoder, AutoencoderConfig
from calm_dist.models.backbone import transformer_config
from calm_dist.models.heads.energy import LAYER_NORM_EPS
from calm_dist.models.weights import init_std, initialize_module
from calm_dist.recipe import CalmModel, LanguageModelRecipe
from calm_dist.training.build import build_backbone, build_head

LATENT = 6
# 256 bytes and the three special tokens of a tokenizer without merges.
VOCAB = 259


def tiny_model(
    kind: str = "calm",
    *,
    patch_size: int = 4,
    block_steps: int = 9,
    seed: int = 0,
    vocab_size: int = VOCAB,
    head: str = "energy",
    noise: float | None = None,
    independent: bool = False,
    **model: Any,
) -> LoadedModel:
    """A model of `inference.load` without a checkpoint, its weights a function of ``seed``.

    A small ``noise`` (energy head) leaves few patches likely. ``model`` holds further fields of
    the recipe's ``model`` section.
    """
    values = {
        "kind": kind,
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    } | model
    if kind == "calm":
        values["patch_size"] = patch_size
        values["latent_size"] = LATENT
        values["head"] = {
            "kind": head,
            "num_mlp_layers": 1,
            "noise_size": 4,
            "sampling_steps": None if head in ("energy", "tokens") else 2,
            "independent": independent,
        }
    block_size = block_steps * (patch_size if kind == "calm" else 1)
    recipe = LanguageModelRecipe.from_dict(
        {
            "run": {"dir": "runs/tiny", "seed": seed},
            "model": values,
            "data": {"path": "latents/train", "block_size": block_size},
            "training": {"steps": 1, "micro_batch_size": 1, "global_batch_size": 1},
        }
    )
    topology = single_process_topology(recipe, torch.device("cpu"))
    backbone = build_backbone(recipe, transformer_config(recipe, torch.float32), topology, None)
    head_module, autoencoder = None, None
    if isinstance(recipe.model, CalmModel):
        head_module = build_head(recipe.model, seed).eval().requires_grad_(False)
        if noise is not None:
            # The blocks normalise their input; noise below the epsilon of that stays small.
            head_module.norm_noise.weight.fill_(noise * LAYER_NORM_EPS**0.5)  # type: ignore[operator,union-attr]
        if recipe.model.has_latents:
            config = AutoencoderConfig(
                vocab_size, patch_size, LATENT, hidden_size=12, intermediate_size=16
            )
            autoencoder = Autoencoder(config)
            initialize_module(autoencoder, "autoencoder", init_std(recipe.model), seed)
            autoencoder = autoencoder.eval().requires_grad_(False)
    return LoadedModel(
        recipe=recipe,
        checkpoint=Path("runs/tiny"),
        step=0,
        tokens_seen=0,
        tokenizer_sha256=None,
        device=topology.device,
        backbone=backbone.eval().requires_grad_(False),
        _head=head_module,
        autoencoder=autoencoder,
        autoencoder_sha256=None,
    )
