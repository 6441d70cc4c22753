"""The report's plots, by matplotlib: inline SVG for the page, PNG for everything else.

In SVG, the light colours become CSS variables of `reports.page`, so that plots follow the light or
dark scheme.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from calm_dist.costs.flops import Part
from calm_dist.reports.analysis import Point
from calm_dist.reports.tables import compact, power_of_ten
from calm_dist.runs.records import RecordedRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Palette:
    """Colours of a plot."""

    paper: str
    ink: str
    muted: str
    line: str
    series: tuple[str, ...]


LIGHT = Palette(
    "#fdfdfc",
    "#1d2126",
    "#5b656e",
    "#dcdfdd",
    ("#2367c9", "#c4551a", "#2c8a57", "#8a4fbf", "#96710a", "#12808f", "#c23d75"),
)
DARK = Palette(
    "#15181b",
    "#e7e9ea",
    "#9aa4ac",
    "#343a40",
    ("#74a9f5", "#f0935a", "#6cc796", "#c39af0", "#dfbb4a", "#5fcbd9", "#ef86b0"),
)
_CSS_VARIABLES = {
    LIGHT.ink: "var(--ink)",
    LIGHT.muted: "var(--muted)",
    LIGHT.line: "var(--line)",
    **{color: f"var(--series-{number})" for number, color in enumerate(LIGHT.series, 1)},
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
"""Parts of language models that cost FLOPs, in the order of data flow."""

Draw = Callable[["Axes", Palette], None]

_MARKERS = "osD^v"
_SMOOTHED_SHARE = 50
_DRAWN_POINTS = 1000
_LINE = 66
"""Number of characters that fit in a line of a legend."""
_NARROW = 200
"""A logarithmic axis with a smaller range than this has ticks between the powers of ten."""
_WIDTH = 5.2
_HEIGHT = 3.4


@dataclass(frozen=True)
class Plot:
    """One plot: file name, title, alternative text, and the function that draws it."""

    name: str
    title: str
    alternative: str
    draw: Draw
    rows: int = 0
    """Number of horizontal bars, which increase the height."""
    legend: tuple[str, ...] = ()
    """Entries of the legend below it."""

    def svg(self) -> str:
        """An ``<svg>`` element whose ids start with the plot's name, in the page's colours."""
        with _style():
            return _as_svg(self._figure, self.name)

    def png(self) -> bytes:
        """An image in light colours."""
        buffer = io.BytesIO()
        with _style():
            self._figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
        return buffer.getvalue()

    @cached_property
    def _figure(self) -> Figure:
        """Drawn, without a window system, and laid out, which takes as long as to write it."""
        from matplotlib.figure import Figure

        columns = _legend_columns(self)
        legend_rows = math.ceil(len(self.legend) / columns)
        height = (0.75 + 0.36 * self.rows if self.rows else _HEIGHT) + 0.22 * legend_rows
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axis = figure.subplots()
        self.draw(axis, LIGHT)
        if self.legend:
            handles, labels = axis.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=columns)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        return figure


def _legend_columns(plot: Plot) -> int:
    """Number of columns that fit."""
    longest = max(map(len, map(shortened, plot.legend)), default=1)
    return max(1, min(len(plot.legend), _LINE // (longest + 7), 3))


def shortened(name: str, longest: int = 40) -> str:
    """Shorten a name to fit a line of a plot by removing its middle. Dollar signs are escaped, so
    that matplotlib does not parse a formula."""
    half = longest // 2
    if len(name) > longest:
        name = f"{name[: half - 1]}…{name[-half:]}"
    return name.replace("$", r"\$")


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    style: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text: it takes the page's font and can be selected
        "font.size": 10,
        "figure.facecolor": LIGHT.paper,
        "axes.facecolor": "none",
        "axes.edgecolor": LIGHT.muted,
        "axes.labelcolor": LIGHT.ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": LIGHT.line,
        "grid.linewidth": 0.8,
        "text.color": LIGHT.ink,
        "xtick.color": LIGHT.muted,
        "ytick.color": LIGHT.muted,
        "legend.frameon": False,
        "legend.fontsize": 9.5,
        "lines.markersize": 5.5,
    }
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # A PNG shows boxes for characters that no local font has; the page uses the reader's fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _look(number: int, palette: Palette) -> dict[str, Any]:
    """Colour and marker of a run; markers change when colours repeat."""
    colors = palette.series
    return {
        "color": colors[number % len(colors)],
        "marker": _MARKERS[number // len(colors) % len(_MARKERS)],
    }


def brierlm_against_flops(points: Sequence[Point], front: Sequence[Point]) -> Draw:
    """BrierLM of every evaluated checkpoint over its training FLOPs, with standard errors.

    The Pareto front is dashed; points that are not comparable are hollow.
    """

    def draw(axis: Axes, palette: Palette) -> None:
        if len(front) > 1:
            edge = [(p.train_flops_ours or 0.0, p.brierlm) for p in front]
            axis.plot(
                *zip(*edge, strict=True),
                color=palette.muted,
                linestyle=(0, (4, 3)),
                linewidth=1.2,
                drawstyle="steps-post",
                label="Pareto front",
                zorder=1,
            )
        for number, name in _runs_of(points):
            own = [p for p in points if p.run == number and p.train_flops_ours]
            flops, scores = [p.train_flops_ours or 0.0 for p in own], [p.brierlm for p in own]
            look = _look(number, palette) | {"label": shortened(name)}
            if not all(p.comparable for p in own):
                look |= {"markerfacecolor": "none", "linestyle": ":"}
            # Not clipped, or points at 0 would be cut in half.
            axis.plot(flops, scores, **look, linewidth=1.5, clip_on=False, zorder=3)
            errors = [p.stderr or 0.0 for p in own]
            axis.errorbar(
                flops, scores, errors, color=look["color"], fmt="none", capsize=3, linewidth=1
            )
        label_brierlm_over_flops(axis)

    return draw


def label_brierlm_over_flops(axis: Axes) -> None:
    """Scales and labels of a plot of BrierLM over training FLOPs, once everything is drawn."""
    from matplotlib.ticker import LogLocator

    axis.set_xscale("log")
    low, high = axis.get_xlim()
    marks: tuple[float, ...] = (1.0, 2.0, 5.0) if high / low < _NARROW else (1.0,)
    if high / low < 10:
        marks = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    axis.xaxis.set_major_locator(LogLocator(subs=marks))
    axis.xaxis.set_major_formatter(lambda value, _: power_of_ten(value))
    axis.xaxis.set_minor_formatter("")
    axis.set_xlabel("training FLOPs")
    axis.set_ylabel("BrierLM")
    if axis.get_yscale() == "linear":
        axis.set_ylim(bottom=0)


def _runs_of(points: Sequence[Point]) -> list[tuple[int, str]]:
    return list(dict.fromkeys((p.run, p.name) for p in points if p.train_flops_ours))


def cross_entropy_against_brierlm(points: Sequence[Point]) -> Draw:
    """BrierLM over cross entropy of the evaluated checkpoints that have both."""

    def draw(axis: Axes, palette: Palette) -> None:
        for number, name in dict.fromkeys((p.run, p.name) for p in points):
            own = [p for p in points if p.run == number]
            look, scores = _look(number, palette), [p.brierlm for p in own]
            entropies, errors = (
                [p.cross_entropy or 0.0 for p in own],
                [p.stderr or 0.0 for p in own],
            )
            label = shortened(name)
            axis.plot(entropies, scores, **look, ls="none", clip_on=False, zorder=3, label=label)
            axis.errorbar(
                entropies, scores, errors, color=look["color"], fmt="none", capsize=3, linewidth=1
            )
        axis.set_xlabel("cross entropy, nats per token")
        axis.set_ylabel("BrierLM")
        axis.set_ylim(bottom=0)

    return draw


def flops_by_part(runs: Sequence[tuple[str, Sequence[Part]]], measure: str) -> Draw:
    """Stacked bars, one per run: FLOPs per token of each part; ``measure`` is a field of `Part`."""

    def draw(axis: Axes, palette: Palette) -> None:
        left, positions = np.zeros(len(runs)), np.arange(len(runs))
        for (part, label), color in zip(PART_NAMES.items(), palette.series, strict=True):
            widths = np.array(
                [sum(getattr(p, measure) for p in parts if p.name == part) for _, parts in runs]
            )
            if widths.any():
                axis.barh(positions, widths / 1e6, 0.62, left=left, color=color, label=label)
                left += widths / 1e6
        axis.set_yticks(positions, [shortened(name, 22) for name, _ in runs])
        axis.tick_params(axis="y", length=0, labelcolor=palette.ink)
        axis.invert_yaxis()
        axis.set_xlabel("million FLOPs per token")
        axis.grid(axis="y", visible=False)

    return draw


def shown_parts(runs: Sequence[tuple[str, Sequence[Part]]], measure: str) -> tuple[str, ...]:
    """The legend of `flops_by_part`."""
    costly = {p.name for _, parts in runs for p in parts if getattr(p, measure)}
    return tuple(label for name, label in PART_NAMES.items() if name in costly)


def curves(runs: Sequence[tuple[int, RecordedRun]], field: str, label: str, *, zero: bool) -> Draw:
    """A field of the training records over the tokens seen: logged steps faint, their running mean
    strong. ``runs`` are given with their position in the report."""

    def draw(axis: Axes, palette: Palette) -> None:
        for number, run in runs:
            records = [r for r in run.training if field in r]
            tokens = np.array([run.tokens_at(r) for r in records], dtype=float)
            values = np.array([r[field] for r in records], dtype=float)
            shown = slice(None, None, math.ceil(max(1, len(tokens)) / _DRAWN_POINTS))
            color = _look(number, palette)["color"]
            axis.plot(tokens[shown], values[shown], color=color, linewidth=0.7, alpha=0.3)
            axis.plot(
                tokens[shown],
                running_mean(values)[shown],
                color=color,
                linewidth=1.8,
                linestyle=("-", "--", ":")[number // len(palette.series) % 3],
                label=shortened(run.name),
            )
        axis.xaxis.set_major_formatter(lambda value, _: compact(value))
        axis.set_xlabel("training tokens")
        axis.set_ylabel(label)
        if zero:
            axis.yaxis.set_major_formatter(lambda value, _: compact(value))
            axis.set_ylim(bottom=0)

    return draw


def reconstruction_error(run: RecordedRun) -> Draw:
    """Token error of the autoencoder over training."""

    def draw(axis: Axes, palette: Palette) -> None:
        steps = [evaluation["step"] for evaluation in run.evaluations]
        for name, label, color in (
            ("token_accuracy", "sampled latent", palette.series[0]),
            ("token_accuracy_mean", "mean latent", palette.series[1]),
        ):
            errors = [100 * (1 - e[name]) if name in e else math.nan for e in run.evaluations]
            axis.plot(steps, errors, color=color, marker="o", markersize=4, label=label)
        axis.axhline(1.0, color=palette.muted, linewidth=1, linestyle="--", label="1%")
        axis.set_yscale("symlog", linthresh=0.1)
        axis.set_ylim(0, 110)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("step")
        axis.set_ylabel("% of held-out tokens")

    return draw


def information(divergences: Sequence[float]) -> Draw:
    """KL of each latent dimension, sorted."""

    def draw(axis: Axes, palette: Palette) -> None:
        values = sorted(divergences, reverse=True)
        axis.bar(range(1, len(values) + 1), values, 1.0, color=palette.series[0])
        axis.set_xlabel("latent dimension, sorted")
        axis.set_ylabel("KL, nats")
        axis.grid(axis="x", visible=False)

    return draw


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a window around each point, shorter at the ends."""
    half = max(1, len(values) // _SMOOTHED_SHARE)
    sums = np.concatenate([[0.0], np.nancumsum(values)])
    present = np.concatenate([[0], np.cumsum(~np.isnan(values))])
    index = np.arange(len(values))
    start, stop = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    number = present[stop] - present[start]
    # Leave a gap if all steps in the window were skipped.
    return np.where(number, (sums[stop] - sums[start]) / np.maximum(number, 1), np.nan)


def _as_svg(figure: Figure, name: str) -> str:
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Several figures share the page, so their ids must differ. Ids of groups are not referenced.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for color, variable in _CSS_VARIABLES.items():
        svg = svg.replace(color, variable)
    return svg
