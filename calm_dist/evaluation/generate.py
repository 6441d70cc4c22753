"""Continue a prompt with a CALM or with the discrete Transformer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from calm_dist.data.store import read_meta
from calm_dist.errors import CheckpointError, DataError, UserError
from calm_dist.evaluation.sampling import (
    DEFAULT_MAX_DRAWS,
    DEFAULT_POOL_SIZE,
    exponent_parts,
    sample_exact,
    sample_from_pool,
)
from calm_dist.recipe import CalmRecipe

if TYPE_CHECKING:
    from calm_dist.data.tokenizer import Tokenizer
    from calm_dist.evaluation.load import LoadedModel

Method = Literal["auto", "exact", "pool"]
Step = Callable[[list[int]], list[int]]
"""Token context -> the next tokens."""

_DECODED_AT_ONCE = 1 << 26
"""Elements of the decoder's logits that one call may make (256 MiB in fp32)."""


@dataclass(frozen=True)
class Generation:
    """A continuation of a prompt."""

    text: str
    """The new text, without the prompt."""
    tokens: list[int]
    """The new tokens, without the end token."""
    stopped_by: Literal["end", "length"]
    """``end``: the model ended the text; ``length``: ``max_new_tokens`` was reached."""


@torch.no_grad()
def generate(
    model: LoadedModel,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    temperature: float = 0.5,
    max_new_tokens: int = 128,
    seed: int = 0,
    method: Method = "auto",
    pool_size: int = DEFAULT_POOL_SIZE,
    max_draws: int = DEFAULT_MAX_DRAWS,
) -> Generation:
    """Continue ``prompt`` until the end token or exactly ``max_new_tokens`` new tokens.

    The prompt is left-filled with begin tokens, as documents are in training: for CALM with 1..K
    of them to a multiple of K, for the Transformer with one. A context longer than the block is
    cut from the left, for CALM at patch boundaries.

    Args:
        model: from `evaluation.load.load_model`.
        tokenizer: the one that the model was trained with.
        temperature: CALM: in (0, 1], see `evaluation.sampling`; Transformer: of the softmax, > 0.
        seed: of all draws; the same call gives the same text.
        method: CALM only. ``pool`` (T = 1/n), ``exact`` (any T), ``auto``: the pool where T = 1/n.
        pool_size: draws in a pool.
        max_draws: limit of the exact method for one patch.

    Raises:
        CheckpointError: the tokenizer is not the model's.
        UserError: an argument is out of range, or the exact method used up its draws.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens {max_new_tokens}: must be at least 1")
    check_tokenizer(model, tokenizer)
    if model.kind == "calm":
        patch_size = calm_recipe(model).patch_size
        step = _patch_step(model, temperature, method, pool_size, max_draws, seed)
    else:
        patch_size = 1
        step = _token_step(model, temperature, seed)

    prompt_ids = tokenizer.encode(prompt)
    fill = patch_size - len(prompt_ids) % patch_size
    context = [tokenizer.begin_id] * fill + prompt_ids
    # The last step of a block predicts nothing in training, so the context stays one step shorter.
    longest = model.recipe.block_size - patch_size
    new: list[int] = []
    while True:
        for token in step((context + new)[-longest:]):
            if token == tokenizer.end_id:
                return Generation(tokenizer.decode(new), new, "end")
            new.append(token)
            if len(new) == max_new_tokens:
                return Generation(tokenizer.decode(new), new, "length")


def _patch_step(
    model: LoadedModel,
    temperature: float,
    method: Method,
    pool_size: int,
    max_draws: int,
    seed: int,
) -> Step:
    """Context of whole patches -> the next patch."""
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    _, fraction = exponent_parts(temperature)
    exact = method == "exact" or (method == "auto" and fraction != 0)

    def step(context: list[int]) -> list[int]:
        # The context runs through the backbone once, however many draws follow.
        hidden = model.hidden(torch.tensor([context]))[0, -1:]  # [1, d]

        def draw(count: int) -> np.ndarray:
            latents = model.head.sample(
                hidden, model.head.draw_noise(generator, count, 1).to(hidden)
            )
            return decode_latents(model, latents[:, 0]).cpu().numpy()

        if exact:
            return list(sample_exact(draw, temperature, rng, max_draws=max_draws))
        return list(sample_from_pool(draw, temperature, rng, pool_size=pool_size))

    return step


def _token_step(model: LoadedModel, temperature: float, seed: int) -> Step:
    """Context -> the next token, drawn from the Transformer's softmax."""
    if not 0 < temperature < float("inf"):
        raise UserError(f"temperature {temperature:g}: must be a positive number")
    generator = torch.Generator().manual_seed(seed)

    def step(context: list[int]) -> list[int]:
        logits = model.logits(torch.tensor([context]))[0, -1].float().cpu()
        probabilities = (logits / temperature).softmax(-1)
        return [int(torch.multinomial(probabilities, 1, generator=generator))]

    return step


def calm_recipe(model: LoadedModel) -> CalmRecipe:
    """The ``model`` section of a CALM's recipe."""
    recipe = model.recipe.model
    assert isinstance(recipe, CalmRecipe)
    return recipe


def decode_latents(model: LoadedModel, latents: torch.Tensor) -> torch.Tensor:
    """The most likely tokens ``[n, K]`` of latents ``[n, l]``, in chunks that bound the memory."""
    recipe = calm_recipe(model)
    assert model.autoencoder is not None and recipe.vocab_size is not None
    at_once = max(1, _DECODED_AT_ONCE // (recipe.vocab_size * recipe.patch_size))
    patches = [
        model.autoencoder.decode(chunk[None])[0].argmax(-1).reshape(-1, recipe.patch_size)
        for chunk in latents.float().split(at_once)
    ]
    return torch.cat(patches)


def check_tokenizer(model: LoadedModel, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that the model was not trained with.

    Raises:
        CheckpointError: fingerprint or vocabulary size differ.
    """
    if model.tokenizer_sha256 != tokenizer.fingerprint:
        raise CheckpointError(
            f"tokenizer {tokenizer.path}: sha256 {tokenizer.fingerprint[:12]}…, but "
            f"{model.checkpoint} was trained with {model.tokenizer_sha256[:12]}…; give that one "
            "with --tokenizer"
        )
    if tokenizer.vocab_size != model.recipe.model.vocab_size:
        raise CheckpointError(
            f"tokenizer {tokenizer.path}: {tokenizer.vocab_size} entries, but {model.checkpoint} "
            f"has {model.recipe.model.vocab_size}; give the model's tokenizer with --tokenizer"
        )


def find_tokenizer(model: LoadedModel) -> Path:
    """The tokenizer file that a checkpoint's recipe names, or the copy in its data store.

    Raises:
        DataError: neither is there.
    """
    data = model.recipe.data
    if data.tokenizer is not None and Path(data.tokenizer).is_file():
        return Path(data.tokenizer)
    for source in data.sources:
        try:
            candidate = Path(source.path) / read_meta(source.path).tokenizer.file
        except DataError:
            continue
        if candidate.is_file():
            return candidate
    raise DataError(
        f"data.tokenizer {data.tokenizer}: not found, and no copy in data.path "
        f"{', '.join(source.path for source in data.sources)}; give the file with --tokenizer"
    )
