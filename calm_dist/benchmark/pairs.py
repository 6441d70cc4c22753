"""Pairs of our code and the plain form, at the sizes of the released code's figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calm_dist.benchmark import plain
from calm_dist.benchmark.compare import Pair, Values
from calm_dist.inference.loading import LoadedModel, single_process_topology
from calm_dist.losses.autoencoder import autoencoder_loss, draw_training_noise
from calm_dist.losses.energy import energy_score
from calm_dist.models.autoencoder import Autoencoder, AutoencoderConfig
from calm_dist.models.backbone import transformer_config
from calm_dist.models.heads.energy import EnergyHead
from calm_dist.models.weights import initialize_module
from calm_dist.recipe import CalmModel, HeadRecipe, LanguageModelRecipe
from calm_dist.training.build import build_backbone, build_head

PAPER_VOCAB = 128_256
SMALL_VOCAB = 32_000


def energy_pairs(device: torch.device) -> Iterator[Pair]:
    """The energy score, forward and backward, with draws made inside and with given noise."""
    for given in (False, True):
        yield energy_pair(device, given=given)
        if device.type == "cuda":
            yield energy_pair(device, given=given, score=_fused_score, name="fused kernel")


def _fused_score(
    samples: Tensor,
    mean: Tensor,
    log_std: Tensor,
    noise: Tensor | None = None,
    *,
    num_draws: int = 100,
    seed: int = 0,
) -> Tensor:
    from calm_dist.losses.energy_kernel import fused_energy_score

    keys = None if noise is not None else seed + torch.arange(len(mean), device=mean.device)
    return fused_energy_score(samples, mean, log_std, keys, num_draws=num_draws, noise=noise)


def energy_pair(
    device: torch.device,
    *,
    given: bool = False,
    samples: int = 8,
    draws: int = 100,
    positions: int = 4096,
    score: Callable[..., Tensor] = energy_score,
    name: str = "energy score",
) -> Pair:
    """The energy score of latents of size 128; ``score`` is the implementation to compare."""
    size, generator = 128, torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x = normal(samples, positions, size).requires_grad_()
    mean, log_std = normal(positions, size), 0.3 * normal(positions, size) - 1
    sizes = {"N": samples, "M": draws, "positions": positions, "l": size}

    def gradient(scores: Tensor) -> Values:
        return [scores.detach(), *torch.autograd.grad(-scores.mean(), x)]

    def ours_drawn() -> None:
        gradient(score(x, mean, log_std, num_draws=draws, seed=0))

    def plain_drawn() -> None:
        gradient(plain.energy_score(x, mean, log_std, normal(draws, positions, size)))

    if not given:
        return Pair(name, ours_drawn, plain_drawn, positions, "positions", sizes)
    noise = normal(draws, positions, size)
    return Pair(
        f"{name}, noise given",
        lambda: gradient(score(x, mean, log_std, noise)),
        lambda: gradient(plain.energy_score(x, mean, log_std, noise)),
        positions,
        "positions",
        sizes,
    )


def head_pairs(device: torch.device) -> Iterator[Pair]:
    """The energy head of CALM-M, N=8, forward and backward."""
    samples, positions, width, size = 8, 512, 1024, 128
    head = EnergyHead(HeadRecipe(num_mlp_layers=4), width, size).to(device)
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(positions, width, generator=generator, device=device).requires_grad_()
    noise = head.draw_noise(generator, samples, positions)
    parameters = [hidden, *head.parameters()]

    def gradients(latents: Tensor) -> Values:
        return [latents.detach(), *torch.autograd.grad(latents.square().mean(), parameters)]

    yield Pair(
        "energy head",
        lambda: gradients(head.sample(hidden, noise)),
        lambda: gradients(plain.head_samples(head, hidden, noise)),
        positions,
        "positions",
        {"N": samples, "positions": positions, "hidden": width, "blocks": 4},
    )


def autoencoder_pairs(device: torch.device) -> Iterator[Pair]:
    """A training step of the paper's autoencoder, AdamW included, and encoding with it."""
    yield autoencoder_pair(device)
    model = random_autoencoder(PAPER_VOCAB).to(device)
    model.requires_grad_(False)
    text = zipf_tokens(PAPER_VOCAB, 8192, seed=0)[None].to(device)
    for name, block in (
        ("encoding, words as often as in text", text),
        ("encoding, all words alike", torch.randint(PAPER_VOCAB, text.shape, device=device)),
    ):
        yield Pair(
            name,
            lambda block=block: list(model.encode(block)),  # type: ignore[misc]
            lambda block=block: list(plain.encode(model, block)),  # type: ignore[misc]
            block.numel(),
            "tokens",
            {"tokens": block.numel(), "distinct": len(block.unique()), "vocabulary": PAPER_VOCAB},
        )


def autoencoder_pair(
    device: torch.device, *, vocab_size: int = PAPER_VOCAB, length: int = 1024
) -> Pair:
    """A training step of the paper's autoencoder on ``length`` tokens, AdamW included."""
    model = random_autoencoder(vocab_size).to(device)
    generator = torch.Generator(device).manual_seed(0)
    tokens = torch.randint(vocab_size, (1, length), generator=generator, device=device)
    noise = draw_training_noise(model, tokens, generator)
    # Updates of zero, so that both sides keep computing the same.
    settings: dict[str, Any] = {"lr": 0.0, "weight_decay": 0.0}
    fused = torch.optim.AdamW(model.parameters(), fused=True, **settings)
    simple = torch.optim.AdamW(model.parameters(), foreach=False, **settings)

    def step(loss_of: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Values:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return [loss.detach(), *gradients]

    weight, hidden = model.output_weight.detach(), torch.randn(length, 512, device=device)

    def products() -> None:
        logits = hidden @ weight.T
        torch.mm(logits, weight)
        torch.mm(logits.T, hidden)

    return Pair(
        "autoencoder training step",
        lambda: step(lambda: autoencoder_loss(model, tokens, noise).total, fused),
        lambda: step(lambda: plain.autoencoder_loss(model, tokens, noise), simple),
        length,
        "tokens",
        {"tokens": length, "vocabulary": vocab_size, "hidden": 512, "K": 4, "l": 128},
        floor=products,
    )


def zipf_tokens(vocab_size: int, count: int, seed: int) -> Tensor:
    """Tokens [count] with frequencies proportional to 1/rank, like those of words in text."""
    weights = 1 / torch.arange(1, vocab_size + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(weights, count, replacement=True, generator=generator)


def random_autoencoder(vocab_size: int, patch_size: int = 4) -> Autoencoder:
    """The paper's autoencoder with random weights."""
    return with_random_weights(AutoencoderConfig(vocab_size, patch_size, 32 * patch_size))


def with_random_weights(config: AutoencoderConfig) -> Autoencoder:
    """An autoencoder of these sizes."""
    model = Autoencoder(config)
    initialize_module(model, "autoencoder", lambda name, shape: 0.02, 0)
    return model


def random_model(
    kind: str,
    block_size: int,
    device: torch.device,
    patch_size: int = 1,
    noise: float | None = None,
) -> LoadedModel:
    """A small language model with random weights: hidden 256, 4 layers, 32,000 words.

    Args:
        noise: scale of the head's noise; 0 makes all draws equal, None leaves it unchanged.
    """
    size = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}
    model: dict[str, Any] = {"kind": kind, "vocab_size": SMALL_VOCAB, "num_attention_heads": 4}
    if kind == "calm":
        model |= {"patch_size": patch_size, "latent_size": 32 * patch_size}
        model["head"] = {"num_mlp_layers": 2}
    recipe = LanguageModelRecipe.from_dict(
        {
            "run": {"dir": "runs/benchmark"},
            "model": model | size,
            "data": {"path": "latents/train", "block_size": block_size},
            "training": {"steps": 1, "micro_batch_size": 1, "global_batch_size": 1},
        }
    )
    topology = single_process_topology(recipe, device)
    backbone = build_backbone(recipe, transformer_config(recipe, torch.float32), topology, None)
    head, autoencoder = None, None
    if isinstance(recipe.model, CalmModel):
        head = build_head(recipe.model, 0).to(device).eval().requires_grad_(False)
        if noise is not None:
            head.norm_noise.weight.fill_(noise)  # type: ignore[operator,union-attr]
        autoencoder = (
            random_autoencoder(SMALL_VOCAB, patch_size).to(device).eval().requires_grad_(False)
        )
    return LoadedModel(
        recipe=recipe,
        checkpoint=Path("runs/benchmark"),
        step=0,
        tokens_seen=0,
        tokenizer_sha256=None,
        device=device,
        backbone=backbone.eval().requires_grad_(False),
        _head=head,
        autoencoder=autoencoder,
        autoencoder_sha256=None,
    )
