"""Analysis of several runs: comparable points, the Pareto front, correlations, MFU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from calm_dist.costs.flops import count_autoencoder, peak_flops
from calm_dist.runs.records import CPU, Record, RecordedRun, conditions
from calm_dist.scores import noisy_brier

MIN_CORRELATED = 3
"""Fewest points for which a correlation is computed."""


@dataclass(frozen=True)
class Point:
    """An evaluated checkpoint."""

    run: int
    """Position of the run among those of the report."""
    name: str
    step: int
    train_flops: float | None
    """As the released code executes them, over the tokens seen; None if those are unknown."""
    train_flops_ours: float | None
    """As this package executes them; plots and the Pareto front use these."""
    brierlm: float
    stderr: float | None
    cross_entropy: float | None
    comparable: bool
    """Whether it was taken under the `common_conditions`."""
    brier: list[float] | None = None
    brier_stderr: list[float] | None = None
    noisy_brier: list[int] = field(default_factory=list)
    """See `calm_dist.scores`."""

    @property
    def evaluation(self) -> Record:
        """Its scores in the form that `calm_dist.scores` formats."""
        return {
            "brierlm": self.brierlm,
            "brierlm_stderr": self.stderr,
            "brier": self.brier,
            "brier_stderr": self.brier_stderr,
        }


def common_conditions(models: Sequence[RecordedRun]) -> tuple[str, ...] | None:
    """The conditions of evaluation that most runs share; of several, those of the first run.

    None if no run was evaluated.
    """
    shared = Counter(
        condition
        for run in models
        for condition in dict.fromkeys(
            conditions(e) for e in reversed(run.evaluations) if e.get("brierlm") is not None
        )
    )
    return shared.most_common(1)[0][0] if shared else None


def compared_evaluations(models: Sequence[RecordedRun]) -> list[tuple[list[Record], bool]]:
    """For each run, the evaluations under the `common_conditions`, and True; for a run without any,
    those under the conditions of its last evaluation, and False."""
    wanted = common_conditions(models)
    found = []
    for run in models:
        scored = [e for e in run.evaluations if e.get("brierlm") is not None]
        alike = [e for e in scored if conditions(e) == wanted]
        found.append((alike or run.comparable_evaluations, bool(alike)))
    return found


def evaluated_points(models: Sequence[RecordedRun]) -> list[Point]:
    """The checkpoints of the `compared_evaluations`."""
    return [
        Point(
            number,
            run.name,
            e["step"],
            *_training_flops(run, e.get("tokens_seen")),
            e["brierlm"],
            e.get("brierlm_stderr"),
            e.get("cross_entropy"),
            comparable,
            e.get("brier"),
            e.get("brier_stderr"),
            noisy_brier(e),
        )
        for number, (run, (evaluations, comparable)) in enumerate(
            zip(models, compared_evaluations(models), strict=True)
        )
        for e in evaluations
    ]


def _training_flops(run: RecordedRun, tokens: int | None) -> tuple[float | None, float | None]:
    """As the released code and as this package execute them; None where the tokens are unknown."""
    if not tokens:
        return None, None
    counts = run.counts(tokens)
    return counts.train_flops, counts.train_flops_ours


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The comparable points that no other point beats with at most as many FLOPs, sorted by
    FLOPs."""
    front: list[Point] = []
    known = [p for p in points if p.comparable and p.train_flops_ours is not None]
    for point in sorted(known, key=lambda p: (p.train_flops_ours, -p.brierlm)):
        if not front or point.brierlm > front[-1].brierlm:
            front.append(point)
    return front


def correlation(points: Sequence[Point]) -> dict[str, Any]:
    """Pearson's and Spearman's correlation of cross entropy with BrierLM over comparable points.

    ``undefined`` is the reason if there is none, else None.
    """
    pairs = [
        (p.cross_entropy, p.brierlm) for p in points if p.comparable and p.cross_entropy is not None
    ]
    result: dict[str, Any] = {
        "points": len(pairs),
        "pearson": None,
        "spearman": None,
        "undefined": None,
    }
    if len(pairs) < MIN_CORRELATED:
        result["undefined"] = (
            f"{len(pairs)} evaluations have cross entropy and BrierLM; {MIN_CORRELATED} are needed"
        )
        return result
    entropies, scores = np.array(pairs, dtype=float).T
    if np.ptp(entropies) == 0 or np.ptp(scores) == 0:
        result["undefined"] = "all evaluations have the same value"
        return result
    result["pearson"], result["spearman"] = pearson_and_spearman(entropies, scores)
    return result


def pearson_and_spearman(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Both correlations of two vectors [n], n >= 2, neither of which is constant."""
    return _pearson(x, y), _pearson(_ranks(x), _ranks(y))


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values get the mean of their ranks."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[group]


def executed_flops_per_token(run: RecordedRun) -> float:
    """Training FLOPs that this package executes for a token, without recomputation; including the
    frozen encoder's if latents are computed on the fly."""
    flops, model = run.counts().train_flops_per_token_ours, run.recipe.model
    if model.kind == "calm" and model.has_latents and run.recipe.data.latents == "on_the_fly":
        flops += count_autoencoder(model, 0).part("encoder").forward_flops_per_token
    return flops


def training_totals(
    run: RecordedRun, autoencoder_train_flops: float | None
) -> dict[str, float | None]:
    """Total FLOPs of a training, including the autoencoder's; None if a part is unknown.

    ``encoding_flops`` are those of the frozen encoder over every token seen: exact on the fly and
    for stored latents that were read once, too many for latents that were read more often.

    Args:
        autoencoder_train_flops: FLOPs of the autoencoder's own training, if its run is known.
    """
    names = (
        "train_flops",
        "train_flops_ours",
        "head_flops_saved",
        "autoencoder_train_flops",
        "encoding_flops",
        "train_flops_with_autoencoder",
        "train_flops_with_autoencoder_ours",
    )
    counts, model, tokens = run.counts(), run.recipe.model, run.tokens_seen
    if tokens is None:
        return dict.fromkeys(names)
    autoencoder, encoding = None, 0.0
    if model.kind == "transformer" or (model.kind == "calm" and not model.has_latents):
        autoencoder = 0.0
    elif model.kind == "calm":
        autoencoder = autoencoder_train_flops
        per_token = count_autoencoder(model, 0).part("encoder").forward_flops_per_token
        encoding = tokens * per_token
    released, ours = counts.train_flops, counts.train_flops_ours
    further = None if autoencoder is None else autoencoder + encoding
    totals = (None, None) if further is None else (released + further, ours + further)
    values = (released, ours, released - ours, autoencoder, encoding, *totals)
    return dict(zip(names, values, strict=True))


def efficiency(run: RecordedRun, peak_tflops: float | None) -> dict[str, Any]:
    """Throughput relative to the hardware's peak, and the cost of the run; None if unknown.

    Args:
        peak_tflops: peak of one device; default: from `costs.flops`, by the GPU's name.
    """
    ranks, device, rate = run.ranks, run.device, run.tokens_per_second
    peak = None if peak_tflops is None else peak_tflops * 1e12
    if peak is None and device is not None:
        peak = peak_flops(device, run.recipe.precision)
    achieved = rate * executed_flops_per_token(run) / ranks if rate and ranks else None
    seconds = run.training_seconds
    hours = ranks * seconds / 3600 if ranks and seconds is not None else None
    return {
        "device": device,
        "ranks": ranks,
        "flops_per_second_per_device": achieved,
        "peak_flops_per_second_per_device": peak,
        "mfu": achieved / peak if achieved is not None and peak else None,
        "training_seconds": seconds,
        "device_hours": hours,
        "gpu_hours": None if device in (CPU, None) else hours,
        "logged_steps": len(run.training),
    }
