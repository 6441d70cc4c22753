"""A whole training step of a small CALM: ours, and plain PyTorch of the same sizes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm_dist.benchmark import plain
from calm_dist.benchmark.compare import Pair
from calm_dist.benchmark.random_steps import RandomSteps
from calm_dist.inference.loading import single_process_topology
from calm_dist.models.heads.energy import EnergyHead
from calm_dist.recipe import CalmModel, LanguageModelRecipe
from calm_dist.training.build import build_head

ROWS, BLOCK, PATCH, LATENT_PER_TOKEN, VOCAB = 4, 1024, 4, 32, 32_000
HEADS, ROPE_BASE, DRAWS = 4, 10_000.0, 100


class PlainLayer(nn.Module):
    """A layer of Llama: RMSNorm, attention with rotary positions, RMSNorm, SwiGLU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-6) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, P, d] -> [B, P, d]."""
        parts = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        query, key = (part * cos + _rotated(part) * sin for part in (query, key))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def _rotated(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


class PlainCalm(nn.Module):
    """Patch embedding, layers, final norm, energy head."""

    def __init__(self, recipe: CalmModel) -> None:
        super().__init__()
        width = recipe.hidden_size
        self.embed = nn.Embedding(VOCAB, width)
        self.compress = nn.Sequential(
            nn.Linear(PATCH * width, 2 * width),
            nn.SiLU(),
            nn.Linear(2 * width, width),
            nn.LayerNorm(width),
        )
        self.layers = nn.ModuleList(
            PlainLayer(width, recipe.intermediate_size) for _ in range(recipe.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(width, eps=1e-6)
        head = build_head(recipe, 0)
        assert isinstance(head, EnergyHead)
        self.head = head

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> hidden states [B, P, d]."""
        x = self.compress(self.embed(tokens).unflatten(1, (-1, PATCH)).flatten(-2))
        size = x.shape[-1] // HEADS
        rates = ROPE_BASE ** (-torch.arange(0, size, 2, device=x.device) / size)
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * rates
        angles = torch.cat([angles, angles], dim=-1)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin())
        return self.norm(x)


def step_pairs(device: torch.device) -> Iterator[Pair]:
    """Hidden 256, 4 layers, 32,000 words, 4 blocks of 1,024 tokens, K=4, latents given."""
    recipe = small_calm_recipe()
    assert isinstance(recipe.model, CalmModel)
    ours = RandomSteps(recipe, single_process_topology(recipe, device))
    batch = ours.batch

    model = PlainCalm(recipe.model).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, foreach=False)
    given = {name: value.to(device) for name, value in batch.items()}

    def plainly() -> None:
        optimizer.zero_grad()
        hidden = model(given["tokens"])[:, :-1].flatten(0, 1)
        noise = torch.rand(8, len(hidden), model.head.noise_size, device=device) - 0.5
        samples = plain.head_samples(model.head, hidden, noise)
        eps = torch.randn(DRAWS, len(hidden), PATCH * LATENT_PER_TOKEN, device=device)
        mean, log_std = (given[name][:, 1:].flatten(0, 1) for name in ("mean", "log_std"))
        (-plain.energy_score(samples, mean, log_std, eps).mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    tokens = batch["tokens"].numel()
    sizes = {"tokens": tokens, "hidden": 256, "layers": 4, "vocabulary": VOCAB, "K": PATCH}

    def step() -> None:
        ours.step()

    yield Pair("CALM training step", step, plainly, tokens, "tokens", sizes)


def small_calm_recipe(patch_size: int = PATCH) -> LanguageModelRecipe:
    """Hidden 256, 4 layers, 4 blocks of 1,024 tokens, 32 components of a latent per token."""
    return LanguageModelRecipe.from_dict(
        {
            "run": {"dir": "runs/benchmark"},
            "model": {
                "kind": "calm",
                "vocab_size": VOCAB,
                "patch_size": patch_size,
                "latent_size": LATENT_PER_TOKEN * patch_size,
                "hidden_size": 256,
                "intermediate_size": 688,
                "num_hidden_layers": 4,
                "num_attention_heads": HEADS,
                "rope_theta": ROPE_BASE,
                "head": {"num_mlp_layers": 2, "num_samples": 8, "posterior_samples": DRAWS},
            },
            "data": {"path": "latents/train", "block_size": BLOCK},
            "training": {"steps": 10, "micro_batch_size": ROWS, "global_batch_size": ROWS},
        }
    )
