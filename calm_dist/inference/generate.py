"""Continue prompts with a CALM or with the discrete Transformer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args, overload

import numpy as np
import torch

from calm_dist.data.store import read_meta
from calm_dist.errors import CheckpointError, DataError, UserError, shown
from calm_dist.inference.contexts import Contexts, window_steps
from calm_dist.inference.growing import GrowingString, GrowingText
from calm_dist.inference.loading import LoadedModel, tokenizer_file
from calm_dist.inference.methods import Method, Sampler
from calm_dist.inference.patches import patch_sampler
from calm_dist.inference.sampling import DEFAULT_MAX_DRAWS, DEFAULT_POOL_SIZE
from calm_dist.inference.softmax import softmax_sampler
from calm_dist.progress import progress
from calm_dist.recipe import CalmModel
from calm_dist.released.config import stated_special_tokens
from calm_dist.released.files import CONFIG_FILE, RELEASED_CONFIG_FILE
from calm_dist.runs import checkpoints

if TYPE_CHECKING:
    from calm_dist.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Generation:
    """A continuation of a prompt."""

    text: str
    """The new text; appended to the prompt, it gives the whole text."""
    tokens: list[int]
    """The new tokens, without the end token."""
    stopped_by: Literal["end", "length", "stop"]
    """``end``: the model ended the text; ``length``: ``max_new_tokens`` was reached; ``stop``: the
    text contained a stop string, before which it is cut. The tokens then include the one that
    completed the string."""
    note: str | None = field(default=None, compare=False)
    """If prompt and text exceed the model's context: what it did not read."""


@overload
def generate(  # type: ignore[overload-overlap]  # a str is a Sequence[str], too
    model: LoadedModel,
    tokenizer: Tokenizer,
    prompts: str,
    *,
    temperature: float = ...,
    max_new_tokens: int = ...,
    seed: int | Sequence[int] = ...,
    method: Method = ...,
    pool_size: int = ...,
    max_draws: int = ...,
    stop: str | Sequence[str] = ...,
    reproducible: bool = ...,
    on_text: Callable[[int, str], None] | None = ...,
    show_progress: bool = ...,
) -> Generation: ...


@overload
def generate(
    model: LoadedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    temperature: float = ...,
    max_new_tokens: int = ...,
    seed: int | Sequence[int] = ...,
    method: Method = ...,
    pool_size: int = ...,
    max_draws: int = ...,
    stop: str | Sequence[str] = ...,
    reproducible: bool = ...,
    on_text: Callable[[int, str], None] | None = ...,
    show_progress: bool = ...,
) -> list[Generation]: ...


@torch.no_grad()
def generate(
    model: LoadedModel,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    *,
    temperature: float = 0.5,
    max_new_tokens: int = 128,
    seed: int | Sequence[int] = 0,
    method: Method = "auto",
    pool_size: int = DEFAULT_POOL_SIZE,
    max_draws: int = DEFAULT_MAX_DRAWS,
    stop: str | Sequence[str] = (),
    reproducible: bool = False,
    on_text: Callable[[int, str], None] | None = None,
    show_progress: bool = False,
) -> Generation | list[Generation]:
    """Continue prompts until the end token or exactly ``max_new_tokens`` new tokens.

    Begin tokens are prepended to a prompt, as to documents in training: for CALM 1..K of them, up
    to a multiple of K, for the Transformer one. If a prompt is longer than the model's window (its
    block less one step), only its newest part is read; a text that grows beyond the window
    continues from its newest half (see `Contexts`).

    The randomness of a text's n-th step depends only on its seed and n. A prompt gives the same
    text alone and in a batch up to rounding: a batch goes through the model together, and rounding
    can tip a draw between two tokens. The distribution is the same.

    Args:
        model: from `inference.load.load_model`.
        tokenizer: the one that the model was trained with.
        prompts: a prompt, or any number of prompts of any lengths, which run in one batch.
        temperature: for a model that draws latents in (0, 1], see `inference.sampling`; for a
            Transformer and a CALM with the tokens head, the temperature of each token's softmax, 0
            or more, where 0 takes the most likely token (ties: the lowest id).
        seed: at least 0: one for every prompt, or a sequence with one for each. Texts with equal
            seeds share their random numbers; for independent texts give each its own.
        method: CALM only. ``pool`` (T = 1/n), ``exact`` (any T), ``auto``: pool if T = 1/n, else
            exact. With the tokens head ``exact`` draws patches from P(patch)^(1/T) / Z, T in
            (0, 1], as CALM does; ``auto`` draws each token at T, like a Transformer; ``pool`` is
            refused.
        pool_size: number of draws in a pool.
        max_draws: limit of the exact method for one patch.
        stop: a string that ends a text where it appears in its continuation, or several.
        reproducible: give a prompt the same text alone and in a batch, bit for bit; slower.
        on_text: called with the number of a prompt and the next piece of its text, as soon as later
            tokens cannot change it; joined, the pieces of a prompt are its `Generation.text`.
        show_progress: report the number of finished steps on stderr.

    Returns:
        a `Generation`, or a list of them for a sequence of prompts.

    Raises:
        CheckpointError: the tokenizer is not the model's.
        UserError: an argument is out of range, or the exact method used up its draws.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    seeds = list(seed) if isinstance(seed, Sequence) else [seed] * len(texts)
    _check(texts, seeds, max_new_tokens)
    stop = [stop] if isinstance(stop, str) else list(stop)
    if method not in get_args(Method):
        raise UserError(f"method {method!r}: must be one of {', '.join(get_args(Method))}")
    if "" in stop:
        raise UserError("stop: an empty string; give the text that ends a continuation")
    check_tokenizer(model, tokenizer)
    sampler = (
        softmax_sampler(model, temperature, method, max_draws)
        if model.has_probabilities
        else patch_sampler(model, temperature, method, pool_size, max_draws)
    )
    rows = []
    for number, (text, of_text) in enumerate(zip(texts, seeds, strict=True)):
        row = GrowingText(tokenizer.encode(text), of_text)
        if stop or on_text:
            show = partial(on_text, number) if on_text else None
            row.string = GrowingString(tokenizer, text, row.prompt, stop, show)
        rows.append(row)
    if rows:
        continue_texts(
            model, rows, sampler, tokenizer, max_new_tokens,
            reproducible=reproducible, show_progress=show_progress,
        )  # fmt: skip
    generations = [
        Generation(
            _before(stop, tokenizer.decode_continuation(text, row.new, row.prompt)),
            row.new,
            row.stopped_by,
            # The end token counts as well.
            context_note(model, len(row.prompt), len(row.new) + (row.stopped_by == "end")),
        )
        for text, row in zip(texts, rows, strict=True)
    ]
    for row, made in zip(rows, generations, strict=True):
        if row.string is not None:
            row.string.finish(made.text)
    return generations[0] if isinstance(prompts, str) else generations


def _before(stop: Sequence[str], text: str) -> str:
    """The text before the first stop string in it."""
    places = [text.index(string) for string in stop if string in text]
    return text[: min(places, default=len(text))]


def context_note(model: LoadedModel, prompt_tokens: int, new_tokens: int) -> str | None:
    """What the model did not read of a prompt and its continuation, if anything."""
    size, block_size = model.recipe.model.patch_size, model.recipe.block_size
    window = window_steps(model) * size
    known = f"trained on blocks of {block_size} tokens"
    if model.step == 0:
        known = f"whose configuration has positions for {block_size} tokens"
    # With begin tokens; the last step is not read.
    filled = (prompt_tokens // size + 1) * size
    if prompt_tokens > window:
        begun = f"the prompt has {prompt_tokens} tokens, of which the last {window} are read"
    elif filled + (-(-new_tokens // size) - 1) * size > window:
        begun = f"the text outgrows the {window} tokens that are read at once"
    else:
        return None
    return f"{begun} by a model {known}; a longer text continues from its newest half"


def _check(prompts: list[str], seeds: list[int], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens {max_new_tokens}: must be at least 1")
    if len(seeds) != len(prompts):
        raise UserError(
            f"seed: {len(seeds)} seeds for {len(prompts)} prompts; give one, or one for each"
        )
    if min(seeds, default=0) < 0:
        raise UserError(f"seed {min(seeds)}: must be at least 0")
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"prompt {prompt!r}: character {error.start} is not valid Unicode; give UTF-8 text"
            ) from error


def continue_texts(
    model: LoadedModel,
    rows: list[GrowingText],
    sampler: Sampler,
    tokenizer: Tokenizer,
    max_new_tokens: int,
    *,
    reproducible: bool = False,
    show_progress: bool = False,
) -> None:
    """Extend all rows until each has stopped; stopped rows cost nothing more."""
    size = model.recipe.model.patch_size
    texts = [[tokenizer.begin_id] * (size - len(row.prompt) % size) + row.prompt for row in rows]
    most_steps = -(-max_new_tokens // size)
    contexts = Contexts(model, texts, most_steps, reproducible=reproducible)
    outputs = contexts.start()
    numbers: Iterable[int] = range(most_steps)
    if show_progress:
        unit = "patches" if model.kind == "calm" else "tokens"
        numbers = progress(numbers, most_steps, label="generate", unit=unit)
    for number in numbers:
        streams = [np.random.SeedSequence(row.seed, spawn_key=(number,)) for row in rows]
        rngs = list(map(np.random.default_rng, streams))
        if reproducible:
            # The rounding of a sampler may depend on the number of texts.
            steps = [sampler(outputs[[n]], [rng])[0] for n, rng in enumerate(rngs)]
        else:
            steps = sampler(outputs, rngs)
        going = [
            index
            for index, (row, step) in enumerate(zip(rows, steps, strict=True))
            if row.take(step, tokenizer.end_id, max_new_tokens)
        ]
        if not going:
            return
        rows = [rows[index] for index in going]
        outputs = contexts.extend(going, [steps[index] for index in going])


def calm_recipe(model: LoadedModel) -> CalmModel:
    """The ``model`` section of a CALM's recipe."""
    recipe = model.recipe.model
    assert isinstance(recipe, CalmModel)
    return recipe


def decode_latents(model: LoadedModel, latents: torch.Tensor) -> torch.Tensor:
    """The most likely tokens ``[n, K]`` of latents ``[n, l]``."""
    hidden = model.decoder.hidden(latents)
    return model.decoder.tokens(hidden.flatten(0, 1)).view(hidden.shape[:2])


def check_tokenizer(model: LoadedModel, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that the model was not trained with.

    A model that does not record its tokenizer accepts any that fits its vocabulary, which may be
    larger than the tokenizer's.

    Raises:
        CheckpointError: the fingerprint differs, or the tokenizer has more entries than the model.
    """
    trained_with = model.tokenizer_sha256
    if trained_with is not None and trained_with != tokenizer.fingerprint:
        raise CheckpointError(
            f"tokenizer {tokenizer.path}: sha256 {tokenizer.fingerprint[:12]}…, but "
            f"{model.checkpoint} was trained with {trained_with[:12]}…; give that one "
            "with --tokenizer"
        )
    vocab_size = model.recipe.model.vocab_size
    assert vocab_size is not None
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"tokenizer {tokenizer.path}: {tokenizer.vocab_size} entries, but {model.checkpoint} "
            f"has {vocab_size}; give the model's tokenizer with --tokenizer"
        )


def token_names(
    model: LoadedModel, begin_token: str | None = None, end_token: str | None = None
) -> tuple[str | int | None, str | int | None]:
    """The begin and end tokens that a model was trained with, for `load_tokenizer`: the names that
    it records; or the given ones; or the numbers that its released configuration states.

    Raises:
        CheckpointError: the given names differ from the model's.
    """
    data = model.recipe.data
    for role, given in (("begin", begin_token), ("end", end_token)):
        trained = getattr(data, f"{role}_token")
        if given is not None and trained not in (None, given):
            raise CheckpointError(
                f"--{role}-token {shown(given)}: {model.checkpoint} was trained with "
                f"{shown(trained)}; leave the option out"
            )
    begin_id, end_id = _stated_special_tokens(model)
    return data.begin_token or begin_token or begin_id, data.end_token or end_token or end_id


def _stated_special_tokens(model: LoadedModel) -> tuple[int | None, int | None]:
    """Begin and end token by the released configuration of a model, if it has one."""
    run = checkpoints.run_directory(model.checkpoint)
    for directory, name in ((model.checkpoint, CONFIG_FILE), (run, RELEASED_CONFIG_FILE)):
        if directory is not None and (directory / name).is_file():
            return stated_special_tokens(directory, name)
    return None, None


def find_tokenizer(model: LoadedModel) -> Path:
    """The tokenizer that a checkpoint's recipe names, or the copy in its run directory or store.

    Raises:
        DataError: none of them exists.
    """
    data = model.recipe.data
    if data.tokenizer is not None and Path(data.tokenizer).is_file():
        return Path(data.tokenizer)
    run = checkpoints.run_directory(model.checkpoint) or model.checkpoint
    candidates = [tokenizer_file(run)]
    # Only a store that is known to have the model's tokenizer: a model that was imported without
    # one names a store that its training may use.
    for source in data.sources if model.tokenizer_sha256 is not None else ():
        try:
            candidates.append(Path(source.path) / read_meta(source.path).tokenizer.file)
        except DataError:
            continue
    for candidate in candidates:
        if candidate is not None and candidate.is_file():
            return candidate
    raise DataError(
        f"data.tokenizer {data.tokenizer}: not found, and no copy in {run} or in data.path "
        f"{', '.join(source.path for source in data.sources)}; give the model's tokenizer with "
        "--tokenizer"
    )
