"""Held-out scores of a checkpoint: BrierLM with its standard error, and the training losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch

from calm_dist.errors import DataError, UserError
from calm_dist.evaluation.block_scores import (
    BlockScores,
    score_latent_block,
    score_softmax_block,
)
from calm_dist.evaluation.brier import NGRAM, Alignment, estimate_brierlm, ngram_starts
from calm_dist.inference.generate import calm_recipe
from calm_dist.progress import progress
from calm_dist.scores import (
    MARK_EXPLAINED,
    block_size_note,
    brier_text,
    brierlm_text,
    noisy_brier,
)

if TYPE_CHECKING:
    from calm_dist.data.store import StoreMeta
    from calm_dist.evaluation.text import Blocks
    from calm_dist.inference.loading import LoadedModel
    from calm_dist.recipe import Recipe

FURTHER = ("cross_entropy", "perplexity", "energy_loss", "reconstruction_accuracy")
"""Measures other than BrierLM that `table` shows if a result has them."""

_NO_RELEASED = (
    "no score of the released estimator, which needs two draws of latents: this model has "
    "probabilities, from which the score is computed"
)


@dataclass(frozen=True)
class EvaluationSettings:
    """How much of a store is scored, and how."""

    blocks: int | None = None
    """Number of blocks, evenly spaced over the store (neighbours share documents); None: all."""
    samples: int = 8
    """Independent draws for each position, at least 2."""
    seed: int = 0
    alignment: Alignment = "patch"
    """``patch``: n-grams begin where patches begin, as published. ``all``: they begin at every
    position from the second patch on; a CALM then runs once for each of the K ways to cut a block
    into patches."""
    alignment_stride: int | None = None
    """Transformer: the patch size of the CALM to compare with; None: the store's."""
    released_estimator: bool = False
    """CALM that draws latents: also estimate as the released code does, from two draws, with its
    product before the clamp."""

    def __post_init__(self) -> None:
        if self.blocks is not None and self.blocks < 1:
            raise UserError(f"blocks {self.blocks}: must be at least 1")
        if self.samples < 2:
            raise UserError(f"samples {self.samples}: the Brier score needs at least 2")
        if self.alignment not in get_args(Alignment):
            raise UserError(f"alignment {self.alignment}: must be one of {get_args(Alignment)}")
        if self.alignment_stride is not None and self.alignment_stride < 1:
            raise UserError(f"alignment_stride {self.alignment_stride}: must be at least 1")


def settings_of(
    recipe: Recipe,
    *,
    blocks: int | None = None,
    samples: int | None = None,
    seed: int | None = None,
    alignment: Alignment | None = None,
    alignment_stride: int | None = None,
    released_estimator: bool = False,
) -> EvaluationSettings:
    """The recipe's settings, overridden by the given arguments."""
    wanted = recipe.evaluation
    return EvaluationSettings(
        blocks=wanted.blocks if blocks is None else blocks,
        samples=wanted.samples if samples is None else samples,
        seed=wanted.seed if seed is None else seed,
        alignment=wanted.alignment if alignment is None else alignment,
        alignment_stride=alignment_stride,
        released_estimator=released_estimator,
    )


@torch.no_grad()
def evaluate(
    model: LoadedModel,
    store: Blocks,
    settings: EvaluationSettings,
    *,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Score a model on held-out blocks.

    Args:
        model: from `inference.load.load_model`.
        store: from `data.stream.open_store`, or `evaluation.text.TextBlocks`.
        settings: what is measured; repeated in the result's ``protocol``.
        show_progress: report the number of finished blocks on stderr.

    Returns:
        A JSON-able dict: kind, checkpoint, step, tokens_seen, brier [4], brier_stderr, brierlm,
        brierlm_stderr (None with the reason in stderr_undefined), noisy_brier (see
        `scores.noisy_brier`), released_estimator (if the settings ask for it: {brier [4], brierlm,
        samples}; released_estimator_note if the model has no draws of latents), block_size_note
        (see `scores.block_size_note`; absent if there is nothing to note), protocol,
        data_fingerprint, seed. The protocol is {block_size, trained_block_size (None for an
        imported model), patch_size, samples, alignment, blocks, positions, starts {first, last,
        stride, per_block}, estimator}, and for CALM the kind of its head.
        Transformer, and CALM with the tokens head: cross_entropy (nats per token, over all tokens
        of a block except those of the first step) and perplexity; the CALM also brierlm_of_samples,
        brier_of_samples and their standard errors, from draws as for any other CALM. Other CALM:
        energy_loss of the head's samples, and reconstruction_accuracy of the tokens from samples
        of their posterior and (reconstruction_accuracy_mean) from its mean, in at most 64 patches
        of a block.

    Raises:
        DataError: the store does not fit the checkpoint.
        UserError: the blocks are too short.
    """
    check_store_fits(model, store.meta)
    patch_size = settings.alignment_stride or store.meta.patch_size
    if model.kind == "calm":
        patch_size = calm_recipe(model).patch_size
    score_block: Callable[..., BlockScores] = score_softmax_block
    if not model.has_probabilities:
        score_block = partial(score_latent_block, released=settings.released_estimator)
    starts = ngram_starts(store.meta.block_size, patch_size, settings.alignment)
    if len(starts) == 0:
        raise UserError(
            f"data.block_size {store.meta.block_size}: too short for an n-gram of {NGRAM} tokens "
            f"after the first {patch_size}; use a store of longer blocks"
        )
    results = []
    numbers = _spaced(len(store), settings.blocks)
    shown = progress(numbers, len(numbers), label=f"evaluate step {model.step}", unit="blocks")
    for number in shown if show_progress else numbers:
        # A block's draws depend only on the seed and its number in the store.
        seed = int(np.random.SeedSequence([settings.seed, number]).generate_state(1)[0])
        results.append(score_block(model, store[number], starts, settings.samples, seed))
    protocol = {
        "block_size": store.meta.block_size,
        "trained_block_size": model.recipe.data.block_size if model.step > 0 else None,
        "patch_size": patch_size,
        "samples": settings.samples,
        "alignment": settings.alignment,
        "blocks": len(results),
        "positions": len(results) * len(starts),
        "starts": {
            "first": int(starts[0]),
            "last": int(starts[-1]),
            "stride": patch_size if settings.alignment == "patch" else 1,
            "per_block": len(starts),
        },
        **_estimator(model),
    }
    return _summary(model, store.meta, settings, protocol, results)


def _estimator(model: LoadedModel) -> dict[str, str]:
    """How the Brier-n were estimated."""
    exact = {"estimator": "softmax, collisions along sampled paths"}
    if model.kind != "calm":
        return exact
    recipe = calm_recipe(model)
    if model.has_probabilities:
        return {**exact, "head": recipe.head.kind}
    continued = ", continued where they agree" if recipe.patch_size < NGRAM else ""
    return {"estimator": f"all pairs of draws{continued}", "head": recipe.head.kind}


def _spaced(available: int, wanted: int | None) -> list[int]:
    """``wanted`` block numbers, evenly spaced, or all."""
    if wanted is None or wanted >= available:
        return list(range(available))
    return [number * available // wanted for number in range(wanted)]


def _summary(
    model: LoadedModel,
    meta: StoreMeta,
    settings: EvaluationSettings,
    protocol: dict[str, Any],
    results: list[BlockScores],
) -> dict[str, Any]:
    """The result dict of `evaluate` from the blocks' results."""
    scores = np.stack([result.brier.mean(0).cpu().numpy() for result in results])
    estimate = asdict(estimate_brierlm(scores, seed=settings.seed))
    undefined = estimate.pop("undefined")
    note = block_size_note(meta.block_size, model.recipe.data.block_size, model.step)
    means = {
        name: float(np.mean([result.means[name] for result in results]))
        for name in results[0].means
    }
    if "cross_entropy" in means:
        # No float holds the exponential of more than 709.
        entropy = means["cross_entropy"]
        means["perplexity"] = math.exp(entropy) if entropy < 709 else math.inf
    of_samples: dict[str, Any] = {}
    if results[0].brier_of_samples is not None:
        rows = [r.brier_of_samples.mean(0).cpu().numpy() for r in results]  # type: ignore[union-attr]
        drawn = asdict(estimate_brierlm(np.stack(rows), seed=settings.seed))
        of_samples = {f"{n}_of_samples": v for n, v in drawn.items() if n != "undefined"}
    return {
        "kind": model.kind,
        "checkpoint": str(model.checkpoint),
        "step": model.step,
        "tokens_seen": model.tokens_seen,
        **estimate,
        "noisy_brier": noisy_brier(estimate),
        **({"stderr_undefined": undefined} if undefined else {}),
        **means,
        **of_samples,
        **_as_released(settings, results),
        **({"block_size_note": note} if note else {}),
        "protocol": protocol,
        "data_fingerprint": meta.fingerprint,
        "seed": settings.seed,
    }


def _as_released(settings: EvaluationSettings, results: list[BlockScores]) -> dict[str, Any]:
    """The scores of the released script: Brier-n from two draws, and their product before it is
    clamped, so that two negative ones give a positive BrierLM. A note if the settings ask for them
    and the model draws no latents."""
    rows = [result.released.mean(0).numpy() for result in results if result.released is not None]
    if not rows:
        return {"released_estimator_note": _NO_RELEASED} if settings.released_estimator else {}
    brier = np.stack(rows).mean(0)
    score = 100 * max(float(brier.prod()), 0.0) ** (1 / NGRAM)
    return {"released_estimator": {"brier": brier.tolist(), "brierlm": score, "samples": 2}}


def check_store_fits(model: LoadedModel, meta: StoreMeta) -> None:
    """Refuse a store that was made for another tokenizer, autoencoder or patch size.

    The tokenizer of an imported checkpoint is unknown and not compared. The model's vocabulary may
    be larger than the store's: released models have a row that no token of their tokenizer uses.

    Raises:
        DataError: they differ; the message has both values.
    """
    facts: list[tuple[str, str | int | None, str | int | None]] = [
        ("tokenizer sha256", meta.tokenizer.sha256, model.tokenizer_sha256),
    ]
    for role in ("begin_token", "end_token"):
        # Stores of earlier versions do not contain the names.
        if (stored_name := getattr(meta.tokenizer, role)) is not None:
            facts.append((role, stored_name, getattr(model.recipe.data, role)))
    vocab_size = model.recipe.model.vocab_size
    assert vocab_size is not None
    if vocab_size < meta.vocab_size:
        facts.append(("vocab_size", meta.vocab_size, vocab_size))
    if model.kind == "calm":
        recipe = calm_recipe(model)
        facts.append(("patch_size", meta.patch_size, recipe.patch_size))
        if recipe.has_latents and meta.autoencoder is not None:
            facts.append(("autoencoder sha256", meta.autoencoder.sha256, model.autoencoder_sha256))
            facts.append(("latent_size", meta.latent_size, recipe.latent_size))
    for name, stored, trained in facts:
        if trained is not None and stored != trained:
            raise DataError(
                f"{name}: {stored} in the store, {trained} in {model.checkpoint}; evaluate on a "
                "store that was made with the checkpoint's own tokenizer and autoencoder"
            )


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The results as lines for the console; Brier-n times 100, ± one standard error."""
    heads = "".join(f"  {f'Brier-{n} x100':>12}" for n in range(1, NGRAM + 1))
    lines = [f"{'step':>8}  {'BrierLM':>13}{heads}  further"]
    for result in results:
        brier = "".join(f"  {brier_text(result, n):>12}" for n in range(1, NGRAM + 1))
        further = ", ".join(
            f"{name.removesuffix('_accuracy')} {result[name]:.4f}"
            for name in FURTHER
            if result.get(name) is not None
        )
        lines.append(f"{result['step']:>8}  {brierlm_text(result):>13}{brier}  {further}")
        if released := result.get("released_estimator"):
            four = ", ".join(f"{100 * value:.3f}" for value in released["brier"])
            lines.append(
                f"          released script: BrierLM {released['brierlm']:.3f} of Brier-n x100 "
                f"{four} (two draws, product before the clamp)"
            )
        if "released_estimator_note" in result:
            lines.append(f"          {result['released_estimator_note']}")
        if "stderr_undefined" in result:
            lines.append(f"          no standard error: {result['stderr_undefined']}")
    notes = (result.get("block_size_note") for result in results)
    lines += [f"warning: {note}" for note in dict.fromkeys(filter(None, notes))]
    if any(noisy_brier(result) for result in results):
        lines.append(MARK_EXPLAINED)
    return "\n".join(lines)
