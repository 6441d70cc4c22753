"""Draw the next step of a text from probabilities: Transformer, and CALM with the tokens head.

For a patch, the temperature T can mean two things:

* it applies to each token, given those before it, as in a Transformer (`draw_tokens`);
* it applies to the patch as a whole, P(x)^(1/T) / Z, as in a CALM that draws latents
  (`draw_sharpened`).
"""

from __future__ import annotations

import numpy as np
import torch

from calm_dist.errors import UserError
from calm_dist.inference.load import LoadedModel
from calm_dist.inference.methods import Method, Sampler
from calm_dist.inference.sampling import exponent_parts

_PROPOSALS_AT_ONCE = 64


def softmax_sampler(
    model: LoadedModel, temperature: float, method: Method, max_draws: int
) -> Sampler:
    """A function from outputs of the last step [d] or [V] to the next token or patch.

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

        def sample_patch(outputs: torch.Tensor, rng: np.random.Generator) -> list[int]:
            return draw_sharpened(model, outputs, temperature, rng, max_draws)

        return sample_patch
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature {temperature:g}: must be 0 or a positive number")

    def sample(outputs: torch.Tensor, rng: np.random.Generator) -> list[int]:
        return draw_tokens(model, outputs[None], temperature, rng)[0].tolist()

    return sample


def draw_tokens(
    model: LoadedModel, outputs: torch.Tensor, temperature: float, rng: np.random.Generator
) -> torch.Tensor:
    """The next step of each row of outputs [n, ...], token by token from the softmax at T; [n, K].

    Temperature 0 takes the most likely token; ties go to the lowest id.
    """
    tokens = torch.empty(len(outputs), 0, dtype=torch.long)
    for _ in range(model.recipe.model.patch_size):
        logits = model.token_logits(outputs, tokens)
        drawn = [_draw(row, temperature, rng) for row in logits]
        tokens = torch.cat([tokens, torch.tensor(drawn)[:, None]], dim=1)
    return tokens


def _draw(logits: torch.Tensor, temperature: float, rng: np.random.Generator) -> int:
    if temperature == 0:
        # numpy's argmax is documented to take the first of equal values.
        return int(logits.float().cpu().numpy().argmax())
    # Shift the largest logit to 0, so that no temperature, however small, gives an infinity.
    scores = logits.double().cpu()
    chances = ((scores - scores.max()) / temperature).softmax(-1).numpy()
    return int(rng.choice(len(chances), p=chances))


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
