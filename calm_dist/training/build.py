"""Build the models and optimizers of a run from its recipe."""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer import TransformerConfig
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from calm_dist.costs.flops import head_parameters, head_sizes
from calm_dist.errors import RecipeError
from calm_dist.models.attention_kernel import attention_kernel
from calm_dist.models.autoencoder import Autoencoder
from calm_dist.models.backbone import Backbone, transformer_config
from calm_dist.models.heads import GenerativeHead, Head, latent_head, make_head
from calm_dist.models.heads.tokens import TokensHead
from calm_dist.models.initialize import initialize_backbone
from calm_dist.models.transformer import Transformer
from calm_dist.models.weights import head_init_std, init_std, initialize_module
from calm_dist.parallel.noise import KeyedNoise
from calm_dist.parallel.pipeline import (
    ForwardStep,
    LatentForwardStep,
    TokensForwardStep,
    TransformerForwardStep,
)
from calm_dist.parallel.topology import Topology
from calm_dist.parallel.zero_head import ZeroHead
from calm_dist.recipe import CalmModel, LanguageModelRecipe
from calm_dist.recipe.checks import NO_OVERLAP_ON_CPU
from calm_dist.released.autoencoder import load_autoencoder
from calm_dist.training.optimizer import build_backbone_optimizer
from calm_dist.training.resolve import autoencoder_directory

_log = logging.getLogger(__name__)

NO_TRITON = (
    "training.energy_kernel: auto on a GPU, but Triton is not installed: torch computes the energy "
    "score, with many more launches; install triton, or set training.energy_kernel=torch"
)
# Gradients reduced together: at most Megatron's default, and at least a few buckets, so that there
# is something to overlap.
MAX_BUCKET_ELEMENTS, MIN_BUCKETS = 40_000_000, 4


@dataclass(frozen=True)
class Parts:
    """The parts of a run on this rank."""

    config: TransformerConfig
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    head: ZeroHead | None
    forward_step: ForwardStep


def parameter_dtype(recipe: LanguageModelRecipe) -> torch.dtype:
    """dtype of weights and activations."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[recipe.precision]


def build_backbone(
    recipe: LanguageModelRecipe,
    config: TransformerConfig,
    topology: Topology,
    vp_stage: int | None,
    attention: str = "sdpa",
) -> Backbone:
    """One initialised chunk of the backbone on this rank's device."""
    chunks = recipe.parallel.chunks_per_stage
    first = topology.pp_rank == 0 and (vp_stage or 0) == 0
    last = topology.is_last_stage and (vp_stage or 0) == chunks - 1
    model = recipe.model
    assert model.vocab_size is not None
    kind = Backbone if model.kind == "calm" else Transformer
    backbone = kind(
        recipe,
        config,
        topology.groups,
        first=first,
        last=last,
        vp_stage=vp_stage,
        attention=attention,
    )
    std = init_std(model, model.num_hidden_layers)
    initialize_backbone(backbone, topology.groups, std, recipe.run.seed, model.vocab_size)
    return backbone.to(device=topology.device, dtype=config.params_dtype)


def build_head(model: CalmModel, seed: int) -> Head:
    """The initialised head, fp32 on the CPU.

    Raises:
        RecipeError: it has another number of parameters than its description says, one without a
            rule for its initial value, or a buffer, which checkpoints would not hold; it is said to
            predict tokens and is not a `TokensHead`; or its loss draws from torch's own generator.
    """
    head = make_head(model.head, *head_sizes(model), model.patch_size)
    if model.head_spec.predicts == "tokens" and not isinstance(head, TokensHead):
        raise RecipeError(
            f"model.head.kind: {model.head.kind}, which predicts tokens: its module must be a "
            "subclass of calm_dist.models.heads.tokens.TokensHead"
        )
    described, held = head_parameters(model), sum(p.numel() for p in head.parameters())
    if held != described:
        raise RecipeError(
            f"model.head.kind: {model.head.kind}, whose module has {held:,} parameters, its "
            f"description {described:,}; correct `parameters` in the package that registers it"
        )
    unsaved = head.state_dict().keys() - dict(head.named_parameters()).keys()
    if unsaved:
        raise RecipeError(
            f"model.head.kind: {model.head.kind}, whose module has the buffer "
            f"{', '.join(sorted(unsaved))}; checkpoints hold parameters only: make it a parameter, "
            "or register it with persistent=False if it is the same at every start"
        )
    initialize_module(head, "head", head_init_std(model), seed, model.head_spec.vector_value)
    for layer in head.layers_from_zero(model.init):
        nn.init.zeros_(layer.weight)
    # The tests do this for the heads of this package.
    if isinstance(head, GenerativeHead) and not model.head_spec.module.startswith("calm_dist."):
        check_randomness(head, model)
    return head


def check_randomness(head: GenerativeHead, model: CalmModel) -> None:
    """Raise RecipeError if the loss of a head on the CPU, at two positions, draws from torch's
    default generator: dropout, or `torch.randn` without a generator. Layouts would then train
    different models, and a resumed training another one than an uninterrupted one."""
    if isinstance(next(head.parameters()), FakeTensor):
        return
    hidden_size, latent_size = head_sizes(model)
    hidden, zeros = torch.ones(2, hidden_size), torch.zeros(2, latent_size)
    noise = KeyedNoise(0, 0, [0], 0, 2, torch.device("cpu"))
    before = torch.get_rng_state()
    with torch.no_grad():
        head.position_loss(hidden, zeros, zeros, noise)
    if not torch.equal(before, torch.get_rng_state()):
        torch.set_rng_state(before)
        raise RecipeError(
            f"model.head.kind: {model.head.kind}, whose loss draws from torch's default generator "
            "(dropout, or torch.randn without a generator), so that it would depend on the layout; "
            "draw from the noise that it is given"
        )


def build_chunks(
    recipe: LanguageModelRecipe, config: TransformerConfig, topology: Topology
) -> list[DistributedDataParallel]:
    """Build this rank's chunks of the backbone in Megatron's DDP, and set the hooks for its
    schedules.

    Raises:
        RecipeError: the device cannot run ``parallel.attention``.
    """
    parallel = recipe.parallel
    size = parallel.virtual_pipeline_size
    stages = [None] if size is None else list(range(size))
    kernel = attention_kernel(recipe, topology.device).kernel
    backbones = [build_backbone(recipe, config, topology, stage, kernel) for stage in stages]
    elements = sum(p.numel() for p in backbones[0].parameters())
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        # Affects only overlapping runs.
        bucket_size=min(MAX_BUCKET_ELEMENTS, -(-elements // MIN_BUCKETS)),
    )
    chunks = [
        # As in Megatron's own loop: the first chunks compute while a later one is reduced whole.
        DistributedDataParallel(config, ddp_config, backbone, disable_bucketing=number > 0)
        for number, backbone in enumerate(backbones)
    ]
    config.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        # Gradients are reduced only after the last micro-batch; with stages, on all of them at the
        # same time.
        no_sync = [chunk.no_sync for chunk in chunks]
        start = [chunk.start_grad_sync for chunk in chunks]
        config.no_sync_func = no_sync if size else no_sync[0]
        config.grad_sync_func = start if size else start[0]
    return chunks


def energy_kernel(wanted: str, device: torch.device) -> str:
    """What ``training.energy_kernel`` means on this device: torch or triton.

    Raises:
        RecipeError: triton is asked for and cannot run here.
    """
    is_installed = importlib.util.find_spec("triton") is not None
    if wanted == "auto":
        return "triton" if device.type == "cuda" and is_installed else "torch"
    if wanted == "torch":
        return wanted
    # Triton's interpreter runs on CPUs, for tests.
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RecipeError("training.energy_kernel: triton, but the device is a CPU; use auto")
    if not is_installed:
        raise RecipeError(
            "training.energy_kernel: triton, but it is not installed; use auto, or install triton"
        )
    return wanted


def build_parts(recipe: LanguageModelRecipe, topology: Topology) -> Parts:
    """Backbone chunks, head in its ZeRO engine, optimizer and forward step.

    Raises:
        RecipeError: the device does not support something in the recipe.
    """
    if recipe.parallel.overlap_p2p and topology.device.type == "cpu":
        raise RecipeError(f"parallel.overlap_p2p: {NO_OVERLAP_ON_CPU}")
    dtype = parameter_dtype(recipe)
    config = transformer_config(recipe, dtype)
    chunks = build_chunks(recipe, config, topology)
    optimizer = build_backbone_optimizer(recipe, chunks, dtype)
    head: ZeroHead | None = None
    model = recipe.model
    if model.kind == "calm" and topology.is_last_stage:
        head = ZeroHead(_head_module(recipe, model, topology), recipe, topology)
    forward_step = make_forward_step(recipe, topology, chunks, head)
    return Parts(config, chunks, optimizer, head, forward_step)


def _head_module(recipe: LanguageModelRecipe, model: CalmModel, topology: Topology) -> Head:
    device, wanted = topology.device, recipe.training.energy_kernel
    module = build_head(model, recipe.run.seed).to(device)
    if model.head.spec.scores_energy:
        kernel = energy_kernel(wanted, device)
        is_first = topology.rank == topology.head_ranks[0]
        if is_first and wanted == "auto" and device.type == "cuda" and kernel == "torch":
            _log.warning(NO_TRITON)
        latent_head(module).use_kernel(kernel)
    return module


def make_forward_step(
    recipe: LanguageModelRecipe,
    topology: Topology,
    chunks: list[DistributedDataParallel],
    head: ZeroHead | None,
) -> ForwardStep:
    """The forward step for chunks and head that have been built."""
    model = recipe.model
    if model.kind != "calm":
        return TransformerForwardStep(recipe, topology)
    if not model.has_latents:
        return TokensForwardStep(recipe, topology, head, chunks[-1].module.patch_tokens)
    autoencoder = None
    if topology.is_last_stage and recipe.data.latents == "on_the_fly":
        autoencoder = on_the_fly_encoder(recipe).to(topology.device)
    return LatentForwardStep(recipe, topology, head, autoencoder)


def on_the_fly_encoder(recipe: LanguageModelRecipe) -> Autoencoder:
    """The trained autoencoder of a recipe that encodes in training, on the CPU."""
    assert recipe.model.kind == "calm" and recipe.model.autoencoder is not None
    return load_autoencoder(autoencoder_directory(recipe.model.autoencoder))
