"""Every recipe's closed form against torch's FLOP counter on the trainer's own modules.

The modules live on the meta device: nothing is computed, every matrix product is counted. The
counter counts attention in full, whatever the mask, as `calm_dist.costs.flops` does by default.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from launches import autoencoder_recipe, language_recipe
from torch.utils.flop_counter import FlopCounterMode

from calm_dist.costs import flops
from calm_dist.heads import all_specs
from calm_dist.inference.load import single_process_topology
from calm_dist.models.autoencoder import Autoencoder, AutoencoderConfig, Encoder
from calm_dist.models.backbone import Backbone, transformer_config
from calm_dist.models.heads import latent_head, make_head
from calm_dist.models.heads.chain import ChainHead
from calm_dist.models.heads.diffusion import DiffusionHead
from calm_dist.models.heads.flow import FlowHead
from calm_dist.models.heads.tokens import TokensHead
from calm_dist.models.transformer import Transformer
from calm_dist.recipe import (
    AutoencoderModel,
    AutoencoderSize,
    CalmModel,
    LanguageModelRecipe,
)

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
AUTOENCODERS = [path for path in RECIPES if path.stem.startswith("autoencoder")]
CALMS = [path for path in RECIPES if path.stem.startswith("calm")]
LANGUAGE_MODELS = [path for path in RECIPES if path not in AUTOENCODERS]
# One process holds the whole model.
ALONE = (
    "parallel.tensor_parallel_size=1",
    "parallel.pipeline_parallel_size=1",
    "parallel.sequence_parallel=false",
    "parallel.world_size=1",
    "precision=fp32",
)
POSITIONS = 6
LATENT_HEADS = [kind for kind, spec in all_specs().items() if spec.predicts == "latents"]


def name(path: Path) -> str:
    return path.stem


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


def forward_and_all(output: torch.Tensor, counter: FlopCounterMode) -> tuple[int, int]:
    """FLOPs up to here, and with the backward pass."""
    forward = counter.get_total_flops()
    output.sum().backward()
    return forward, counter.get_total_flops()


def run_backbone(recipe: LanguageModelRecipe, steps: int) -> tuple[int, int]:
    """One block of ``steps`` steps through the backbone: (forward, forward and backward)."""
    topology = single_process_topology(recipe, torch.device("cpu"))
    kind = Backbone if recipe.model.kind == "calm" else Transformer
    with torch.device("meta"):
        backbone = kind(recipe, transformer_config(recipe, torch.float32), topology.groups)
        # Megatron puts it on the CPU, whatever the default.
        backbone.rotary.inv_freq = meta(*backbone.rotary.inv_freq.shape)
        tokens = torch.zeros(1, steps * recipe.model.patch_size, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            return forward_and_all(backbone(tokens, steps), counter)


@pytest.mark.parametrize("path", LANGUAGE_MODELS, ids=name)
def test_backbone_of_every_recipe(path: Path) -> None:
    recipe = language_recipe(path, ALONE)
    forward, both = run_backbone(recipe, recipe.num_patches)
    # The head, and the output layer of one that predicts tokens, run after the backbone.
    after = {"head", "output_layer"} if recipe.model.kind == "calm" else {"head"}
    parts = [part for part in flops.count(recipe).parts if part.name not in after]
    tokens = recipe.block_size
    assert forward == sum(part.forward_flops_per_token_ours for part in parts) * tokens
    assert both == sum(part.train_flops_per_token_ours for part in parts) * tokens


def test_inference_without_a_cache_runs_the_backbone_over_the_whole_context() -> None:
    recipe = language_recipe(RECIPES[0].with_name("transformer_tiny.yaml"), ALONE)
    forward, _ = run_backbone(recipe, recipe.num_patches)
    # Logits are needed for the last step alone.
    output = flops.count(recipe).part("output_layer").inference_flops_per_token
    expected = forward - (recipe.num_patches - 1) * output
    assert flops.count(recipe).inference_flops_per_token_without_cache == expected


def test_recomputation_repeats_the_layers_forward_pass() -> None:
    recipe = language_recipe(CALMS[0].with_name("calm_tiny.yaml"), ALONE)
    repeating = language_recipe(
        CALMS[0].with_name("calm_tiny.yaml"), [*ALONE, "parallel.recompute=true"]
    )
    assert flops.count(recipe).recomputed_flops_per_token == 0
    plain, repeated = (run_backbone(r, r.num_patches)[1] for r in (recipe, repeating))
    expected = flops.count(repeating).recomputed_flops_per_token * recipe.block_size
    assert repeated - plain == expected > 0


def test_grouped_query_attention() -> None:
    recipe = language_recipe(
        CALMS[0].with_name("calm_tiny.yaml"), [*ALONE, "model.num_key_value_heads=2"]
    )
    assert recipe.model.kind == "calm" and recipe.model.key_value_heads == 2
    forward, _ = run_backbone(recipe, recipe.num_patches)
    # The head, and the output layer of one that predicts tokens, run after the backbone.
    after = {"head", "output_layer"} if recipe.model.kind == "calm" else {"head"}
    parts = [part for part in flops.count(recipe).parts if part.name not in after]
    assert forward == sum(p.forward_flops_per_token_ours for p in parts) * recipe.block_size


@pytest.mark.parametrize("kind", LATENT_HEADS)
@pytest.mark.parametrize("path", CALMS, ids=name)
def test_every_head_of_every_recipe(path: Path, kind: str) -> None:
    recipe = language_recipe(path, [f"model.head.kind={kind}"])
    model = recipe.model
    assert isinstance(model, CalmModel)
    d, latent = model.hidden_size, flops.known_size(model, "latent_size")
    samples = model.head.num_samples
    with torch.device("meta"):
        head = latent_head(make_head(model.head, d, latent))
        hidden = meta(POSITIONS, d).requires_grad_()
        shape = (samples, POSITIONS)
        with FlopCounterMode(display=False) as counter:
            if isinstance(head, DiffusionHead):
                levels = torch.zeros(shape, dtype=torch.long)
                output = head.level_loss(hidden, meta(*shape, latent), meta(*shape, latent), levels)
            elif isinstance(head, FlowHead):
                output = head.path_loss(
                    hidden, meta(*shape, latent), meta(*shape, latent), meta(*shape)
                )
            elif isinstance(head, ChainHead):
                noise = meta(*shape, head.slots * model.head.noise_size)
                output = head.teacher_forced(hidden, meta(POSITIONS, latent), noise)
            else:
                # The distances of the energy score are no part of the convention.
                output = head.sample(hidden, meta(*shape, model.head.noise_size))
            forward, both = forward_and_all(output, counter)
    expected = flops.head_flops(model, samples, share_condition=True)
    assert forward == POSITIONS * expected
    assert both == POSITIONS * (expected + flops.head_backward_flops(model, samples))
    part = flops.count(recipe).part("head")
    assert part.train_flops_per_token_ours * model.patch_size == 3 * expected
    assert part.parameters == sum(p.numel() for p in head.parameters())


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("path", CALMS, ids=name)
def test_the_tokens_head_of_every_recipe(path: Path, independent: bool) -> None:
    recipe = language_recipe(
        path, [*ALONE, "model.head.kind=tokens", f"model.head.independent={independent}"]
    )
    model = recipe.model
    assert isinstance(model, CalmModel) and model.vocab_size is not None
    d, size = model.hidden_size, model.patch_size
    topology = single_process_topology(recipe, torch.device("cpu"))
    with torch.device("meta"):
        head = make_head(model.head, d, 0, size)
        tables = Backbone(
            recipe, transformer_config(recipe, torch.float32), topology.groups
        ).patch_tokens
        assert isinstance(head, TokensHead) and tables is not None
        previous = None if independent else meta(POSITIONS, size - 1, d).requires_grad_()
        with FlopCounterMode(display=False) as counter:
            states = head(meta(POSITIONS, d).requires_grad_(), previous)
            assert states.shape == (POSITIONS, size, d)
            of_head = counter.get_total_flops()
            logits = tables.logits(states)
            forward, both = forward_and_all(logits.view_as(logits), counter)
    counts = flops.count(recipe)
    named = {part.name: part for part in counts.parts}
    tokens = POSITIONS * size
    assert of_head == named["head"].forward_flops_per_token_ours * tokens
    padded = logits.shape[-1] / model.vocab_size
    of_output = named["output_layer"].forward_flops_per_token_ours * padded
    assert forward == pytest.approx(of_head + of_output * tokens, rel=1e-12)
    assert both == 3 * forward
    assert named["head"].parameters == sum(p.numel() for p in head.parameters())
    assert ("patch_embedding" in named) is not independent
    rows = sum(p.shape[0] for p in tables.parameters()) * model.vocab_size / logits.shape[-1]
    names = ("patch_embedding", "output_layer")
    assert sum(named[n].parameters for n in names if n in named) == pytest.approx(rows * d)
    assert not [n for n in named if n.startswith("autoencoder")]


@pytest.mark.parametrize("kind", LATENT_HEADS)
def test_sampling_with_every_head(kind: str) -> None:
    overrides = [f"model.head.kind={kind}"]
    if kind in ("flow", "diffusion"):
        overrides.append("model.head.sampling_steps=3")
    recipe = language_recipe(CALMS[0].with_name("calm_tiny.yaml"), overrides)
    model = recipe.model
    assert isinstance(model, CalmModel) and model.latent_size is not None
    head = latent_head(make_head(model.head, model.hidden_size, model.latent_size))
    noise = head.draw_noise(torch.Generator().manual_seed(0), 1, 1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        head.sample(torch.zeros(1, model.hidden_size), noise)
    part = flops.count(recipe).part("head")
    assert counter.get_total_flops() == part.inference_flops_per_token * model.patch_size


def encode(encoder: Encoder, tokens: torch.Tensor) -> torch.Tensor:
    """`Encoder.forward` for words that all differ: how many occur twice is not known on meta."""
    half = len(encoder.encoder_layers) // 2
    x = encoder.embed_tokens(tokens)
    for layer in encoder.encoder_layers[:half]:
        x = layer(x)
    x = encoder.squeeze_layer(x.flatten(-2))
    for layer in encoder.encoder_layers[half:]:
        x = layer(x)
    return encoder.hidden_to_latent(encoder.norm(x))


def autoencoder_on_meta(size: AutoencoderSize, vocab: int, patch: int, latent: int) -> Autoencoder:
    with torch.device("meta"):
        return Autoencoder(
            AutoencoderConfig(
                vocab,
                patch,
                latent,
                size.hidden_size,
                size.intermediate_size,
                size.num_encoder_layers,
                size.num_decoder_layers,
            )
        )


@pytest.mark.parametrize("path", AUTOENCODERS, ids=name)
def test_training_of_every_autoencoder(path: Path) -> None:
    recipe = autoencoder_recipe(path)
    model = recipe.model
    assert isinstance(model, AutoencoderModel) and model.vocab_size is not None
    autoencoder = autoencoder_on_meta(model, model.vocab_size, model.patch_size, model.latent_size)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        tokens = torch.zeros(POSITIONS, model.patch_size, dtype=torch.long)
        mean, log_std = encode(autoencoder.encoder, tokens).chunk(2, -1)
        encoded = counter.get_total_flops()
        hidden = autoencoder.decoder(mean + log_std)
        decoded = counter.get_total_flops() - encoded
        logits = F.linear(hidden.flatten(0, 1), autoencoder.output_weight)
        forward, both = forward_and_all(logits, counter)
    counts, rows = flops.count(recipe), POSITIONS * model.patch_size
    for part, found in (("encoder", encoded), ("decoder", decoded)):
        assert counts.part(part).forward_flops_per_token * rows == found
    assert sum(p.forward_flops_per_token for p in counts.parts) * rows == forward
    assert counts.train_flops_per_token * rows == both
    assert counts.inference_flops_per_token * rows == forward
    assert counts.parameters == sum(p.numel() for p in autoencoder.parameters())


@pytest.mark.parametrize("path", CALMS, ids=name)
def test_autoencoder_of_every_calm(path: Path) -> None:
    """What generation and encoding use of it, from the language model's recipe alone."""
    recipe = language_recipe(path)
    model = recipe.model
    assert isinstance(model, CalmModel)
    assert model.vocab_size is not None and model.latent_size is not None
    autoencoder = autoencoder_on_meta(
        model.autoencoder_size, model.vocab_size, model.patch_size, model.latent_size
    )
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        encode(autoencoder.encoder, torch.zeros(1, model.patch_size, dtype=torch.long))
        encoded = counter.get_total_flops()
        autoencoder.decode(meta(1, 1, model.latent_size))
        decoded = counter.get_total_flops() - encoded
    counts, costs = flops.count(recipe), flops.count_autoencoder(model, 1000)
    inference = sum(p.inference_flops_per_token for p in counts.parts if "autoencoder" in p.name)
    assert inference * model.patch_size == decoded
    assert costs.part("encoder").forward_flops_per_token * model.patch_size == encoded
    assert costs.train_flops * model.patch_size == 1000 * 3 * (encoded + decoded)
