"""The tables and plots of a results page that show how scores grow with training FLOPs."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from calm_dist.reports.comparison_paper import PAPER_MODELS
from calm_dist.reports.plots import Palette, label_brierlm_over_flops
from calm_dist.reports.tables import Cell, Table, power_of_ten, text
from calm_dist.study.growth import Growth, Score, best_by_budget, crossing, fit, score
from calm_dist.study.result import Result, by_seed, label_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def growth_by_kind(results: Sequence[Result]) -> list[Growth]:
    """The growth of every kind of model among results that have scores.

    Raises:
        UserError: see `growth.fit`.
    """
    groups: dict[str, list[list[Result]]] = defaultdict(list)
    for group in by_seed([r for r in results if r.get("brierlm") is not None]).values():
        groups[label_of(group[0])].append(group)
    return [fit(label, best_by_budget(_scored(runs))) for label, runs in groups.items()]


def _scored(runs: list[list[Result]]) -> list[Score]:
    """Runs with one seed get the largest spread that the seeds of the other runs have."""
    known = [statistics.stdev([r["brierlm"] for r in g]) for g in runs if len(g) > 1]
    return [
        score(
            group[0]["train_flops"],
            [result["brierlm"] for result in group],
            group[0]["brierlm_stderr"] or 0.0,
            max(known, default=0.0),
        )
        for group in runs
    ]


def paper_growths() -> list[Growth]:
    """The paper's Transformers and CALMs, whose scores have no published errors."""
    groups: dict[str, list[Score]] = defaultdict(list)
    for model in PAPER_MODELS:
        if model.published is not None and model.brierlm is not None:
            kind = "paper, CALM" if model.num_mlp_layers else "paper, Transformer"
            groups[kind].append(Score(model.published["train_flops"], model.brierlm, 0.0))
    return [fit(label, scores) for label, scores in groups.items()]


def growth_table(results: Sequence[Result]) -> Table:
    """Exponent, score at the largest budget and crossing with the first kind, for each kind."""
    ours, papers = growth_by_kind(results), paper_growths()
    rows = [_row(one, ours[0]) for one in ours] + [_row(one, papers[0]) for one in papers]
    columns = ("model", "budgets", "exponent", "BrierLM at the largest", "crosses the first at")
    return Table("", columns, tuple(rows))


def _row(one: Growth, first: Growth) -> tuple[Cell, ...]:
    measured = any(point.error for point in one.points)
    largest = one.points[-1].flops
    value, error = one.at(largest)
    return (
        text(one.label),
        text(", ".join(power_of_ten(point.flops) for point in one.points)),
        text(f"{one.exponent:.3f}" + (f" ± {one.exponent_error:.3f}" if measured else "")),
        text(f"{value:.2f}" + (f" ± {error:.2f}" if measured else "")),
        text("" if one is first else _crossing_text(one, first, measured)),
    )


def _crossing_text(one: Growth, first: Growth, measured: bool) -> str:
    found = crossing(one, first, None if measured else first.points[0].flops)
    then = "ahead" if found.then_ahead else "behind"
    if not measured:
        where = found.middle
        return f"{power_of_ten(where)}, then {then}" if math.isfinite(where) else "never"
    chance = f"{found.chance:.0%} of the fits cross"
    if not math.isfinite(found.low):
        return f"never ({chance})"
    ends = [power_of_ten(x) if math.isfinite(x) else "never" for x in (found.low, found.high)]
    return f"{ends[0]} to {ends[1]}, then {then} ({chance})"


def growth_curves(growths: Sequence[Growth]) -> Callable[[Axes, Palette], None]:
    """Points with errors, and the power laws as dashed lines over all budgets, ours and the
    paper's."""

    def draw(axis: Axes, palette: Palette) -> None:
        ends = [point.flops for one in growths for point in one.points]
        for number_of_curve, one in enumerate(growths):
            color = palette.series[number_of_curve % len(palette.series)]
            flops = [point.flops for point in one.points]
            values = [point.brierlm for point in one.points]
            errors = [point.error for point in one.points]
            axis.errorbar(
                flops, values, errors, color=color, marker="o", capsize=3, ls="none",
                label=one.label,
            )  # fmt: skip
            places = np.geomspace(min(ends), max(ends), 100)
            line = [(place, one.at(place)[0]) for place in places]
            shown = [(place, value) for place, value in line if value <= 100]
            axis.plot(*zip(*shown, strict=True), color=color, ls="--", linewidth=1)
        axis.set_yscale("log")
        label_brierlm_over_flops(axis)
        axis.set_ylim(0.5, 100)

    return draw
