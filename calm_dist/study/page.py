"""A results page: Markdown with tables and plots made from the published results of studies.

A table is placed between two comments; the first one selects its contents:

    <!-- results proxy.json: transformer*, tokens* -->
    <!-- end -->

It has a row for each run of the file whose name matches; seeds of one run share a row. A plot of
BrierLM against training FLOPs is an image after a similar comment:

    <!-- plot words.json: *main* -->
    ![...](images/words.png)

``<!-- correlation FILE: PATTERNS -->`` compares BrierLM with cross entropy over these runs.

What the runs wrote is a list after ``<!-- texts FILE: PATTERNS -->``; a pattern's best run stands
for all.

How scores grow with FLOPs is a table after ``<!-- growth FILE: PATTERNS -->``, and a plot after
``<!-- growth-plot FILE: PATTERNS -->``; both contain the paper's models for comparison.
"""

from __future__ import annotations

import html
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calm_dist.errors import UserError
from calm_dist.reports.analysis import MIN_CORRELATED, pearson_and_spearman
from calm_dist.reports.markdown import markdown_table
from calm_dist.reports.plots import Palette, Plot, label_brierlm_over_flops
from calm_dist.reports.tables import UNKNOWN, Cell, Table, number, power_of_ten, short, text
from calm_dist.scores import brier_text, brierlm_text
from calm_dist.study.growth_page import growth_by_kind, growth_curves, growth_table, paper_growths
from calm_dist.study.result import Result, by_seed, label_of, read_collected

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TABLE = re.compile(
    r"(<!-- (results|growth|texts|correlation) (\S+): (.+?) -->\n).*?(<!-- end -->)", re.DOTALL
)
_PLOT = re.compile(r"<!-- (plot|growth-plot) (\S+): (.+?) -->\n!\[[^]]*\]\((\S+)\)")


def fill_page(page: str, directory: Path) -> str:
    """The page with its tables filled from the files in ``directory``.

    Raises:
        UserError: a file is missing or has no results, or a pattern matches no run.
    """

    def fill(found: re.Match[str]) -> str:
        first, what, file, patterns, last = found.groups()
        results = _chosen(directory / file, patterns)
        if what == "texts":
            groups = [_chosen(directory / file, pattern) for pattern in patterns.split(",")]
            lines = [line for group in groups for line in texts_of_best(group)]
        else:
            lines = markdown_table(_TABLES[what](results))
        return "\n".join([first, *lines, "", last])

    return _TABLE.sub(fill, page)


def page_plots(page: str, directory: Path) -> dict[str, Plot]:
    """The plots of a page, by their path relative to it.

    Raises:
        UserError: as in `fill_page`.
    """
    plots = {}
    for what, file, patterns, path in _PLOT.findall(page):
        results = [r for r in _chosen(directory / file, patterns) if r.get("brierlm") is not None]
        if what == "growth-plot":
            growths = [*growth_by_kind(results), *paper_growths()]
            labels, draw = tuple(one.label for one in growths), growth_curves(growths)
        else:
            labels = tuple(dict.fromkeys(map(label_of, results)))
            draw = _brierlm_against_flops(results)
        plots[path] = Plot(Path(path).stem, "", "", draw, legend=labels)
    return plots


def _chosen(file: Path, patterns: str) -> list[Result]:
    results = read_collected(file)
    names = [result["name"] for result in results]
    wanted = [pattern.strip() for pattern in patterns.split(",")]
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"{file}: no run is named {pattern}; runs are {', '.join(names[:20])}")
    return [r for r in results if any(fnmatchcase(r["name"], pattern) for pattern in wanted)]


def correlation_table(results: Sequence[Result]) -> Table:
    """For each kind of model, how well cross entropy predicts BrierLM over its runs.

    Raises:
        UserError: fewer than three runs of a kind have both.
    """
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for one in results:
        if one.get("cross_entropy") is not None and one.get("brierlm") is not None:
            groups[label_of(one)].append((one["cross_entropy"], one["brierlm"]))
    rows = []
    for label, pairs in groups.items():
        if len(pairs) < MIN_CORRELATED:
            raise UserError(f"correlation: {len(pairs)} runs of {label}; {MIN_CORRELATED} needed")
        entropies, scores = np.array(pairs).T
        pearson, spearman = pearson_and_spearman(entropies, scores)
        spans = (f"{values.min():.2f} to {values.max():.2f}" for values in (entropies, scores))
        both = (f"{pearson:.3f}", f"{spearman:.3f}")
        rows.append(tuple(map(text, (label, str(len(pairs)), *spans, *both))))
    columns = ("model", "runs", "cross entropy", "BrierLM", "Pearson", "Spearman")
    return Table("", columns, tuple(rows))


def texts_of_best(results: Sequence[Result]) -> list[str]:
    """Markdown of what the run with the highest BrierLM wrote.

    Raises:
        UserError: none of the runs has texts.
    """
    written = [result for result in results if result.get("texts")]
    if not written:
        raise UserError(f"texts: {results[0]['name']} has none; add `texts` to its plan")
    best = max(written, key=lambda result: result["brierlm"] or 0.0)
    lines = [f"**{best['name']}** (BrierLM {best['brierlm']:.2f})", ""]
    for one in best["texts"]:
        # One line; HTML, so that no character of the text is Markdown.
        shown = html.escape(f"{one['prompt']}{one['text']}").replace("\n", " ⏎ ")
        lines.append(f"- T = {one['temperature']}: <code>{shown}</code>")
    return [*lines, ""]


def results_table(results: Sequence[Result]) -> Table:
    """One row for each run, in the order of the file.

    Raises:
        UserError: the results contain autoencoders and language models, which have no columns in
            common.
    """
    kinds = {result["kind"] == "autoencoder" for result in results}
    if len(kinds) > 1:
        raise UserError("a table of results: has autoencoders and language models; name either")
    columns = _AUTOENCODER if True in kinds else _MODEL
    rows = [
        (Cell(name, name), *(column(group) for column in columns.values()))
        for name, group in by_seed(results).items()
    ]
    return Table("", ("run", *columns), tuple(rows))


def _scores(pattern: Callable[[Result], str], key: Callable[[Result], float]) -> Any:
    """For one seed, its score and the error over blocks; for several, the mean and both errors."""

    def column(group: list[Result]) -> Cell:
        if any(result["diverged"] for result in group):
            return Cell("diverged", None)
        if len(group) == 1:
            return text(pattern(group[0]))
        values = [key(result) for result in group]
        mean, spread = statistics.mean(values), statistics.stdev(values)
        shown = [pattern(result) for result in group]
        mark = "*" if any("*" in score for score in shown) else ""
        # A score of noise may have no error.
        errors = [score.partition(" ± ")[2] for score in shown if " ± " in score]
        blocks = f" ± {errors[0]}" if errors else ""
        return Cell(f"{mean:.2f}{mark}{blocks} (seeds {spread:.2f})", mean)

    return column


def _first(cell: Callable[[Result], Cell]) -> Callable[[list[Result]], Cell]:
    return lambda group: cell(group[0])


_TABLES = {
    "results": results_table,
    "growth": growth_table,
    "correlation": correlation_table,
}

_MODEL: dict[str, Callable[[list[Result]], Cell]] = {
    "parameters": _first(lambda r: short(r["parameters"])),
    "training FLOPs": _first(lambda r: Cell(power_of_ten(r["train_flops"], 2), None)),
    "tokens": _first(lambda r: short(r["tokens"])),
    "seeds": lambda group: number(len(group)),
    "Brier-1, %": _scores(lambda r: brier_text(r, 1), lambda r: 100 * r["brier"][0]),
    "Brier-2, %": _scores(lambda r: brier_text(r, 2), lambda r: 100 * r["brier"][1]),
    "BrierLM": _scores(brierlm_text, lambda r: r["brierlm"]),
}

_AUTOENCODER: dict[str, Callable[[list[Result]], Cell]] = {
    "parameters": _first(lambda r: short(r["parameters"])),
    "training FLOPs": _first(lambda r: Cell(power_of_ten(r["train_flops"], 2), None)),
    "tokens": _first(lambda r: short(r["tokens"])),
    "reconstructed": _first(lambda r: number(r["token_accuracy"], "{:.2%}")),
    "of the mean latent": _first(lambda r: number(r["token_accuracy_mean"], "{:.2%}")),
    "posterior std": _first(
        lambda r: UNKNOWN if r.get("mean_std") is None else number(r["mean_std"], "{:.3f}")
    ),
}


def _brierlm_against_flops(results: Sequence[Result]) -> Callable[[Axes, Palette], None]:
    """Mean over the seeds of each run, with the larger of the errors over seeds and blocks."""

    def draw(axis: Axes, palette: Palette) -> None:
        curves: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
        for group in by_seed(results).values():
            scores = [result["brierlm"] for result in group]
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            error = max(spread, group[0]["brierlm_stderr"] or 0.0)
            point = (group[0]["train_flops"], statistics.mean(scores), error)
            curves[label_of(group[0])].append(point)
        for number_of_curve, (label, points) in enumerate(curves.items()):
            color = palette.series[number_of_curve % len(palette.series)]
            places, means, errors = zip(*sorted(points), strict=True)
            axis.errorbar(
                places, means, errors, color=color, marker="o", capsize=3, linewidth=1.5,
                label=label,
            )  # fmt: skip
        label_brierlm_over_flops(axis)

    return draw
