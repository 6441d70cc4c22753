"""The paper's formulas in their plain form, as its released code executes them.

Every tensor is materialised, every head sample computes its condition again, and Brier scores loop
over positions, continuing from the cached keys and values of the text before each. The weights are
those of our modules, so that both sides compute the same.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from calm_dist.evaluation.brier import NGRAM
from calm_dist.inference.methods import Sampler
from calm_dist.inference.sampling import pool_candidates
from calm_dist.losses.autoencoder import TrainingNoise, kl_per_dimension
from calm_dist.models.autoencoder import Autoencoder
from calm_dist.models.heads import GenerativeHead
from calm_dist.models.heads.energy import ConditionedLinear, EnergyHead, HeadBlock
from calm_dist.models.kv_cache import KeyValueCache

Draw = Callable[[Tensor, int], Tensor]
"""Hidden states [b, d], number of draws -> tokens [m, b, K]."""
Run = Callable[[Tensor, Tensor | None, Tensor | None, KeyValueCache], Tensor]
"""Tokens, positions, mask, cache: `LoadedModel.logits` or `LoadedModel.hidden`."""
NewCache = Callable[[int, int], KeyValueCache]
"""Number of texts and of steps -> an empty cache."""


def energy_score(samples: Tensor, mean: Tensor, log_std: Tensor, noise: Tensor) -> Tensor:
    """samples [N, S, l], posterior [S, l], noise [M, S, l] -> scores [S], at beta 1."""
    count = len(samples)
    draws = mean + noise * log_std.exp()
    between = torch.linalg.norm(samples[:, None] - samples[None], dim=-1).sum((0, 1))
    to_draws = torch.linalg.norm(samples[:, None] - draws[None], dim=-1).mean((0, 1))
    return between / (count * (count - 1)) - 2 * to_draws


def head_samples(head: EnergyHead, hidden: Tensor, noise: Tensor) -> Tensor:
    """hidden [S, d], noise [N, S, noise_size] -> latents [N, S, l]; computes the condition N
    times."""
    x = head.norm_noise(head.noise_embd(noise))
    condition = head.norm_hidden(head.hidden_embd(hidden.expand(len(noise), -1, -1)))
    for block in head.mlp_blocks:
        assert isinstance(block, HeadBlock)
        first = block.linears[0]
        assert isinstance(first, ConditionedLinear)
        both = torch.cat([block.in_ln(x), condition], dim=-1)
        gate, up = block.linears[1:](F.linear(both, first.weight, first.bias)).chunk(2, dim=-1)
        x = x + block.down_proj(F.silu(gate) * up)
    return head.final_layer(x)


def encode(model: Autoencoder, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """tokens [B, T] -> mean and log_std [B, T/K, l]; repeated tokens are computed each time."""
    encoder = model.encoder
    half = len(encoder.encoder_layers) // 2
    x = encoder.embed_tokens(tokens)
    for layer in encoder.encoder_layers[:half]:
        x = layer(x)
    x = encoder.squeeze_layer(x.unflatten(1, (-1, model.patch_size)).flatten(-2))
    for layer in encoder.encoder_layers[half:]:
        x = layer(x)
    mean, log_std = encoder.hidden_to_latent(encoder.norm(x)).chunk(2, dim=-1)
    return mean, log_std


def autoencoder_loss(model: Autoencoder, tokens: Tensor, noise: TrainingNoise) -> Tensor:
    """The autoencoder's training loss from the logits of all tokens."""
    config = model.config
    inputs = torch.where(noise.token_keep, tokens, config.replaced_token_id)
    mean, log_std = encode(model, inputs)
    z = (mean + noise.eps * log_std.exp()) * noise.latent_keep / (1 - config.ae_dropout)
    logits = model.decode(z).float()
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    kl = kl_per_dimension(mean, log_std).clamp(min=config.kl_clamp).sum(-1).mean()
    return config.patch_size * cross_entropy + config.kl_weight * kl


@torch.no_grad()
def transformer_brier(
    logits: Run, new_cache: NewCache, tokens: Tensor, starts: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Brier-1..4 of a Transformer at each start, one after the other, and its cross entropy.

    Where two samples agree, the first is appended to the keys and values of the text before it, and
    the model runs one step further. The last collision of an n-gram is exact.
    """
    cache = new_cache(1, len(tokens))
    outputs = logits(tokens[None], torch.arange(len(tokens)), None, cache)[0]
    loss = F.cross_entropy(outputs[:-1].contiguous(), tokens[1:])
    predicting = outputs[:-1].contiguous()
    probabilities = predicting.softmax(-1)
    true = probabilities.gather(1, tokens[1:, None])[:, 0]
    scores = torch.zeros(len(starts), NGRAM, dtype=torch.float64)
    for row, start in enumerate(starts.tolist()):
        scores[row] = 2 * true[start - 1 : start - 1 + NGRAM].cumprod(0).double()
        following, held = probabilities[start - 1], None
        for n in range(NGRAM):
            pair = torch.multinomial(following, 2, True, generator=generator)
            scores[row, n] -= float(following.square().sum())
            if n == NGRAM - 1 or pair[0] != pair[1]:
                break
            held = _prefix(cache, start) if held is None else held
            following = logits(pair[None, :1], None, None, held)[0, -1].softmax(-1)
    return scores, loss


@torch.no_grad()
def calm_evaluation(
    hidden: Run, new_cache: NewCache, head: GenerativeHead, autoencoder: Autoencoder,
    tokens: Tensor, starts: Tensor, samples: int, generator: torch.Generator,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Brier-1..4 of a CALM at each start patch, and the energy loss of the block.

    The text is encoded, the head draws ``samples`` latents of each patch, and the first two of them
    are decoded.
    """
    size = autoencoder.patch_size
    cache = new_cache(1, len(tokens) // size)
    text = tokens[None, :-size]
    states = hidden(text, torch.arange(text.shape[1] // size), None, cache)[0]
    mean, log_std = (part[0] for part in encode(autoencoder, tokens[None, size:]))
    latents = _sampled(head, states, samples, generator)
    # The generator is the host's.
    noise = torch.randn(100, *mean.shape, device=mean.device)
    loss = -energy_score(latents, mean, log_std, noise).mean()

    def draw(states: Tensor, count: int) -> Tensor:
        return decode(autoencoder, _sampled(head, states, count, generator))

    pairs = decode(autoencoder, latents[:2])
    return calm_brier(hidden, cache, draw, pairs, tokens, starts), loss


def _sampled(
    head: GenerativeHead, hidden: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    noise = head.draw_noise(generator, count, len(hidden)).to(hidden)
    # The other heads have one form only.
    if isinstance(head, EnergyHead):
        return head_samples(head, hidden, noise)
    return head.sample(hidden, noise)


@torch.no_grad()
def calm_brier(
    hidden: Run, cache: KeyValueCache, draw: Draw, pairs: Tensor, tokens: Tensor, starts: Tensor
) -> Tensor:
    """Brier-1..4 of a CALM from two samples of each patch, one start after the other.

    Where two samples of a patch agree, the model runs one step further, as in `transformer_brier`.

    Args:
        cache: holds the block's patches, but perhaps not the last.
        pairs: two samples [2, P - 1, K] of all patches but the first.
    """
    patch_size = pairs.shape[-1]
    scores = torch.zeros(len(starts), NGRAM, dtype=torch.float64, device=tokens.device)
    for row, start in enumerate(starts.tolist()):
        first = start * patch_size
        given_truth = pairs[:, start - 1 :].flatten(1)[:, :NGRAM]
        right = given_truth == tokens[first : first + NGRAM]
        scores[row] = right.cumprod(-1).sum(0).double()
        samples, held = pairs[:, start - 1], None
        while samples.shape[1] < NGRAM and torch.equal(samples[0], samples[1]):
            held = _prefix(cache, start) if held is None else held
            following = hidden(samples[:1, -patch_size:], None, None, held)[0, -1:]
            samples = torch.cat([samples, draw(following, 2)[:, 0]], dim=1)
        agree = (samples[0] == samples[1])[:NGRAM].cumprod(-1)
        scores[row, : len(agree)] -= agree.double()
    return scores


def _prefix(cache: KeyValueCache, steps: int) -> KeyValueCache:
    """Keys and values of the first steps of a text, with room for the rest of an n-gram."""
    room = (0, 0, 0, 0, 0, NGRAM)
    memory = {
        layer: (F.pad(keys[:, :steps], room), F.pad(values[:, :steps], room))
        for layer, (keys, values) in cache.key_value_memory_dict.items()
    }
    # Rows that are not together are padded to a fixed number, as the released code's are not.
    return KeyValueCache(memory, torch.tensor([steps]), together=True)


def decode(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Latents [N, S, l] -> their most likely tokens [N, S, K], from all logits."""
    tokens = autoencoder.decode(latents).argmax(-1)
    return tokens.view(*latents.shape[:2], -1)


def patch_sampler(draw: Draw, pool_size: int) -> Sampler:
    """Hidden states [n, d] -> the next patches at temperature 1/2, from all draws of all pools."""

    def sample(hidden: Tensor, rngs: list[np.random.Generator]) -> list[list[int]]:
        pools = draw(hidden, pool_size).cpu().numpy()
        patches = []
        for row, rng in enumerate(rngs):
            found = pool_candidates(pools[:, row], 2)
            chances = np.array(found.weights, dtype=float)
            chosen = int(rng.choice(len(chances), p=chances / chances.sum()))
            patches.append(list(found.patches[chosen]))
        return patches

    return sample
