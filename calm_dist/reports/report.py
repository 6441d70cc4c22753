"""The report of a whole experiment: report.json for programs, index.html for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calm_dist.errors import UserError
from calm_dist.reports.page import render_page
from calm_dist.reports.runs import Run, first_of_kind, read_run

AUTOENCODER_FACTS = (
    "token_accuracy",
    "token_accuracy_mean",
    "collapsed_dims",
    "latent_size",
    "mean_std",
)
EVALUATION_FACTS = (
    "step",
    "checkpoint",
    "protocol",
    "data_fingerprint",
    "seed",
    "stderr_undefined",
    "cross_entropy",
    "perplexity",
    "energy_loss",
    "reconstruction_accuracy",
)


def write_report(
    runs: Sequence[str | Path], out: str | Path, autoencoder: str | Path | None = None
) -> dict[str, Any]:
    """Read run directories and write ``out/report.json`` and ``out/index.html``.

    Args:
        runs: run directories of CALMs and Transformers.
        out: where the report goes; made if absent.
        autoencoder: the autoencoder's run directory.

    Returns:
        What report.json holds (see `summarize`).

    Raises:
        UserError: a directory is no run, is of the wrong kind, or ``out`` cannot be written.
    """
    models = [read_run(path) for path in runs]
    for run in models:
        if run.kind == "autoencoder":
            raise UserError(f"{run.path}: an autoencoder's run; give it with --autoencoder")
    autoencoder_run = read_run(autoencoder) if autoencoder is not None else None
    if autoencoder_run is not None and autoencoder_run.kind != "autoencoder":
        raise UserError(f"{autoencoder_run.path}: a {autoencoder_run.kind}; give it with --run")
    summary = summarize(models, autoencoder_run)
    page = render_page(summary, models, autoencoder_run)
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        (out / "index.html").write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error.strerror})") from error
    return summary


def summarize(models: Sequence[Run], autoencoder: Run | None) -> dict[str, Any]:
    """The content of report.json. What a run lacks is null.

    ``autoencoder``: the last evaluation of its run. ``models``: one entry a run;
    ``train_flops`` = FLOPs per token of `calm_dist.flops` (as the released code executes them) x
    measured tokens. ``comparison``: the first CALM over the first Transformer.
    """
    entries = [_model_entry(run) for run in models]
    return {
        "autoencoder": _autoencoder_entry(autoencoder),
        "models": entries,
        "comparison": _comparison(entries),
    }


def _autoencoder_entry(run: Run | None) -> dict[str, Any]:
    evaluation = run.last_evaluation if run is not None else {}
    entry: dict[str, Any] = {name: evaluation.get(name) for name in AUTOENCODER_FACTS}
    entry["step"] = evaluation.get("step")
    entry["parameters"] = run.counts().parameters if run is not None else None
    return entry


def _model_entry(run: Run) -> dict[str, Any]:
    counts, evaluation, recipe = run.counts(), run.last_evaluation, run.recipe
    return {
        "name": run.name,
        "kind": run.kind,
        "patch_size": recipe.model.patch_size,
        "parameters": counts.parameters,
        "train_flops": counts.train_flops if run.tokens_seen is not None else None,
        "inference_flops_per_token": counts.inference_flops_per_token,
        "tokens_seen": run.tokens_seen,
        "brierlm": evaluation.get("brierlm"),
        "brierlm_stderr": evaluation.get("brierlm_stderr"),
        "brier": evaluation.get("brier"),
        "layout": {
            "tensor": recipe.parallel.tensor_parallel_size,
            "pipeline": recipe.parallel.pipeline_parallel_size,
            "data": recipe.data_parallel_size,
            # The Transformer has no head, so no DeepSpeed engine: nothing is partitioned.
            "zero_stage": recipe.parallel.zero_stage if run.kind == "calm" else 0,
        },
        "tokens_per_second": run.tokens_per_second,
        "evaluation": {name: evaluation[name] for name in EVALUATION_FACTS if name in evaluation},
    }


def _comparison(entries: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """FLOPs of the first CALM over those of the first Transformer."""
    calm, transformer = (first_of_kind(entries, kind) for kind in ("calm", "transformer"))
    return {
        "train_flops_ratio": _ratio(calm, transformer, "train_flops"),
        "inference_flops_ratio": _ratio(calm, transformer, "inference_flops_per_token"),
    }


def _ratio(
    calm: dict[str, Any] | None, transformer: dict[str, Any] | None, name: str
) -> float | None:
    if calm is None or transformer is None or calm[name] is None or not transformer[name]:
        return None
    return calm[name] / transformer[name]
