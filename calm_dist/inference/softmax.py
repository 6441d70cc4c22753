"""Draw the next step of a text from probabilities: Transformer, and CALM with the tokens head.

For a patch, the temperature T can mean two things:

* it applies to each token, given those before it, as in a Transformer (`draw_tokens`);
* it applies to the patch as a whole, P(x)^(1/T) / Z, as in a CALM that draws latents
  (`draw_sharpened`).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from calm_dist.errors import UserError
from calm_dist.inference.loading import LoadedModel
from calm_dist.inference.methods import Method, Sampler
from calm_dist.inference.sampling import exponent_parts

_PROPOSALS_AT_ONCE = 64
_WORDS_OF_A_GROUP = 256
_COLDEST = 1e-30


def softmax_sampler(
    model: LoadedModel, temperature: float, method: Method, max_draws: int
) -> Sampler:
    """A function from outputs of the last steps [n, d] or [n, V] to the next token or patch of
    each.

    Raises:
        UserError: the model does not support the method, or not at this temperature.
    """
    if method == "pool" and model.kind == "calm":
        raise UserError(
            "method pool: is for samples of latents, but the tokens head knows its probabilities; "
            "use auto or exact"
        )
    if method == "exact" and model.kind == "calm":
        exponent_parts(temperature)

        def sample_patches(
            outputs: torch.Tensor, rngs: list[np.random.Generator]
        ) -> list[list[int]]:
            return [
                draw_sharpened(model, row, temperature, rng, max_draws)
                for row, rng in zip(outputs, rngs, strict=True)
            ]

        return sample_patches
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature {temperature:g}: must be 0 or a positive number")
    size = model.recipe.model.patch_size

    def sample(outputs: torch.Tensor, rngs: list[np.random.Generator]) -> list[list[int]]:
        uniform = torch.from_numpy(np.stack([rng.random(size) for rng in rngs]))
        return draw_tokens(model, outputs, temperature, uniform).tolist()

    return sample


def draw_tokens(
    model: LoadedModel, outputs: torch.Tensor, temperature: float, uniform: torch.Tensor
) -> torch.Tensor:
    """The next step of each row of outputs [n, ...], token by token from the softmax at T; [n, K].

    Temperature 0 takes the most likely token; ties go to the lowest id.

    Args:
        uniform: a number in [0, 1) for each token, fp64 [n, K].
    """
    uniform = uniform.to(outputs.device)
    tokens = torch.empty(len(outputs), 0, dtype=torch.long, device=outputs.device)
    for place in range(model.recipe.model.patch_size):
        logits = model.token_logits(outputs, tokens).float()
        drawn = (
            _first_largest(logits)
            if temperature == 0
            else draw_from_softmax(logits, temperature, uniform[:, place])
        )
        tokens = torch.cat([tokens, drawn[:, None]], dim=1)
    return tokens


def _first_largest(logits: torch.Tensor) -> torch.Tensor:
    """As arg-max, which may return any of equal values."""
    numbers = torch.arange(logits.shape[-1], device=logits.device)
    is_largest = logits == logits.amax(-1, keepdim=True)
    return torch.where(is_largest, numbers, logits.shape[-1]).amin(-1)


def draw_from_softmax(
    logits: torch.Tensor, temperature: float, uniform: torch.Tensor
) -> torch.Tensor:
    """Inverse of the cumulative softmax at T: logits fp32 [n, V], uniform fp64 [n] -> tokens [n].

    The words are cumulated in two levels, groups and the words of one group, so that fp64 is needed
    for a few hundred sums only: fp64 of all words takes several times as long, and fp32 sums of all
    words are too coarse for the least likely.
    """
    # Shift the largest logit to 0, so that no temperature gives an infinity; one below the smallest
    # number of fp32 would divide 0 by 0.
    shifted = (logits - logits.amax(-1, keepdim=True)) / max(temperature, _COLDEST)
    weights = F.pad(shifted.exp_(), (0, -logits.shape[-1] % _WORDS_OF_A_GROUP))
    groups = weights.unflatten(-1, (-1, _WORDS_OF_A_GROUP))
    bounds = groups.sum(-1).double().cumsum(-1)
    at = uniform[:, None] * bounds[:, -1:]
    group = _place(bounds, at)
    rows = torch.arange(len(logits), device=logits.device)
    inside = groups[rows, group].double().cumsum(-1)
    # The rest in the scale of the group's own sum, which rounds differently from its fp32 sum.
    end = bounds.gather(-1, group[:, None])
    start = torch.where(group[:, None] > 0, bounds.gather(-1, (group[:, None] - 1).clamp_min(0)), 0)
    share = (at - start) / (end - start)
    word = _place(inside, share * inside[:, -1:])
    return group * _WORDS_OF_A_GROUP + word


def _place(bounds: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """The first of the cumulated weights [n, b] above a number [n, 1]; [n].

    Numbers are less than the whole, up to rounding. right=True skips bounds equal to the number: a
    weight of 0 is never taken.
    """
    whole = bounds[:, -1:]
    below = torch.minimum(at, torch.nextafter(whole, torch.zeros_like(whole)))
    return torch.searchsorted(bounds, below, right=True)[:, 0]


def draw_sharpened(
    model: LoadedModel,
    outputs: torch.Tensor,
    temperature: float,
    rng: np.random.Generator,
    max_draws: int,
) -> list[int]:
    """One exact sample of a patch from P(x)^(1/T) / Z.

    Drawn token by token at T, a patch has the probability Π p_k^(1/T) / c_k, where c_k is the sum
    of p_k^(1/T) over the vocabulary given the tokens before. So the proposal is accepted with
    probability c_2 · ... · c_K, which is at most 1 for T <= 1; c_1 is the same for all patches.

    Raises:
        UserError: none of ``max_draws`` proposals was accepted.
    """
    made = 0
    while made < max_draws:
        count = min(1 if temperature == 1 else _PROPOSALS_AT_ONCE, max_draws - made)
        made += count
        same = outputs[None].expand(count, *outputs.shape)
        tokens = torch.empty(count, 0, dtype=torch.long)
        accept = torch.zeros(count, dtype=torch.float64)
        for place in range(model.recipe.model.patch_size):
            log_p = model.token_logits(same, tokens).double().cpu().log_softmax(-1) / temperature
            log_c = log_p.logsumexp(-1)
            if place > 0:
                accept += log_c
            bounds = (log_p - log_c[:, None]).exp().cumsum(-1)
            at = torch.from_numpy(rng.random((count, 1))) * bounds[:, -1:]
            # right=True skips bounds equal to the number: a token of probability 0 is never drawn.
            drawn = torch.searchsorted(bounds, at, right=True).clamp_(max=bounds.shape[-1] - 1)
            tokens = torch.cat([tokens, drawn], dim=1)
        accepted = np.log(rng.random(count)) < accept.numpy()
        if accepted.any():
            return tokens[int(accepted.argmax())].tolist()
    raise UserError(
        f"temperature {temperature:g}: no patch was accepted in {max_draws} draws (max_draws); "
        "raise the limit or the temperature, or use the method auto"
    )
