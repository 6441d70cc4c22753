"""The content of a report in any format: headline, notes, and sections of text, plots, tables.

Everything is plain text; `reports.page` and `reports.markdown` format it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from calm_dist.reports.plots import Plot
from calm_dist.reports.tables import MISSING, Table, compact
from calm_dist.runs.records import CPU, Record, RecordedRun, conditions, first_of_kind
from calm_dist.scores import MARK_EXPLAINED, block_size_note, brier_text, brierlm_text


@dataclass(frozen=True)
class Fact:
    """A highlighted number, and the text next to it."""

    label: str
    value: str
    addition: str = ""
    details: tuple[str, ...] = ()
    """Additional lines below the number."""


@dataclass(frozen=True)
class ReportSection:
    """A part of the report under a heading."""

    title: str
    text: tuple[str, ...] = ()
    plots: tuple[Plot, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class Content:
    """A whole report."""

    title: str
    lead: str
    facts: tuple[Fact, ...]
    notes: tuple[str, ...]
    sections: tuple[ReportSection, ...]
    sources: tuple[str, ...]
    """The run directories."""


def headline(summary: dict[str, Any]) -> tuple[str, str, tuple[Fact, ...]]:
    """Title, a summary sentence, and the numbers behind it."""
    entries = summary["models"]
    calm, transformer = (first_of_kind(entries, kind) for kind in ("calm", "transformer"))
    if calm is None or transformer is None:
        absent = "CALM" if calm is None else "Transformer"
        lead = f"There is no {absent} among the runs to compare with."
        return "Trained models", lead, tuple(_score(entry) for entry in entries[:4])
    ratios = summary["comparison"]
    training, inference = ratios["train_flops_ours_ratio"], ratios["inference_flops_ratio"]
    released = ratios["train_flops_ratio"]
    spent = f"{training:.2f} times" if training is not None else "an unknown share of"
    lead = (
        f"{calm['name']} predicts {calm['patch_size']} tokens in one step. It was trained "
        f"with {spent} the FLOPs of {transformer['name']}"
        + (f" ({released:.2f} as the authors' code executes them)" if released is not None else "")
        + f", and needs {inference:.2f} times its FLOPs to generate a token."
    )
    total = ratios["train_flops_with_autoencoder_ours_ratio"]
    if total is not None:
        lead += (
            f" With the autoencoder's training and its pass over the text, it took {total:.2f} "
            "times the training FLOPs."
        )
    if ratios["brierlm_compares"] is False:
        lead += " Their last BrierLM were taken in different ways and are not comparable."
    control = first_of_kind(entries, "tokens")
    if control is not None:
        lead += (
            f" {control['name']} is the control: patches on the same backbone without latents, "
            "with tokens from a softmax."
        )
    facts = (
        _score(calm),
        _score(transformer),
        *([_score(control)] if control is not None else []),
        Fact(
            "training FLOPs, CALM / Transformer",
            _times(training),
            details=(f"as released {_times(released)}",),
        ),
        Fact("inference FLOPs, CALM / Transformer", _times(inference)),
    )
    return "Next patch against next token", lead, facts


def _score(entry: Record) -> Fact:
    """BrierLM with its standard error, or why there is none, and Brier-1 and Brier-2."""
    label = f"BrierLM, {entry['name']}"
    if entry["brierlm"] is None:
        return Fact(label, MISSING, "no score" if entry["evaluation"] else "not evaluated")
    value, _, error = brierlm_text(entry).partition(" ")
    details = tuple(f"Brier-{n} {brier_text(entry, n)}" for n in (1, 2))
    return Fact(label, value, error or "no standard error", details)


def _times(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}×"


def missing_and_incomparable(
    summary: dict[str, Any], models: Sequence[RecordedRun], autoencoder: RecordedRun | None
) -> tuple[str, ...]:
    """Notes to read before comparing: missing data of runs, and differences between them."""
    notes = []
    for run in (*models, *([autoencoder] if autoencoder else [])):
        notes += [f"{run.name}: {lack}" for lack in _lacks(run)]
    without_peak: dict[str, list[str]] = {}
    for entry in summary["models"]:
        if entry["flops_per_second_per_device"] and entry["mfu"] is None:
            device = {None: "an unknown device", CPU: "CPUs"}.get(entry["device"], entry["device"])
            without_peak.setdefault(device, []).append(entry["name"])
    notes += [
        f"No peak FLOP/s is known for {device}, hence no MFU of {', '.join(names)}; set it with "
        "--peak-tflops."
        for device, names in without_peak.items()
    ]
    if autoencoder is None:
        notes.append("No autoencoder run was given.")
    noisy = [
        entry["name"]
        for entry in summary["models"]
        if any(shown["noisy_brier"] for shown in (entry, *entry["evaluations"]))
    ]
    if noisy:
        notes.append(f"{MARK_EXPLAINED} ({', '.join(noisy)}).")
    evaluated = [run for run in models if run.evaluations]
    if len({conditions(run.last_evaluation) for run in evaluated}) > 1:
        notes.append(
            "The models' last evaluations used different data, block sizes or n-grams: these "
            "BrierLM are not comparable. In the plot, points that are not comparable are hollow."
        )
    tokens = {run.name: run.tokens_seen for run in models if run.tokens_seen}
    if len(set(tokens.values())) > 1:
        seen = ", ".join(f"{name} {compact(count)}" for name, count in tokens.items())
        notes.append(f"The models saw different amounts of text: {seen} tokens.")
    return tuple(notes)


def _lacks(run: RecordedRun) -> list[str]:
    """Data missing from a run's files."""
    lacks = list(run.damage)
    if not run.training:
        lacks.append("no training records in metrics.jsonl.")
    elif not run.evaluations:
        lacks.append("trained, but not evaluated.")
    elif run.last_evaluation["step"] != run.training[-1]["step"]:
        lacks.append(
            f"evaluated at step {run.last_evaluation['step']}, but trained to step "
            f"{run.training[-1]['step']}."
        )
    if run.ranks is None:
        lacks.append("environment.json does not give the number of processes: no cost.")
    elif run.device is None:
        lacks.append("environment.json does not give the device.")
    infinite = sum(record["loss"] is None for record in run.training)
    if infinite:
        lacks.append(f"{infinite} of {len(run.training)} records have a loss that is not finite.")
    if run.training and run.training_seconds is None:
        lacks.append("not all training records have step_seconds: no cost.")
    sizes = [
        block_size_note(e["protocol"]["block_size"], run.recipe.data.block_size, e["step"])
        for e in run.evaluations
        if e.get("protocol")
    ]
    lacks += [f"{note}." for note in dict.fromkeys(filter(None, sizes))]
    reason = run.last_evaluation.get("stderr_undefined")
    if reason:
        lacks.append(f"BrierLM has no standard error ({reason}).")
    return lacks
