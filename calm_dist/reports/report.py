"""The report of runs: report.json for programs; index.html, report.md and plots for people."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from calm_dist.errors import UserError
from calm_dist.reports import sections
from calm_dist.reports.analysis import (
    correlation,
    efficiency,
    evaluated_points,
    pareto_front,
    training_totals,
)
from calm_dist.reports.content import Content, headline, missing_and_incomparable
from calm_dist.reports.inference import MeasuredInference, claims, inference_section
from calm_dist.reports.markdown import render_markdown
from calm_dist.reports.page import render_page
from calm_dist.runs.records import RecordedRun, conditions, first_of_kind, read_run
from calm_dist.scores import noisy_brier

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
    runs: Sequence[str | Path],
    out: str | Path,
    autoencoder: str | Path | None = None,
    peak_tflops: float | None = None,
) -> dict[str, Any]:
    """Read run directories and write ``out``: report.json, index.html, report.md, plots/*.png.

    Args:
        runs: run directories of CALMs and Transformers.
        out: directory of the report; created if absent.
        autoencoder: the autoencoder's run directory.
        peak_tflops: peak of one device; by default from the GPU's name.

    Returns:
        The contents of report.json (see `summarize`).

    Raises:
        UserError: a directory is not a run or is of the wrong kind, or ``out`` cannot be written.
    """
    models, autoencoder_run = read_runs(runs, autoencoder)
    summary = summarize(models, autoencoder_run, peak_tflops)
    write_files(summary, models, autoencoder_run, Path(out))
    return summary


def read_runs(
    runs: Sequence[str | Path], autoencoder: str | Path | None
) -> tuple[list[RecordedRun], RecordedRun | None]:
    """The models' runs, each once and with a unique name, and the autoencoder's.

    Raises:
        UserError: a directory is not a run, or is of the wrong kind.
    """
    # Shell patterns may give the same directory twice.
    once: dict[str, str | Path] = {}
    for path in runs:
        once.setdefault(os.path.realpath(path), path)
    models = [read_run(path) for path in once.values()]
    for run in models:
        if run.kind == "autoencoder":
            raise UserError(f"{run.path}: is an autoencoder's run; give it with --autoencoder")
    autoencoder_run = read_run(autoencoder) if autoencoder is not None else None
    if autoencoder_run is not None and autoencoder_run.kind != "autoencoder":
        raise UserError(f"{autoencoder_run.path}: is a {autoencoder_run.kind}; give it with --run")
    often = Counter(run.name for run in models)
    named = [
        replace(run, label=f"{run.name} ({run.path})") if often[run.name] > 1 else run
        for run in models
    ]
    return named, autoencoder_run


def write_files(
    summary: dict[str, Any],
    models: Sequence[RecordedRun],
    autoencoder: RecordedRun | None,
    out: Path,
) -> None:
    """Write the files of a report; see `write_report`."""
    try:
        (out / "plots").mkdir(parents=True, exist_ok=True)
        content = report_content(summary, models, autoencoder)
        page, words = render_page(content), render_markdown(content)
        for section in content.sections:
            for plot in section.plots:
                (out / "plots" / f"{plot.name}.png").write_bytes(plot.png())
        (out / "report.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        for name, text in (("report.md", words), ("index.html", page)):
            # Names of directories may not be valid UTF-8.
            (out / name).write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error.strerror})") from error


def report_content(
    summary: dict[str, Any], models: Sequence[RecordedRun], autoencoder: RecordedRun | None
) -> Content:
    """The content of a report's page and text."""
    title, lead, facts = headline(summary)
    points = evaluated_points(models)
    measured = summary["inference"]
    costs = [*summary["models"], *([summary["autoencoder"]] if autoencoder else [])]
    return Content(
        title,
        lead,
        facts,
        missing_and_incomparable(summary, models, autoencoder),
        (
            sections.models_section(summary["models"]),
            sections.brierlm_section(models, points, pareto_front(points)),
            sections.correlation_section(points, summary["correlation"]),
            sections.loss_section(models, autoencoder),
            sections.cost_section(models, autoencoder, costs),
            sections.flops_section(models, autoencoder, summary["models"]),
            sections.autoencoder_section(summary["autoencoder"], autoencoder),
            *([inference_section(MeasuredInference.model_validate(measured))] if measured else []),
        ),
        tuple(str(run.path) for run in (*models, *([autoencoder] if autoencoder else []))),
    )


def summarize(
    models: Sequence[RecordedRun],
    autoencoder: RecordedRun | None,
    peak_tflops: float | None = None,
    inference: MeasuredInference | None = None,
) -> dict[str, Any]:
    """The content of report.json. Missing values of a run are null.

    ``autoencoder``: the last evaluation of its run. ``models``: one entry a run;
    ``train_flops`` = FLOPs per token of `costs.flops` (as the released code executes them) x
    measured tokens. ``comparison``: the first CALM over the first Transformer. ``pareto_front``,
    ``correlation`` and totals: see `reports.analysis`. ``inference``: what was measured of
    generation, with `inference.claims`, or null.
    """
    points = evaluated_points(models)
    autoencoder_entry = _autoencoder_entry(autoencoder, peak_tflops)
    entries = [
        {
            **_model_entry(run),
            **training_totals(run, autoencoder_entry["train_flops"]),
            **efficiency(run, peak_tflops),
            "evaluations": [_plain(p) for p in points if p.run == number],
        }
        for number, run in enumerate(models)
    ]
    return {
        "autoencoder": autoencoder_entry,
        "models": entries,
        "comparison": _comparison(entries, models),
        "pareto_front": [_plain(point) for point in pareto_front(points)],
        "correlation": correlation(points),
        "inference": inference and {**inference.model_dump(), "claims": claims(inference)},
    }


def _plain(point: Any) -> dict[str, Any]:
    values = asdict(point)
    del values["run"]
    return values


def _autoencoder_entry(run: RecordedRun | None, peak_tflops: float | None) -> dict[str, Any]:
    evaluation = run.last_evaluation if run is not None else {}
    entry: dict[str, Any] = {name: evaluation.get(name) for name in AUTOENCODER_FACTS}
    entry["step"] = evaluation.get("step")
    counts = run.counts() if run is not None else None
    entry["parameters"] = counts and counts.parameters
    entry["train_flops"] = entry["encoding_flops_per_token"] = None
    if run is not None and counts is not None:
        entry["encoding_flops_per_token"] = counts.part("encoder").forward_flops_per_token
        entry["train_flops"] = counts.train_flops if run.tokens_seen is not None else None
        entry["tokens_per_second"] = run.tokens_per_second
        entry |= efficiency(run, peak_tflops)
    return entry


def _model_entry(run: RecordedRun) -> dict[str, Any]:
    counts, evaluation, recipe = run.counts(), run.last_evaluation, run.recipe
    return {
        "name": run.name,
        "kind": run.kind,
        "path": str(run.path),
        "patch_size": recipe.model.patch_size,
        "parameters": counts.parameters,
        "recomputed_flops_per_token": counts.recomputed_flops_per_token,
        "inference_flops_per_token": counts.inference_flops_per_token,
        "inference_flops_per_token_without_cache": counts.inference_flops_per_token_without_cache,
        "parts": [asdict(part) for part in counts.parts],
        "tokens_seen": run.tokens_seen,
        "brierlm": evaluation.get("brierlm"),
        "brierlm_stderr": evaluation.get("brierlm_stderr"),
        "brier": evaluation.get("brier"),
        "brier_stderr": evaluation.get("brier_stderr"),
        "noisy_brier": noisy_brier(evaluation),
        "layout": {
            "tensor": recipe.parallel.tensor_parallel_size,
            "pipeline": recipe.parallel.pipeline_parallel_size,
            "data": recipe.data_parallel_size,
            # The Transformer has no head, so no DeepSpeed engine: nothing is partitioned.
            "zero_stage": recipe.parallel.zero_stage if run.kind in ("calm", "tokens") else 0,
        },
        "precision": recipe.precision,
        "tokens_per_second": run.tokens_per_second,
        "loss": run.training[-1]["loss"] if run.training else None,
        "evaluation": {name: evaluation[name] for name in EVALUATION_FACTS if name in evaluation},
    }


def _comparison(
    entries: Sequence[dict[str, Any]], models: Sequence[RecordedRun]
) -> dict[str, float | bool | None]:
    """FLOPs of the first CALM over those of the first Transformer, and whether their last BrierLM
    are comparable (None if one has none); the control's FLOPs over the Transformer's."""
    calm, transformer, control = (
        first_of_kind(entries, kind) for kind in ("calm", "transformer", "tokens")
    )
    ways = {
        conditions(run.last_evaluation)
        for entry, run in zip(entries, models, strict=True)
        if entry is calm or entry is transformer
    }
    scored = all(entry and entry["brierlm"] is not None for entry in (calm, transformer))
    return {
        **{
            f"{name}_ratio": _ratio(calm, transformer, name)
            for name in (
                "train_flops",
                "train_flops_ours",
                "train_flops_with_autoencoder",
                "train_flops_with_autoencoder_ours",
            )
        },
        "inference_flops_ratio": _ratio(calm, transformer, "inference_flops_per_token"),
        "tokens_train_flops_ratio": _ratio(control, transformer, "train_flops"),
        "tokens_train_flops_ours_ratio": _ratio(control, transformer, "train_flops_ours"),
        "tokens_inference_flops_ratio": _ratio(control, transformer, "inference_flops_per_token"),
        "brierlm_compares": len(ways) == 1 if scored else None,
    }


def _ratio(
    calm: dict[str, Any] | None, transformer: dict[str, Any] | None, name: str
) -> float | None:
    if calm is None or transformer is None or calm[name] is None or not transformer[name]:
        return None
    return calm[name] / transformer[name]
