"""Pairs for evaluation and generation: random weights whose samples agree or not, trained runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from calm_dist.benchmark import plain
from calm_dist.benchmark.compare import Pair
from calm_dist.benchmark.pairs import SMALL_VOCAB, random_model, zipf_tokens
from calm_dist.data.stream import open_store
from calm_dist.errors import UserError
from calm_dist.evaluation.block_scores import (
    draw_latents,
    score_latent_block,
    score_softmax_block,
)
from calm_dist.evaluation.brier import ngram_starts
from calm_dist.evaluation.evaluate import check_store_fits
from calm_dist.inference.generate import continue_texts
from calm_dist.inference.growing import GrowingText
from calm_dist.inference.loading import LoadedModel, load_model
from calm_dist.inference.patches import patch_sampler
from calm_dist.recipe import Evaluation

_DEFAULT_DRAWS = Evaluation().samples
_POOL, _TEXTS, _PATCHES = 200, 8, 2
"""Draws of a pool, texts and new patches of a text in `sampling_pair`."""


def brier_pairs(device: torch.device) -> Iterator[Pair]:
    """Evaluation of one block: a Transformer, and CALMs with K=2 and K=4 from two draws of a patch.

    What both forms cost depends on how often two samples of a position agree, so each model is
    timed where all agree and where none do, and the Transformer at the rate of a trained one. With
    K=4 nothing is continued; there the recipes' default number of draws is timed, too.
    """
    for rate in (1.0, 0.2, None):
        model = random_model("transformer", 256, device)
        tokens = zipf_tokens(SMALL_VOCAB, 256, seed=1)
        if rate is not None:
            assert hasattr(model.backbone, "output_layer")
            factor = _factor_of_agreement(model.logits(tokens[None])[0], rate)
            model.backbone.output_layer.weight.data.mul_(factor)
        said = {1.0: "all agree", None: "none agree"}.get(rate, f"agree at a rate of {rate}")
        yield transformer_pair(model, tokens, f"Transformer, block 256, {said}")
    for patch_size, block_size, noise, said in (
        (2, 512, 0.0, ", all agree"),
        (2, 512, None, ", none agree"),
        (4, 1024, None, ""),
    ):
        model = random_model("calm", block_size, device, patch_size=patch_size, noise=noise)
        tokens = zipf_tokens(SMALL_VOCAB, block_size, seed=2)
        name = f"CALM K={patch_size}, block {block_size}{said}"
        yield calm_pair(model, tokens, name)
    yield calm_pair(model, tokens, f"{name}, ours with {_DEFAULT_DRAWS} draws", _DEFAULT_DRAWS)


def _factor_of_agreement(logits: Tensor, rate: float) -> float:
    """Factor of logits [T, V] at which two samples agree at this mean rate."""
    low, high = 1.0, 1e4
    if rate == 1.0:
        return high
    for _ in range(30):
        factor = (low * high) ** 0.5
        agreement = (factor * logits).softmax(-1).square().sum(-1).mean()
        low, high = (factor, high) if agreement < rate else (low, factor)
    return factor


def transformer_pair(model: LoadedModel, tokens: Tensor, name: str, stride: int = 1) -> Pair:
    """Brier scores and cross entropy of a Transformer on one block ``tokens`` [T]."""
    starts = ngram_starts(len(tokens), stride)
    on_device, at = tokens.to(model.device), starts.to(model.device)
    generator = torch.Generator(model.device).manual_seed(0)
    block = {"tokens": tokens.numpy()}
    # How many paths go on depends on the seed; the plain form draws anew in each turn, too.
    seeds = itertools.count()

    def ours() -> None:
        score_softmax_block(model, block, starts, samples=1, seed=next(seeds))

    def looped() -> None:
        plain.transformer_brier(model.logits, model.new_cache, on_device, at, generator)

    return _pair(f"evaluation, {name}", ours, looped, model, len(starts), {"block": len(tokens)})


def calm_pair(model: LoadedModel, tokens: Tensor, name: str, samples: int = 2) -> Pair:
    """Brier scores and losses of a CALM on one block ``tokens`` [T], from two draws of a patch, of
    which ours may make more."""
    assert model.autoencoder is not None
    autoencoder, size = model.autoencoder, model.recipe.model.patch_size
    starts = ngram_starts(len(tokens), size)
    on_device, at = tokens.to(model.device), starts.to(model.device) // size
    generator = torch.Generator().manual_seed(0)
    block = {"tokens": tokens.numpy()}
    seeds = itertools.count()

    def ours() -> None:
        score_latent_block(model, block, starts, samples=samples, seed=next(seeds))

    def looped() -> None:
        plain.calm_evaluation(
            model.hidden, model.new_cache, model.head, autoencoder, on_device, at, 2, generator
        )

    return _pair(f"evaluation, {name}", ours, looped, model, len(starts), {"block": len(tokens)})


def _pair(
    name: str,
    ours: Callable[[], None],
    looped: Callable[[], None],
    model: LoadedModel,
    starts: int,
    sizes: dict[str, Any],
) -> Pair:
    recipe = model.recipe.model
    sizes |= {"starts": starts, "vocabulary": recipe.vocab_size, "hidden": recipe.hidden_size}
    return Pair(name, ours, looped, starts, "starts", sizes)


def sampling_pairs(device: torch.device) -> Iterator[Pair]:
    """Generation at temperature 1/2 with a pool of 200, eight texts, two patches each."""
    # Either all draws are equal or none: random weights give nothing in between.
    for noise in (0.0, None):
        model = random_model("calm", 1024, device, patch_size=4, noise=noise)
        yield sampling_pair(model, zipf_tokens(SMALL_VOCAB, 16 * _TEXTS, seed=3).view(_TEXTS, -1))


def sampling_pair(model: LoadedModel, prompts: Tensor) -> Pair:
    """Generation at temperature 1/2 after ``prompts`` [texts, T]."""
    assert model.autoencoder is not None
    autoencoder, size = model.autoencoder, model.recipe.model.patch_size
    generator = torch.Generator().manual_seed(0)

    def drawn(hidden: Tensor, samples: int) -> Tensor:
        return plain.decode(autoencoder, draw_latents(model, hidden, samples, generator))

    def grow(sampler: Any) -> None:
        texts = [GrowingText(prompt, seed) for seed, prompt in enumerate(prompts.tolist())]
        ends = SimpleNamespace(begin_id=0, end_id=-1)
        continue_texts(model, texts, sampler, ends, size * _PATCHES)  # type: ignore[arg-type]

    pools = drawn(model.hidden(prompts)[:, -1], _POOL)  # [pool, texts, K]
    agree = float((pools[:, None] == pools[None]).all(-1).float().mean())
    return Pair(
        f"generation, draws agree at a rate of {agree:.2f}",
        lambda: grow(patch_sampler(model, 0.5, "pool", _POOL, _POOL)),
        lambda: grow(plain.patch_sampler(drawn, _POOL)),
        len(prompts) * _PATCHES * size,
        "tokens",
        {"texts": len(prompts), "pool": _POOL, "K": size, "agree": agree,
         "vocabulary": model.recipe.model.vocab_size},
    )  # fmt: skip


def pairs_of_runs(
    part: str, runs: Sequence[str], store: str, device: torch.device
) -> Iterator[Pair]:
    """Evaluation (``brier``) or generation (``sampling``) with trained models, on a block of a
    store.

    Raises:
        UserError: a run cannot be compared, or the blocks are too short to generate from; before
            any is timed.
        DataError: the store is not a run's.
    """
    blocks = open_store(store)
    tokens = torch.from_numpy(blocks[0]["tokens"].astype("int64"))
    models = [load_model(run, device=str(device)) for run in runs]
    for run, model in zip(runs, models, strict=True):
        check_store_fits(model, blocks.meta)
        if part == "sampling" and model.has_probabilities:
            raise UserError(f"{run}: draws no latents; give runs of a CALM with such a head")
        if model.kind == "calm" and model.has_probabilities:
            raise UserError(f"{run}: the released code has no tokens head to compare with")
    size = blocks.meta.patch_size
    length = min(64, len(tokens) // _TEXTS // size * size)
    if part == "sampling" and length == 0:
        raise UserError(
            f"--data {store}: blocks of {len(tokens)} tokens; {_TEXTS} prompts need at least "
            f"{_TEXTS * size}"
        )
    for run, model in zip(runs, models, strict=True):
        if part == "sampling":
            yield sampling_pair(model, tokens[: length * _TEXTS].view(_TEXTS, -1))
        else:
            pair = calm_pair if model.kind == "calm" else transformer_pair
            yield pair(model, tokens, f"{run}, block {len(tokens)}")
