"""The paper's Table 1 beside the same figures counted from the models' shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from calm_dist import flops
from calm_dist.recipe import Recipe

PAPER_TOKENS = 500_000_000_000
"""Training tokens that Table 1's figures agree with; steps x batch is 5.243e11."""
VOCAB_SIZE = 128_256
CONTEXT_STEPS = 2048
PAPER_PATCH_SIZE = 4
SWEPT_PATCH_SIZES = (1, 2, 8)
LATENT_SIZE_PER_TOKEN = 32


@dataclass(frozen=True)
class PaperModel:
    """A model of the paper (arXiv 2510.27688), or CALM-S of our own, with Table 1's numbers."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_mlp_layers: int | None = None
    """Blocks of the energy head; None for the discrete Transformer."""
    published: dict[str, float] | None = None


def _published(parameters: float, train: float, inference: float) -> dict[str, float]:
    return {
        "parameters": parameters,
        "train_flops": train,
        "inference_flops_per_token": inference,
    }


PAPER_MODELS = (
    PaperModel("Transformer-S", 768, 2048, 12, None, _published(281e6, 6.6e20, 4.4e8)),
    PaperModel("Transformer-M", 1024, 2752, 16, None, _published(465e6, 11.9e20, 7.9e8)),
    PaperModel("Transformer-L", 1536, 4096, 16, None, _published(849e6, 22.5e20, 15.0e8)),
    PaperModel("CALM-S", 768, 2048, 12, 3),
    PaperModel("CALM-M", 1024, 2752, 16, 4, _published(371e6, 3.7e20, 2.9e8)),
    PaperModel("CALM-L", 1536, 4096, 16, 4, _published(735e6, 7.7e20, 4.6e8)),
    PaperModel("CALM-XL", 2560, 6880, 16, 4, _published(1.82e9, 19.5e20, 9.4e8)),
)


def compare_with_paper() -> dict[str, Any]:
    """Parameters and FLOPs of the paper's models and of a sweep over K, as plain values.

    ``models`` holds one mapping a model: ``train_flops`` is what the released code executes,
    ``train_flops_ours`` what this package does, ``relative_error`` is counted / published - 1.
    ``headline`` compares CALM-M with Transformer-S, as the paper does.
    """
    rows = [_row(model, model.name, PAPER_PATCH_SIZE) for model in PAPER_MODELS]
    rows += [
        _row(model, f"{model.name} (K={patch_size})", patch_size)
        for model in PAPER_MODELS
        if model.num_mlp_layers is not None
        for patch_size in SWEPT_PATCH_SIZES
    ]
    by_name = {row["name"]: row for row in rows}
    calm, transformer = by_name["CALM-M"], by_name["Transformer-S"]
    headline = {
        f"{key}_ratio": calm[key] / transformer[key]
        for key in ("train_flops", "train_flops_ours", "inference_flops_per_token")
    }
    return {"models": rows, "headline": headline}


def format_comparison(comparison: dict[str, Any]) -> str:
    """`compare_with_paper` as a text table; the difference to Table 1 in brackets."""
    header = (
        f"{'model':<16} {'K':>2} {'parameters':>14} {'train 1e20':>15} {'ours 1e20':>9} "
        f"{'inference 1e8/token':>19}"
    )
    lines = [header, "-" * len(header)]
    for row in comparison["models"]:
        lines.append(
            f"{row['name']:<16} {row['patch_size']:>2} {row['parameters']:>14,} "
            f"{_with_error(row, 'train_flops', 1e20):>15} {row['train_flops_ours'] / 1e20:>9.2f} "
            f"{_with_error(row, 'inference_flops_per_token', 1e8):>19}"
        )
    headline = comparison["headline"]
    lines += [
        "",
        f"{PAPER_TOKENS:.0e} training tokens; in brackets: against the paper's Table 1.",
        "train: as the released code executes it; ours: the head's condition computed once.",
        f"CALM-M against Transformer-S: {1 - headline['train_flops_ratio']:.0%} fewer FLOPs in "
        f"training ({1 - headline['train_flops_ours_ratio']:.0%} ours), "
        f"{1 - headline['inference_flops_per_token_ratio']:.0%} fewer in inference.",
        "Unexplained: the differences of CALM-L and CALM-XL in training and of CALM-XL in "
        "inference.",
    ]
    return "\n".join(lines)


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
        "train_flops_ours": counts.train_flops_ours,
        "published": published,
        "relative_error": published
        and {key: counted[key] / value - 1 for key, value in published.items()},
    }


def _with_error(row: dict[str, Any], key: str, unit: float) -> str:
    error = row["relative_error"]
    return f"{row[key] / unit:.2f}" + (f" ({error[key]:+.1%})" if error else "")
