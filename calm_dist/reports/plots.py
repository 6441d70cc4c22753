"""Plots as inline SVG that takes its colours from the page, so that it follows light and dark.

Matplotlib draws with placeholder colours; each becomes a CSS variable of `reports.page`.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from calm_dist.reports.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#010101", "#010102", "#010103"
SERIES = tuple(f"#0102{number:02d}" for number in range(1, 8))
CSS_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    **{color: f"var(--series-{number})" for number, color in enumerate(SERIES, 1)},
}

PART_NAMES = {
    "patch_compressor": "patch compressor",
    "attention": "attention",
    "mlp": "MLP",
    "head": "generative head",
    "output_layer": "output layer",
    "autoencoder_decoder": "autoencoder decoder",
    "autoencoder_output_layer": "autoencoder output layer",
}
"""Parts that cost FLOPs, in the order of data flow."""

_SMOOTHED_SHARE = 50
_DRAWN_POINTS = 2000
_NARROW = 200
"""A logarithmic axis of a smaller range than this has marks between the powers of ten."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it takes the page's font and can be selected
    "font.size": 11,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
}


def brierlm_against_flops(runs: Sequence[Run]) -> str:
    """BrierLM of every evaluated checkpoint over its training FLOPs, with standard errors."""
    from matplotlib.ticker import LogLocator

    with _figure(1, 1, 3.6) as (figure, axes):
        axis = axes[0]
        for run, color in zip(runs, _colors(runs), strict=True):
            points = [
                (run.counts(e["tokens_seen"]).train_flops, e["brierlm"], e.get("brierlm_stderr"))
                for e in run.comparable_evaluations
                if e.get("tokens_seen")
            ]
            if not points:
                continue
            flops, scores, errors = zip(*sorted(points), strict=True)
            axis.plot(flops, scores, color=color, linewidth=1.5, marker="o", label=run.name)
            known = [error if error is not None else 0.0 for error in errors]
            axis.errorbar(flops, scores, known, color=color, fmt="none", capsize=3, linewidth=1)
        axis.set_xscale("log")
        low, high = axis.get_xlim()
        marks = (1.0, 2.0, 5.0) if high / low < _NARROW else (1.0,)
        axis.xaxis.set_major_locator(LogLocator(subs=marks))
        axis.xaxis.set_major_formatter(_power_of_ten)
        axis.xaxis.set_minor_formatter("")
        axis.set_xlabel("training FLOPs")
        axis.set_ylabel("BrierLM")
        axis.set_ylim(bottom=0)
        axis.legend(loc="best")
        return _svg(figure, "brier")


def flops_by_part(runs: Sequence[Run]) -> str:
    """Stacked bars: FLOPs per token of each part, in training and in inference."""
    with _figure(1, 2, 1.5 + 0.5 * len(runs)) as (figure, axes):
        measures = ("train_flops_per_token", "inference_flops_per_token")
        for axis, measure, title in zip(axes, measures, ("Training", "Inference"), strict=True):
            _part_bars(axis, runs, measure)
            axis.set_title(title)
            axis.set_xlabel("million FLOPs per token")
            axis.grid(axis="y", visible=False)
        axes[1].set_yticklabels([])
        handles, labels = axes[1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=10)
        return _svg(figure, "parts")


def _part_bars(axis: Axes, runs: Sequence[Run], measure: str) -> None:
    costs = [{part.name: getattr(part, measure) for part in run.counts().parts} for run in runs]
    left = np.zeros(len(runs))
    for (part, label), color in zip(PART_NAMES.items(), SERIES, strict=True):
        widths = np.array([cost.get(part, 0.0) / 1e6 for cost in costs])
        axis.barh([run.name for run in runs], widths, 0.6, left=left, color=color, label=label)
        left += widths
    axis.invert_yaxis()


def loss_curves(runs: Sequence[Run]) -> str:
    """One panel a run: the loss of logged steps, and its running mean."""
    rows = math.ceil(len(runs) / 2)
    with _figure(rows, min(2, len(runs)), 2.8 * rows) as (figure, axes):
        for axis, run, color in zip(axes, runs, _colors(runs), strict=False):
            steps = np.array([record["step"] for record in run.training])
            losses = np.array([record["loss"] for record in run.training], dtype=float)
            shown = slice(None, None, math.ceil(len(steps) / _DRAWN_POINTS))
            axis.plot(steps[shown], losses[shown], color=color, linewidth=0.7, alpha=0.35)
            axis.plot(steps[shown], _running_mean(losses)[shown], color=color, linewidth=1.8)
            axis.set_title(run.name)
            axis.set_xlabel("step")
            axis.set_ylabel(loss_name(run))
        for axis in axes[len(runs) :]:
            axis.remove()
        return _svg(figure, "loss")


def loss_name(run: Run) -> str:
    """What a run's loss is, with its unit."""
    return {
        "calm": "energy loss",
        "transformer": "cross entropy (nats)",
        "autoencoder": "autoencoder loss",
    }[run.kind]


def reconstruction(run: Run) -> str:
    """Token error of the autoencoder over training, and KL of each latent dimension."""
    with _figure(1, 2, 2.9) as (figure, axes):
        steps = [evaluation["step"] for evaluation in run.evaluations]
        for name, label, color in (
            ("token_accuracy", "sampled latent", SERIES[0]),
            ("token_accuracy_mean", "mean latent", SERIES[1]),
        ):
            errors = [100 * (1 - e[name]) if name in e else math.nan for e in run.evaluations]
            axes[0].plot(steps, errors, color=color, marker="o", markersize=4, label=label)
        axes[0].axhline(1.0, color=MUTED, linewidth=1, linestyle="--")
        axes[0].set_yscale("symlog", linthresh=0.1)
        axes[0].set_ylim(0, 110)
        axes[0].yaxis.set_major_formatter("{x:g}")
        axes[0].set_title("Tokens not reconstructed")
        axes[0].set_xlabel("step")
        axes[0].set_ylabel("% of held-out tokens")
        axes[0].legend()
        divergences = sorted(run.last_evaluation.get("kl_per_dim") or [], reverse=True)
        axes[1].bar(range(1, len(divergences) + 1), divergences, 1.0, color=SERIES[0])
        axes[1].set_title("Information in each latent dimension")
        axes[1].set_xlabel("dimension, sorted")
        axes[1].set_ylabel("KL, nats")
        axes[1].grid(axis="x", visible=False)
        return _svg(figure, "autoencoder")


def _power_of_ten(value: float, _position: float) -> str:
    """2e12 -> 2×10¹², in characters that take the page's font."""
    digits, exponent = f"{value:.0e}".split("e")
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if digits == "1" else f"{digits}×{power}"


def _colors(runs: Sequence[Run]) -> list[str]:
    return [SERIES[number % len(SERIES)] for number in range(len(runs))]


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a window around each point, shorter at the ends."""
    half = max(1, len(values) // _SMOOTHED_SHARE)
    sums = np.concatenate([[0.0], np.nancumsum(values)])
    present = np.concatenate([[0], np.cumsum(~np.isnan(values))])
    index = np.arange(len(values))
    start, stop = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    number = present[stop] - present[start]
    # A gap where all steps were skipped.
    return np.where(number, (sums[stop] - sums[start]) / np.maximum(number, 1), np.nan)


@contextmanager
def _figure(rows: int, columns: int, height: float) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure without a window system, as wide as the page's column."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.6, height), layout="constrained")
        yield figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _svg(figure: Figure, name: str) -> str:
    """The figure as an ``<svg>`` element whose ids start with ``name``."""
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Several figures share the page: their ids must differ. Groups' ids are not referred to.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for color, variable in CSS_VARIABLES.items():
        svg = svg.replace(color, variable)
    return svg
