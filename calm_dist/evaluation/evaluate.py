"""Held-out scores of a checkpoint: BrierLM with its standard error, and the training losses."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from calm_dist.data.progress import progress
from calm_dist.errors import DataError, UserError
from calm_dist.evaluation.brier import (
    NGRAM,
    aligned_starts,
    estimate_brierlm,
    scores_from_draws,
    scores_from_softmax,
)
from calm_dist.evaluation.generate import calm_recipe, decode_latents
from calm_dist.losses.energy import energy_score
from calm_dist.training.metrics import METRICS_FILE, read_records

if TYPE_CHECKING:
    from calm_dist.data.store import StoreMeta
    from calm_dist.data.stream import Store
    from calm_dist.evaluation.load import LoadedModel
    from calm_dist.recipe import Recipe

FURTHER = ("cross_entropy", "perplexity", "energy_loss", "reconstruction_accuracy")
"""Measures besides BrierLM that `table` shows, where a result has them."""


@dataclass(frozen=True)
class EvaluationSettings:
    """How much of a store is scored, and how."""

    blocks: int | None = None
    """Blocks, evenly spaced over the store (neighbours share documents); None: all."""
    samples: int = 8
    """Independent draws for each position, at least 2."""
    seed: int = 0
    alignment_stride: int = 4
    """Transformer: n-grams begin at its multiples. CALM uses its own patch size."""

    def __post_init__(self) -> None:
        if self.blocks is not None and self.blocks < 1:
            raise UserError(f"blocks {self.blocks}: must be at least 1")
        if self.samples < 2:
            raise UserError(f"samples {self.samples}: the Brier score needs at least 2")
        if self.alignment_stride < 1:
            raise UserError(f"alignment_stride {self.alignment_stride}: must be at least 1")


def settings_of(
    recipe: Recipe,
    *,
    blocks: int | None = None,
    samples: int | None = None,
    seed: int | None = None,
    alignment_stride: int = 4,
) -> EvaluationSettings:
    """The settings that a recipe asks for, with what is given here instead of its values."""
    wanted = recipe.evaluation
    return EvaluationSettings(
        blocks=wanted.blocks if blocks is None else blocks,
        samples=wanted.samples if samples is None else samples,
        seed=wanted.seed if seed is None else seed,
        alignment_stride=alignment_stride,
    )


@dataclass(frozen=True)
class BlockResult:
    """The scores of one block."""

    brier: Tensor
    """Unbiased Brier-1..4 of each position, float64 ``[positions, 4]``."""
    means: dict[str, float]
    """Further measures, averaged over the block's equally many tokens or patches."""


@torch.no_grad()
def evaluate(
    model: LoadedModel,
    store: Store,
    settings: EvaluationSettings,
    *,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Score a model on held-out blocks.

    Args:
        model: from `evaluation.load.load_model`.
        store: from `data.stream.open_store`.
        settings: what is measured; the result's ``protocol`` repeats it.
        show_progress: report the blocks done on stderr.

    Returns:
        A JSON-able dict: kind, checkpoint, step, tokens_seen, brier [4], brier_stderr, brierlm,
        brierlm_stderr (None with the reason in stderr_undefined), protocol {block_size,
        patch_size, samples, alignment, blocks, positions}, data_fingerprint, seed. Transformer:
        cross_entropy (nats per token, all tokens of a block but the first) and perplexity. CALM:
        energy_loss, and reconstruction_accuracy of the tokens from their posterior's samples and
        (reconstruction_accuracy_mean) from its mean.

    Raises:
        DataError: the store does not fit the checkpoint.
        UserError: a patch is shorter than the longest n-gram, or the blocks are too short.
    """
    stride = settings.alignment_stride
    if model.kind == "calm":
        stride = calm_recipe(model).patch_size
    check_store(model, store.meta)
    block_size = store.meta.block_size
    starts = aligned_starts(block_size, stride)
    if model.kind == "calm" and stride < NGRAM:
        raise UserError(
            f"model.patch_size {stride}: BrierLM of a CALM needs patches of at least {NGRAM} "
            "tokens, since its n-grams lie inside one patch"
        )
    if len(starts) == 0:
        raise UserError(
            f"data.block_size {block_size}: too short for an n-gram of {NGRAM} tokens after the "
            f"first {stride}; use a store of longer blocks"
        )
    results = []
    numbers = _spaced(len(store), settings.blocks)
    shown = progress(numbers, len(numbers), label="evaluate", unit="blocks")
    for number in shown if show_progress else numbers:
        # A block's draws depend on nothing but the seed and its number in the store.
        seed = int(np.random.SeedSequence([settings.seed, number]).generate_state(1)[0])
        block = store[number]
        if model.kind == "calm":
            results.append(_score_calm_block(model, block, settings.samples, seed))
        else:
            tokens = torch.from_numpy(block["tokens"].astype(np.int64))
            results.append(_score_tokens(model, tokens, starts, settings.samples, seed))
    return _summary(model, store.meta, settings, stride, results)


def _spaced(available: int, wanted: int | None) -> list[int]:
    """``wanted`` block numbers, evenly spaced, or all."""
    if wanted is None or wanted >= available:
        return list(range(available))
    return [number * available // wanted for number in range(wanted)]


def _score_tokens(
    model: LoadedModel, tokens: Tensor, starts: Tensor, samples: int, seed: int
) -> BlockResult:
    result = scores_from_softmax(model.logits, tokens, starts, num_draws=samples, seed=seed)
    return BlockResult(result.scores, {"cross_entropy": float(result.nats.double().mean())})


def _score_calm_block(
    model: LoadedModel, block: Mapping[str, np.ndarray], samples: int, seed: int
) -> BlockResult:
    """Brier scores from ``samples`` draws of each patch but the first, and the held-out losses."""
    recipe = calm_recipe(model)
    tokens = torch.from_numpy(block["tokens"].astype(np.int64))
    patches = tokens.reshape(-1, recipe.patch_size)  # [P, K]
    hidden = model.hidden(tokens[None])[0, :-1]  # [P-1, d]
    mean, log_std = (part.to(hidden.device) for part in _posterior(model, block, tokens))

    generator = torch.Generator().manual_seed(seed)
    noise = model.head.draw_noise(generator, samples, len(hidden)).to(hidden)
    latents = model.head.sample(hidden, noise)  # [samples, P-1, l]
    draws = decode_latents(model, latents.flatten(0, 1)).reshape(samples, len(hidden), -1)
    target = patches[1:, :NGRAM].to(draws.device)
    score = energy_score(
        latents[: recipe.head.num_samples],
        mean[1:],
        log_std[1:],
        beta=recipe.head.beta,
        num_draws=recipe.head.posterior_samples,
        seed=seed,
    )
    posterior_noise = torch.randn(mean.shape, generator=generator).to(mean)
    rebuilt = decode_latents(model, mean + posterior_noise * log_std.exp())
    rebuilt_mean = decode_latents(model, mean)
    means = {
        "energy_loss": -float(score.double().mean()),
        "reconstruction_accuracy": _share_equal(rebuilt, patches),
        "reconstruction_accuracy_mean": _share_equal(rebuilt_mean, patches),
    }
    return BlockResult(scores_from_draws(draws[..., :NGRAM], target), means)


def _posterior(
    model: LoadedModel, block: Mapping[str, np.ndarray], tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and log_std ``[P, l]``: as stored, or encoded now where the store has tokens only."""
    if "mean" in block:
        stored = [torch.from_numpy(block[name].astype(np.float32)) for name in ("mean", "log_std")]
        return stored[0], stored[1]
    assert model.autoencoder is not None
    mean, log_std = model.autoencoder.encode(tokens[None].to(model.device))
    return mean[0], log_std[0]


def _share_equal(left: Tensor, right: Tensor) -> float:
    return float((left == right.to(left.device)).double().mean())


def _summary(
    model: LoadedModel,
    meta: StoreMeta,
    settings: EvaluationSettings,
    stride: int,
    results: list[BlockResult],
) -> dict[str, Any]:
    """The result dict of `evaluate` from the blocks' results."""
    scores = np.stack([result.brier.mean(0).cpu().numpy() for result in results])
    estimate = asdict(estimate_brierlm(scores, seed=settings.seed))
    undefined = estimate.pop("undefined")
    means = {
        name: float(np.mean([result.means[name] for result in results]))
        for name in results[0].means
    }
    if "cross_entropy" in means:
        means["perplexity"] = math.exp(means["cross_entropy"])
    return {
        "kind": model.kind,
        "checkpoint": str(model.checkpoint),
        "step": model.step,
        "tokens_seen": model.tokens_seen,
        **estimate,
        **({"stderr_undefined": undefined} if undefined else {}),
        **means,
        "protocol": {
            "block_size": meta.block_size,
            "patch_size": stride,
            "samples": settings.samples,
            "alignment": "patch",
            "blocks": len(results),
            "positions": sum(len(result.brier) for result in results),
        },
        "data_fingerprint": meta.fingerprint,
        "seed": settings.seed,
    }


def check_store(model: LoadedModel, meta: StoreMeta) -> None:
    """Refuse a store that was made for another tokenizer, autoencoder or patch size.

    Raises:
        DataError: naming both values.
    """
    facts: list[tuple[str, str | int | None, str | int | None]] = [
        ("tokenizer sha256", meta.tokenizer.sha256, model.tokenizer_sha256),
        ("vocab_size", meta.vocab_size, model.recipe.model.vocab_size),
    ]
    if model.kind == "calm":
        recipe = calm_recipe(model)
        facts.append(("patch_size", meta.patch_size, recipe.patch_size))
        if meta.autoencoder is not None:
            facts.append(("autoencoder sha256", meta.autoencoder.sha256, model.autoencoder_sha256))
            facts.append(("latent_size", meta.latent_size, recipe.latent_size))
    for name, stored, trained in facts:
        if trained is not None and stored != trained:
            raise DataError(
                f"{name}: {stored} in the store, {trained} in {model.checkpoint}; evaluate on a "
                "store that was made with the checkpoint's own tokenizer and autoencoder"
            )


def run_directory(checkpoint: Path) -> Path | None:
    """The run directory that a step directory lies in, or None where it stands alone."""
    run = checkpoint.resolve().parent.parent
    is_run = checkpoint.resolve().parent.name == "checkpoints" and (run / "recipe.yaml").is_file()
    return run if is_run else None


def record(run: Path, result: Mapping[str, Any]) -> bool:
    """Append ``{"step", "eval"}`` to a run's metrics.jsonl.

    Returns:
        False where that step has been scored on the same data with the same protocol and seed.
    """
    if any(
        known["step"] == result["step"] and _same_measurement(known.get("eval"), result)
        for known in read_records(run)
    ):
        return False
    path = run / METRICS_FILE
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    with path.open("a", encoding="utf-8") as file:
        separator = "" if not text or text.endswith("\n") else "\n"
        file.write(separator + json.dumps({"step": result["step"], "eval": result}) + "\n")
    return True


def _same_measurement(known: Mapping[str, Any] | None, result: Mapping[str, Any]) -> bool:
    names = ("data_fingerprint", "protocol", "seed")
    return known is not None and all(known.get(name) == result[name] for name in names)


def table(results: Iterable[Mapping[str, Any]]) -> str:
    """The results as lines for the console."""
    lines = [
        f"{'step':>9}  {'BrierLM':>15}  {'Brier-1..4 (x100)':>27}  further",
    ]
    for result in results:
        stderr = result["brierlm_stderr"]
        error = f"± {stderr:.2f}" if stderr is not None else "± –"
        brier = " ".join(f"{100 * value:6.2f}" for value in result["brier"])
        further = ", ".join(
            f"{name} {result[name]:.4f}" for name in FURTHER if result.get(name) is not None
        )
        lines.append(
            f"{result['step']:>9}  {result['brierlm']:7.2f} {error:>7}  {brier}  {further}"
        )
        if "stderr_undefined" in result:
            lines.append(f"           no standard error: {result['stderr_undefined']}")
    return "\n".join(lines)
