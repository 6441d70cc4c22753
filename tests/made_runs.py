"""Run directories as a training leaves them, made up: recipe, environment and metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from calm_dist.recipe import Recipe

TOKENS_PER_STEP = 8 * 256
BACKBONE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MODELS: dict[str, dict[str, Any]] = {
    "calm": {
        "kind": "calm",
        "patch_size": 4,
        "latent_size": 32,
        "autoencoder_size": {"hidden_size": 64, "intermediate_size": 128},
        **BACKBONE,
    },
    "tokens": {"kind": "calm", "patch_size": 4, "head": {"kind": "tokens"}, **BACKBONE},
    "transformer": {"kind": "transformer", **BACKBONE},
    "autoencoder": {
        "kind": "autoencoder",
        "vocab_size": 512,
        "latent_size": 32,
        "hidden_size": 64,
        "intermediate_size": 128,
    },
}


H100 = {"world_size": 8, "gpu": "NVIDIA H100 80GB HBM3", "libraries": {"torch": "2.13.0"}}


def make_run(
    folder: Path,
    kind: str,
    records: list[dict[str, Any]],
    *,
    name: str | None = None,
    environment: dict[str, Any] | None = None,
) -> Path:
    parallel = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "world_size": 8}
    recipe = Recipe.from_dict(
        {
            "run": {"dir": str(folder), "name": name},
            "model": MODELS[kind],
            "data": {"path": "latents/train", "block_size": 256},
            "training": {"steps": 400, "micro_batch_size": 2, "global_batch_size": 8},
            "parallel": parallel if kind != "autoencoder" else {},
        }
    )
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    if environment is not None:
        (folder / "environment.json").write_text(json.dumps(environment))
    if records:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def training(step: int, loss: float = 1.0, rate: float = 1000.0) -> dict[str, Any]:
    tokens = step * TOKENS_PER_STEP
    record = {"step": step, "loss": loss, "tokens": tokens, "tokens_per_second": rate}
    return record | {"step_seconds": TOKENS_PER_STEP / rate, "skipped": 0}


def evaluation(step: int, brierlm: float, **changes: Any) -> dict[str, Any]:
    result = {
        "brierlm": brierlm,
        "brierlm_stderr": 0.1,
        "brier": [0.08, 0.02, 0.01, 0.005],
        "tokens_seen": step * TOKENS_PER_STEP,
        "data_fingerprint": "e" * 64,
        "protocol": {
            "block_size": 256,
            "patch_size": 4,
            "samples": 8,
            "alignment": "patch",
            "blocks": 32,
            "positions": 2016,
        },
        "seed": 0,
    }
    return {"step": step, "eval": {**result, **changes}}


def autoencoder_evaluation(step: int) -> dict[str, Any]:
    facts = {"token_accuracy": 1 - 1 / step, "token_accuracy_mean": 1 - 0.5 / step}
    kl = [3.0] * 29 + [0.01] * 3
    return {
        "step": step,
        "eval": facts | {"collapsed_dims": 3, "latent_size": 32, "kl_per_dim": kl, "mean_std": 0.3},
    }
