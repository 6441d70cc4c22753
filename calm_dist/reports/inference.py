"""The section of a report about generation: what `tools/benchmark.py inference` has measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError

from calm_dist.errors import UserError, listed
from calm_dist.reports import plots
from calm_dist.reports.content import ReportSection
from calm_dist.reports.plots import Draw, Palette, Plot
from calm_dist.reports.tables import Table, compact, number, short, text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLAIMED_SAVING = 0.34
"""Of inference FLOPs, by CALM-M against Transformer-S: the paper's abstract."""


class Row(BaseModel):
    """A row of the benchmark's JSON: a model at one context and number of texts."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    model: str
    kind: str
    patch_size: PositiveInt
    context: PositiveInt
    batch: PositiveInt
    tokens_per_second: PositiveFloat
    first_token_seconds: PositiveFloat
    cache_bytes_per_text: PositiveInt
    flops_per_token: PositiveFloat

    @property
    def name(self) -> str:
        """The run's name, also if its checkpoint was measured."""
        path = Path(self.model)
        return path.parents[1].name if path.parent.name == "checkpoints" else path.name


class MeasuredInference(BaseModel):
    """The benchmark's JSON."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    device: str
    threads: PositiveInt | None
    temperature: PositiveFloat
    rows: tuple[Row, ...]


def read_inference(file: str | Path) -> MeasuredInference:
    """The result of ``tools/benchmark.py inference --json FILE``.

    Raises:
        UserError: the file cannot be read, or is something else.
    """
    try:
        value = json.loads(Path(file).read_text(encoding="utf-8"))
        result = MeasuredInference.model_validate(value)
    except (OSError, ValueError) as error:
        why = str(error)
        if isinstance(error, ValidationError):
            places = (".".join(map(str, problem["loc"])) for problem in error.errors())
            why = f"missing or wrong: {listed(list(places), 3)}"
        raise UserError(
            f"--inference {file}: not a result of tools/benchmark.py inference --json ({why})"
        ) from error
    if not result.rows:
        raise UserError(f"--inference {file}: has no rows; measure at least one model")
    return result


def claims(result: MeasuredInference) -> list[dict[str, Any]]:
    """The first CALM over the first Transformer at each context and number of texts: ``steps`` for
    a token, ``seconds`` for a token by the clock, ``flops_per_token``, ``cache_bytes_per_text`` and
    ``first_token_seconds``. Empty if one of them was not measured."""
    calm, transformer = (
        next((row.model for row in result.rows if (row.kind == "transformer") == is_one), None)
        for is_one in (False, True)
    )
    places = {(row.model, row.context, row.batch): row for row in result.rows}
    found = []
    for row in result.rows:
        other = places.get((transformer or "", row.context, row.batch))
        if row.model != calm or other is None:
            continue
        found.append(
            {
                "context": row.context,
                "batch": row.batch,
                "steps": other.patch_size / row.patch_size,
                "seconds": other.tokens_per_second / row.tokens_per_second,
                **{
                    name: getattr(row, name) / getattr(other, name)
                    for name in ("flops_per_token", "cache_bytes_per_text", "first_token_seconds")
                },
            }
        )
    return found


def inference_section(result: MeasuredInference) -> ReportSection:
    """Tables of speed and memory, the paper's claims beside the clock, and a plot."""
    where = result.device if result.threads is None else f"{result.device}, {result.threads} thread"
    explained = (
        f"Measured by tools/benchmark.py inference on {where}{'s' * ((result.threads or 1) > 1)}, "
        f"at temperature {result.temperature:g}, the models in turns. Tokens per second: of all "
        "texts of a batch together, after the first step. First token: the prompt and the first "
        "step. Cache: keys and values of one text. FLOPs: counted, of a token after this context."
    )
    compared = claims(result)
    return ReportSection(
        "Generation",
        (explained, _beside_the_clock(compared)),
        (_speed_plot(result.rows),),
        ((_claims_table(compared),) if compared else ()) + (_all_rows(result.rows),),
    )


def _beside_the_clock(compared: Sequence[dict[str, Any]]) -> str:
    if not compared:
        return ""
    size = round(1 / compared[0]["steps"])
    flops, seconds = (
        _span([claim[name] for claim in compared]) for name in ("flops_per_token", "seconds")
    )
    return (
        f"The paper claims 1/K of the steps, which is 1/{size} here, and for CALM-M against "
        f"Transformer-S {CLAIMED_SAVING:.0%} fewer inference FLOPs, which is "
        f"{1 - CLAIMED_SAVING:.2f} times theirs. These two models: {flops} times the FLOPs, and by "
        f"the clock {seconds} times the time for a token."
    )


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _claims_table(compared: Sequence[dict[str, Any]]) -> Table:
    rows = tuple(
        (
            number(claim["context"]),
            number(claim["batch"]),
            *(
                number(claim[name], "{:.3g}")
                for name in (
                    "steps",
                    "flops_per_token",
                    "seconds",
                    "first_token_seconds",
                    "cache_bytes_per_text",
                )
            ),
        )
        for claim in compared
    )
    heads = ("context", "texts", "steps", "FLOPs", "time", "time to first token", "cache")
    return Table("CALM over Transformer, for a token", heads, rows)


def _all_rows(rows: Sequence[Row]) -> Table:
    heads = ("model", "context", "texts", "tokens/s", "first token", "cache/text", "FLOPs/token")
    cells = tuple(
        (
            text(row.name),
            number(row.context),
            number(row.batch),
            short(row.tokens_per_second),
            number(row.first_token_seconds, "{:.3g} s"),
            number(row.cache_bytes_per_text / 2**20, "{:,.3g} MiB"),
            short(row.flops_per_token),
        )
        for row in rows
    )
    return Table("Generation of each model", heads, cells)


def _speed_plot(rows: Sequence[Row]) -> Plot:
    lines = tuple(dict.fromkeys((row.model, row.context) for row in rows))
    several = len({context for _, context in lines}) > 1
    labels = {}
    for model, context in lines:
        name = next(row.name for row in rows if row.model == model)
        labels[model, context] = name + (f", context {context:,}" if several else "")

    def draw(axis: Axes, palette: Palette) -> None:
        for place, (model, context) in enumerate(lines):
            own = [row for row in rows if (row.model, row.context) == (model, context)]
            axis.plot(
                [row.batch for row in own],
                [row.tokens_per_second for row in own],
                marker="osD^v"[place % 5],
                color=palette.series[place % len(palette.series)],
                label=plots.shortened(labels[model, context]),
            )
        axis.set(xscale="log", yscale="log", xlabel="texts in a batch", ylabel="tokens per second")
        batches = sorted({row.batch for row in rows})
        axis.set_xticks(batches, [str(batch) for batch in batches])
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_formatter(lambda value, _: compact(value))

    fastest = (
        f"{labels[line]} at most "
        f"{compact(max(row.tokens_per_second for row in rows if (row.model, row.context) == line))}"
        for line in lines
    )
    legend: tuple[str, ...] = tuple(labels.values())
    drawn: Draw = draw
    return Plot(
        "generation",
        "Tokens per second",
        f"Tokens per second over the texts in a batch: {', '.join(fastest)}.",
        drawn,
        legend=legend,
    )
