"""The paper's Table 1 next to the same figures counted from the models' shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from calm_dist.costs import flops
from calm_dist.recipe import Recipe

PAPER_TOKENS = 500_000_000_000
"""Number of training tokens with which Table 1's figures agree; steps x batch is 5.243e11."""
AUTOENCODER_TOKENS = 30_000 * 2**19
"""Training tokens of the released autoencoder: 30,000 steps of 2^19."""
VOCAB_SIZE = 128_256
CONTEXT_STEPS = 2048
PAPER_PATCH_SIZE = 4
SWEPT_PATCH_SIZES = (1, 2, 8)
LATENT_SIZE_PER_TOKEN = 32
EXPLAINED = 0.02
"""Relative error up to which a count is considered to agree with Table 1."""
ROUNDING = {"train_flops": 0.05e20, "inference_flops_per_token": 0.05e8}
"""Half of the last digit that Table 1 prints."""
QUANTITIES = {"train_flops": "training", "inference_flops_per_token": "inference"}


@dataclass(frozen=True)
class PaperModel:
    """A model of the paper (arXiv 2510.27688) with Table 1's numbers, or our own CALM-S."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_mlp_layers: int | None = None
    """Blocks of the energy head; None for the discrete Transformer."""
    published: dict[str, float] | None = None
    brierlm: float | None = None
    """Published, with evaluation blocks of 8,192 tokens."""


def _published(parameters: float, train: float, inference: float) -> dict[str, float]:
    return {
        "parameters": parameters,
        "train_flops": train,
        "inference_flops_per_token": inference,
    }


PAPER_MODELS = (
    PaperModel("Transformer-S", 768, 2048, 12, None, _published(281e6, 6.6e20, 4.4e8), 6.05),
    PaperModel("Transformer-M", 1024, 2752, 16, None, _published(465e6, 11.9e20, 7.9e8), 7.07),
    PaperModel("Transformer-L", 1536, 4096, 16, None, _published(849e6, 22.5e20, 15.0e8), 8.98),
    PaperModel("CALM-S", 768, 2048, 12, 3),
    PaperModel("CALM-M", 1024, 2752, 16, 4, _published(371e6, 3.7e20, 2.9e8), 5.72),
    PaperModel("CALM-L", 1536, 4096, 16, 4, _published(735e6, 7.7e20, 4.6e8), 6.58),
    PaperModel("CALM-XL", 2560, 6880, 16, 4, _published(1.82e9, 19.5e20, 9.4e8), 8.53),
)


def compare_with_paper() -> dict[str, Any]:
    """Parameters and FLOPs of the paper's models and of a sweep over K, as plain values.

    ``models`` has one mapping per model, all over 5e11 training tokens with full attention:

    - ``train_flops``: executed by the released code; ``train_flops_ours``: executed by this
      package, ``head_flops_saved`` less.
    - ``train_flops_with_autoencoder``: including the training of the autoencoder and its encoding
      of every training token; ``train_flops_with_autoencoder_ours``: the same for this package.
    - ``inference_flops_per_token`` with a key-value cache, ``..._without_cache``.
    - ``causal``: the same counts with attention that skips masked steps.
    - ``relative_error``: counted / published - 1.

    ``headline`` compares CALM-M with Transformer-S, as the paper does. ``unexplained`` lists the
    counts that differ from Table 1 by more than `EXPLAINED` and by more than its rounding.
    """
    rows = [_row(model, model.name, PAPER_PATCH_SIZE) for model in PAPER_MODELS]
    rows += [
        _row(model, f"{model.name} (K={patch_size})", patch_size)
        for model in PAPER_MODELS
        if model.num_mlp_layers is not None
        for patch_size in SWEPT_PATCH_SIZES
    ]
    return {"models": rows, "headline": _headline(rows), "unexplained": unexplained(rows)}


def _headline(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """CALM-M over Transformer-S, counted and published."""
    by_name = {row["name"]: row for row in rows}
    calm, transformer = by_name["CALM-M"], by_name["Transformer-S"]
    ratios = {
        f"{key}_ratio": calm[key] / transformer[key]
        for key in (
            "train_flops",
            "train_flops_ours",
            "train_flops_with_autoencoder",
            "train_flops_with_autoencoder_ours",
            "inference_flops_per_token",
            "inference_flops_per_token_without_cache",
        )
    }
    published = {
        f"{key}_ratio": calm["published"][key] / transformer["published"][key] for key in QUANTITIES
    }
    return {**ratios, "published": published}


def unexplained(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The counts of ``rows`` that differ from Table 1 by more than `EXPLAINED` and its rounding."""
    return [
        {
            "model": row["name"],
            "quantity": key,
            "counted": row[key],
            "published": row["published"][key],
            "relative_error": row["relative_error"][key],
        }
        for row in rows
        if row["published"]
        for key in QUANTITIES
        if abs(row["relative_error"][key]) > EXPLAINED
        and abs(row[key] - row["published"][key]) > ROUNDING[key]
    ]


def format_comparison(comparison: dict[str, Any]) -> str:
    """`compare_with_paper` as text: Table 1, the totals, and the unexplained differences."""
    header = (
        f"{'model':<16} {'K':>2} {'parameters':>22} {'training, 1e20':>18} "
        f"{'inference, 1e8/token':>21} {'without cache':>14}"
    )
    lines = [header, "-" * len(header)]
    for row in comparison["models"]:
        lines.append(
            f"{row['name']:<16} {row['patch_size']:>2} "
            f"{_with_error(row, 'parameters', 1, ',.0f'):>22} "
            f"{_with_error(row, 'train_flops', 1e20):>18} "
            f"{_with_error(row, 'inference_flops_per_token', 1e8):>21} "
            f"{row['inference_flops_per_token_without_cache'] / 1e8:>14,.0f}"
        )
    header = (
        f"{'training, 1e20':<16} {'released':>9} {'+ autoencoder':>14} {'+ encoding':>11} "
        f"{'= total':>8} {'- cheaper head':>15} {'= ours':>7} {'released, causal':>17}"
    )
    lines += ["", header, "-" * len(header)]
    for row in comparison["models"]:
        numbers = (
            (9, row["train_flops"]),
            (14, row["autoencoder_train_flops"]),
            (11, row["corpus_encoding_flops"]),
            (8, row["train_flops_with_autoencoder"]),
            (15, row["head_flops_saved"]),
            (7, row["train_flops_with_autoencoder_ours"]),
            (17, row["causal"]["train_flops"]),
        )
        cells = " ".join(f"{value / 1e20:>{width}.2f}" for width, value in numbers)
        lines.append(f"{row['name']:<16} {cells}")
    return "\n".join([*lines, "", *_conclusions(comparison)])


def _conclusions(comparison: dict[str, Any]) -> list[str]:
    headline = comparison["headline"]
    published = headline["published"]
    fewer = {key: f"{1 - headline[key]:.0%}" for key in headline if key != "published"}
    lines = [
        f"{PAPER_TOKENS:.0e} training tokens; full attention, but in the last column. In brackets: "
        "against the paper's Table 1.",
        "released: as the authors' code executes it. cheaper head: its condition computed once for "
        "all samples.",
        f"The autoencoder trains on {AUTOENCODER_TOKENS:.3g} tokens and encodes every training "
        "token once.",
        "",
        f"CALM-M against Transformer-S: {fewer['train_flops_ratio']} fewer FLOPs in training "
        f"({fewer['train_flops_ours_ratio']} ours), "
        f"{fewer['inference_flops_per_token_ratio']} fewer in inference",
        f"(published: {1 - published['train_flops_ratio']:.0%} and "
        f"{1 - published['inference_flops_per_token_ratio']:.0%}). With autoencoder and encoding: "
        f"{fewer['train_flops_with_autoencoder_ratio']} fewer in training "
        f"({fewer['train_flops_with_autoencoder_ours_ratio']} ours).",
    ]
    if comparison["unexplained"]:
        lines += ["", "Unexplained (docs/flops.md says what was tried):"]
    return lines + [
        f"  {entry['model']} {QUANTITIES[entry['quantity']]}: counted {entry['counted']:.4g}, "
        f"published {entry['published']:.4g} ({entry['relative_error']:+.1%})"
        for entry in comparison["unexplained"]
    ]


def paper_recipe(model: PaperModel, patch_size: int = PAPER_PATCH_SIZE) -> Recipe:
    """A recipe with a paper model's shape; context and latents grow with K as in the paper."""
    shape: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": 16,
    }
    block_size = CONTEXT_STEPS
    if model.num_mlp_layers is None:
        shape["kind"] = "transformer"
    else:
        block_size *= patch_size
        shape |= {
            "kind": "calm",
            "patch_size": patch_size,
            "latent_size": LATENT_SIZE_PER_TOKEN * patch_size,
            "head": {"num_mlp_layers": model.num_mlp_layers},
        }
    return Recipe.from_dict(
        {
            "run": {"dir": model.name},
            "model": shape,
            "data": {"path": "none", "block_size": block_size},
            "training": {"steps": 1, "micro_batch_size": 1, "global_batch_size": 1},
        }
    )


def _row(model: PaperModel, name: str, patch_size: int) -> dict[str, Any]:
    recipe = paper_recipe(model, patch_size)
    counts = flops.count(recipe, PAPER_TOKENS)
    causal = flops.count(recipe, PAPER_TOKENS, causal=True)
    training, encoding = _autoencoder_cost(recipe)
    counted = {
        "parameters": counts.parameters,
        "train_flops": counts.train_flops,
        "inference_flops_per_token": counts.inference_flops_per_token,
    }
    published = model.published if patch_size == PAPER_PATCH_SIZE else None
    return {
        "name": name,
        "kind": recipe.model.kind,
        "patch_size": recipe.model.patch_size,
        "tokens": PAPER_TOKENS,
        **counted,
        "inference_flops_per_token_without_cache": counts.inference_flops_per_token_without_cache,
        "train_flops_ours": counts.train_flops_ours,
        "head_flops_saved": counts.train_flops - counts.train_flops_ours,
        "autoencoder_train_flops": training,
        "corpus_encoding_flops": encoding,
        "train_flops_with_autoencoder": counts.train_flops + training + encoding,
        "train_flops_with_autoencoder_ours": counts.train_flops_ours + training + encoding,
        "causal": {
            "train_flops": causal.train_flops,
            "train_flops_ours": causal.train_flops_ours,
            "inference_flops_per_token": causal.inference_flops_per_token,
            "inference_flops_per_token_without_cache": (
                causal.inference_flops_per_token_without_cache
            ),
        },
        "published": published,
        "relative_error": published
        and {key: counted[key] / value - 1 for key, value in published.items()},
    }


def _autoencoder_cost(recipe: Recipe) -> tuple[float, float]:
    """FLOPs of training the autoencoder, and of encoding every training token once."""
    if recipe.model.kind != "calm":
        return 0.0, 0.0
    counts = flops.count_autoencoder(recipe.model, AUTOENCODER_TOKENS)
    return counts.train_flops, counts.part("encoder").forward_flops_per_token * PAPER_TOKENS


def _with_error(row: dict[str, Any], key: str, unit: float, pattern: str = ".2f") -> str:
    error = row["relative_error"]
    return f"{row[key] / unit:{pattern}}" + (f" ({error[key]:+.1%})" if error else "")
