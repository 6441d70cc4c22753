"""The sections of a report of runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from calm_dist.costs.flops import Part
from calm_dist.reports import plots
from calm_dist.reports.analysis import Point, compared_evaluations
from calm_dist.reports.content import ReportSection
from calm_dist.reports.plots import Plot
from calm_dist.reports.tables import (
    MISSING,
    Cell,
    Table,
    compact,
    number,
    power_of_ten,
    scientific,
    short,
    text,
)
from calm_dist.runs.records import CPU, Record, RecordedRun
from calm_dist.scores import brier, brier_text, brierlm_text

NOTHING = "No run has records to show here."
KINDS = {
    "calm": "CALM",
    "tokens": "patches, discrete head",
    "transformer": "Transformer",
    "autoencoder": "autoencoder",
}
LOSSES = {
    "calm": "energy loss",
    "tokens": "cross entropy, nats",
    "transformer": "cross entropy, nats",
    "autoencoder": "loss",
}
_ALL_PARTS = {**plots.PART_NAMES, "encoder": "encoder", "decoder": "decoder"}
_TABLE_ROWS = 12


def models_section(entries: Sequence[dict[str, Any]]) -> ReportSection:
    """A table with one row per model: its properties and its scores."""
    rows = [
        (
            text(e["name"]),
            text(KINDS[e["kind"]]),
            number(e["patch_size"]),
            short(e["parameters"]),
            short(e["tokens_seen"]),
            scientific(e["train_flops_ours"]),
            short(e["inference_flops_per_token"]),
            Cell(brierlm_text(e), e["brierlm"]),
            *(_brier(e, n) for n in (1, 2)),
            number(e["evaluation"].get("cross_entropy"), "{:.3f}"),
        )
        for e in entries
    ]
    heads = (
        "run",
        "kind",
        "K",
        "parameters",
        "tokens seen",
        "training FLOPs",
        "FLOPs per generated token",
        "BrierLM",
        "Brier-1, %",
        "Brier-2, %",
        "cross entropy",
    )
    explained = (
        "BrierLM: 0 to 100, higher is better, ± one standard error; the geometric mean of Brier-1 "
        "to Brier-4. Brier-n: correct n-grams minus agreement by chance, at most 100 %. Cross "
        "entropy in nats per held-out token. K: tokens per step. FLOPs: measured tokens times "
        "FLOPs per token as this package executes them, without autoencoder and encoding; the "
        "authors' code needs more for a CALM (see below)."
    )
    tables = (Table("Models", heads, tuple(rows)), _scores(entries))
    return ReportSection("Models", (explained,), tables=tables)


def _scores(entries: Sequence[dict[str, Any]]) -> Table:
    """All scores of the last evaluations."""
    rows = tuple(
        (
            text(e["name"]),
            number(e["evaluation"].get("step")),
            Cell(brierlm_text(e, "{:.3f}"), e["brierlm"]),
            *(_brier(e, n, "{:.3f}") for n in (1, 2, 3, 4)),
            number(e["evaluation"].get("cross_entropy"), "{:.4f}"),
            number(e["evaluation"].get("energy_loss"), "{:.4f}"),
            number(e["evaluation"].get("reconstruction_accuracy"), "{:.3%}"),
        )
        for e in entries
    )
    brier = tuple(f"Brier-{n}, %" for n in (1, 2, 3, 4))
    heads = ("run", "step", "BrierLM", *brier)
    others = ("cross entropy", "energy loss", "reconstruction")
    return Table("Last evaluations", (*heads, *others), rows, folded=True)


def brierlm_section(
    models: Sequence[RecordedRun], points: Sequence[Point], front: Sequence[Point]
) -> ReportSection:
    title = "BrierLM against training FLOPs"
    drawn = [point for point in points if point.train_flops_ours is not None]
    if not points:
        return ReportSection(title, (NOTHING,))
    rows = tuple(
        (
            text(p.name),
            number(p.step),
            scientific(p.train_flops_ours),
            Cell(brierlm_text(p.evaluation, "{:.3f}"), p.brierlm),
            *(_brier(p.evaluation, n, "{:.3f}") for n in (1, 2)),
            number(p.cross_entropy, "{:.3f}"),
            text("yes" if p in front else "no" if p.comparable else "not comparable"),
        )
        for p in points
    )
    brier = ("Brier-1, %", "Brier-2, %")
    heads = ("run", "step", "training FLOPs", "BrierLM", *brier, "cross entropy")
    last = {p.name: f"{p.name} {_marked(p)} at {p.train_flops_ours:.2e} FLOPs" for p in drawn}
    edge = ", ".join(f"{p.name} at step {p.step}" for p in front)
    plot = Plot(
        "brierlm",
        title,
        f"BrierLM over training FLOPs. Last points: {'; '.join(last.values())}. "
        f"Pareto front: {edge or 'none'}.",
        plots.brierlm_against_flops(points, front),
        legend=(*last, *(["Pareto front"] if len(front) > 1 else [])),
    )
    measured = _protocols(models)
    explained = (
        "Every evaluated checkpoint on held-out text; bars are one standard error (bootstrap over "
        "blocks). Dashed: the Pareto front, checkpoints that no other beats with as few FLOPs.",
        f"{measured}." if measured else "",
    )
    table = Table("Evaluated checkpoints", (*heads, "on the Pareto front"), rows, folded=True)
    return ReportSection(title, explained, (plot,) if drawn else (), (table,))


def _brier(evaluation: Record, n: int, pattern: str = "{:.2f}") -> Cell:
    """Brier-n times 100, with its standard error."""
    return Cell(brier_text(evaluation, n, pattern), brier(evaluation, n)[0])


def _marked(point: Point) -> str:
    return brierlm_text(point.evaluation).split()[0]


def _protocols(models: Sequence[RecordedRun]) -> str:
    """The protocols of the evaluations, each with the runs that used it."""
    ways: dict[str, list[str]] = {}
    for run, (evaluations, _) in zip(models, compared_evaluations(models), strict=True):
        if evaluations and evaluations[-1].get("protocol"):
            ways.setdefault(_protocol(evaluations[-1]), []).append(run.name)
    return "; ".join(f"{', '.join(names)}: {way}" for way, names in ways.items())


def _protocol(evaluation: Record) -> str:
    protocol = evaluation["protocol"]
    aligned = f"at the beginnings of patches of {protocol['patch_size']}"
    where = aligned if protocol["alignment"] == "patch" else "at every token"
    return (
        f"{protocol['blocks']} blocks of {protocol['block_size']} tokens, "
        f"{protocol['positions']} n-grams {where}, "
        f"{protocol['samples']} draws each, data {str(evaluation.get('data_fingerprint'))[:12]}"
    )


def correlation_section(points: Sequence[Point], correlation: Record) -> ReportSection:
    title = "Cross entropy against BrierLM"
    if correlation["undefined"]:
        return ReportSection(title, (f"No correlation: {correlation['undefined']}.",))
    both = [p for p in points if p.comparable and p.cross_entropy is not None]
    found = (
        f"Over {correlation['points']} evaluations: Pearson {correlation['pearson']:.3f}, Spearman "
        f"{correlation['spearman']:.3f}."
    )
    plot = Plot(
        "correlation",
        title,
        f"BrierLM over cross entropy. {found}",
        plots.cross_entropy_against_brierlm(both),
        legend=tuple(dict.fromkeys(p.name for p in both)),
    )
    explained = (
        f"{found} Only models with a softmax have a cross entropy. The paper reports -0.966 and "
        "-0.991 for its Transformers."
    )
    return ReportSection(title, (explained,), (plot,))


def loss_section(models: Sequence[RecordedRun], autoencoder: RecordedRun | None) -> ReportSection:
    """A plot for each kind of loss, since different kinds are not comparable."""
    title = "Training loss"
    trained = [(number, run) for number, run in enumerate(models) if run.training]
    if autoencoder is not None and autoencoder.training:
        # It has a plot of its own.
        trained.append((len(KINDS) - 1, autoencoder))
    if not trained:
        return ReportSection(title, (NOTHING,))
    shown = []
    for kind, label in LOSSES.items():
        own = [(number, run) for number, run in trained if run.kind == kind]
        if own:
            ends = ", ".join(f"{run.name} {_last_loss(run)}" for _, run in own)
            shown.append(
                Plot(
                    f"loss_{kind}",
                    f"{KINDS[kind]}: {label}",
                    f"Training loss of {KINDS[kind]} runs over tokens. Last values: {ends}.",
                    plots.curves(own, "loss", label, zero=False),
                    legend=tuple(run.name for _, run in own),
                )
            )
    rows = tuple(
        (
            text(run.name),
            number(record["step"]),
            short(run.tokens_at(record)),
            number(record["loss"], "{:.4f}"),
            number(record.get("grad_norm"), "{:.3f}"),
            number(record.get("skipped")),
        )
        for _, run in trained
        for record in _thinned(run.training)
    )
    heads = ("run", "step", "tokens", "loss", "gradient norm", "skipped steps")
    explained = (
        "Faint: logged steps; strong: running mean. Losses of different kinds of model have "
        "different units and are not comparable."
    )
    return ReportSection(
        title, (explained,), tuple(shown), (Table("Losses", heads, rows, folded=True),)
    )


def _last_loss(run: RecordedRun) -> str:
    loss = run.training[-1]["loss"]
    return "not finite" if loss is None else f"{loss:.3f}"


def cost_section(
    models: Sequence[RecordedRun], autoencoder: RecordedRun | None, costs: Sequence[dict[str, Any]]
) -> ReportSection:
    """``costs``: `analysis.efficiency` of each model, and of the autoencoder if there is one."""
    runs = [*models, *([autoencoder] if autoencoder else [])]
    fast = [(number, run) for number, run in enumerate(models) if run.tokens_per_second]
    rates = ", ".join(f"{run.name} {compact(run.tokens_per_second or 0)}" for _, run in fast)
    plot = Plot(
        "throughput",
        "Throughput",
        f"Tokens per second over training tokens. Medians: {rates}.",
        plots.curves(fast, "tokens_per_second", "tokens per second", zero=True),
        legend=tuple(run.name for _, run in fast),
    )
    rows = tuple(_cost_row(run, cost) for run, cost in zip(runs, costs, strict=True))
    heads = (
        "run",
        "device",
        "ranks",
        "layout",
        "precision",
        "tokens/s",
        "FLOP/s per device",
        "peak",
        "MFU",
        "hours",
        "GPU-hours",
    )
    if all(cost["device"] == CPU for cost in costs):
        heads = (*heads[:-1], "device-hours")
    explained = (
        "Medians over the logged steps. FLOP/s: FLOPs that this package executes for a token, "
        "times tokens per second, divided by the ranks of the last start; MFU: FLOP/s over the "
        "device's peak in the run's precision. Hours: durations of all steps, where a logged step "
        "stands for all steps since the previous one; without start-up, checkpoints and "
        "evaluation. GPU-hours (on CPUs device-hours): hours times ranks. Layout: tensor × "
        "pipeline × data parallel, and the ZeRO stage of the head's engine."
    )
    table = Table("Throughput and cost", heads, rows)
    return ReportSection("Throughput and cost", (explained,), (plot,) if fast else (), (table,))


def _cost_row(run: RecordedRun, cost: Record) -> tuple[Cell, ...]:
    parallel = run.recipe.parallel
    layout = (
        f"{parallel.tensor_parallel_size} × {parallel.pipeline_parallel_size} × "
        f"{run.recipe.data_parallel_size}"
    )
    if run.kind in ("calm", "tokens"):
        layout += f", ZeRO-{parallel.zero_stage}"
    seconds, peak = cost["training_seconds"], cost["peak_flops_per_second_per_device"]
    return (
        text(run.name),
        text(cost["device"]),
        number(cost["ranks"]),
        text(layout),
        text(run.recipe.precision),
        short(run.tokens_per_second),
        short(cost["flops_per_second_per_device"]),
        Cell("peak unknown", None) if peak is None else short(peak),
        number(None if cost["mfu"] is None else 100 * cost["mfu"], "{:.3g}%"),
        number(None if seconds is None else seconds / 3600, "{:,.3g}"),
        number(cost["device_hours"], "{:,.3g}"),
    )


def flops_section(
    models: Sequence[RecordedRun],
    autoencoder: RecordedRun | None,
    entries: Sequence[dict[str, Any]],
) -> ReportSection:
    """``entries``: with the `analysis.training_totals` of each model."""
    title = "FLOPs by part"
    named = [(run.name, run.counts().parts) for run in models]
    shown = tuple(
        Plot(
            f"flops_{name}",
            f"{name.capitalize()}, per token",
            f"Stacked bars of FLOPs per token in {name}. {_largest(named, measure)}",
            plots.flops_by_part(named, measure),
            rows=len(named),
            legend=plots.shown_parts(named, measure),
        )
        for name, measure in (
            ("training", "train_flops_per_token"),
            ("inference", "inference_flops_per_token"),
        )
    )
    own = [(autoencoder.name, autoencoder.counts().parts)] if autoencoder is not None else []
    rows = tuple(
        (
            text(name),
            text(_ALL_PARTS[part.name]),
            number(part.parameters),
            short(part.train_flops_per_token),
            short(part.train_flops_per_token_ours),
            short(part.inference_flops_per_token),
            short(part.inference_flops_per_token_without_cache),
        )
        for name, parts in [*named, *own]
        for part in parts
        if part.name in _ALL_PARTS
    )
    heads = (
        "run",
        "part",
        "parameters",
        "training",
        "training, ours",
        "inference",
        "inference without cache",
    )
    explained = (
        "Counted from the recipe: matrix multiplications, two FLOPs per multiply-add, full "
        "attention; training is three times the forward pass, inference one token after a full "
        "context. Training is counted as the authors' code executes it; ours computes everything "
        "that does not depend on the noise once for all samples of the head. Embeddings and norms "
        "have no matrix multiplications."
    )
    totals_explained = (
        "Training in all: FLOPs executed by the authors' code, plus the autoencoder's training and "
        "its encoding of every token seen (once each; stored latents that are read again cost "
        "less), and the same minus what our head saves. One autoencoder can serve any number of "
        "models; here its full cost is added to each."
    )
    table = Table("FLOPs per token by part", heads, rows, folded=True)
    return ReportSection(title, (explained, totals_explained), shown, (_totals(entries), table))


def _totals(entries: Sequence[dict[str, Any]]) -> Table:
    columns = {
        "authors' code": "train_flops",
        "+ autoencoder": "autoencoder_train_flops",
        "+ encoding": "encoding_flops",
        "= total": "train_flops_with_autoencoder",
        "− cheaper head": "head_flops_saved",
        "= total, ours": "train_flops_with_autoencoder_ours",
    }
    rows = tuple(
        (text(e["name"]), *(scientific(e[key]) for key in columns.values())) for e in entries
    )
    return Table("Training FLOPs in all", ("run", *columns), rows)


def _largest(named: Sequence[tuple[str, Sequence[Part]]], measure: str) -> str:
    """The most expensive part of each run, as text."""
    words = []
    for name, parts in named:
        costs = {part.name: getattr(part, measure) for part in parts}
        largest = max(costs, key=costs.__getitem__)
        words.append(
            f"{name}: {compact(sum(costs.values()))} in all, most in "
            f"{plots.PART_NAMES[largest]} ({costs[largest] / sum(costs.values()):.0%})."
        )
    return " ".join(words)


def autoencoder_section(entry: Record, run: RecordedRun | None) -> ReportSection:
    title = "Autoencoder"
    if run is None or not run.evaluations:
        return ReportSection(title, ("There is no evaluation of an autoencoder to show.",))
    explained = (
        f"At step {entry['step']} the autoencoder reconstructs "
        f"{_filled(entry['token_accuracy'], '{:.3%}')} of held-out tokens from sampled latents, "
        f"{_filled(entry['token_accuracy_mean'], '{:.3%}')} from their means; "
        f"{_filled(entry['collapsed_dims'], '{}')} of {_filled(entry['latent_size'], '{}')} latent "
        "dimensions are collapsed; the mean posterior std is "
        f"{_filled(entry['mean_std'], '{:.3f}')}.",
        f"Its training took {_filled(entry['train_flops'], '{:.3g}')} FLOPs; encoding a token of "
        f"the corpus takes {_filled(entry['encoding_flops_per_token'], '{:.3g}')}.",
    )
    divergences = run.last_evaluation.get("kl_per_dim") or []
    shown = [
        Plot(
            "reconstruction",
            "Tokens not reconstructed",
            f"Share of held-out tokens that are not reconstructed, over training. {explained[0]}",
            plots.reconstruction_error(run),
            legend=("sampled latent", "mean latent", "1%"),
        )
    ]
    if divergences:
        shown.append(
            Plot(
                "information",
                "Information in each latent dimension",
                f"KL of {len(divergences)} latent dimensions, from {max(divergences):.3g} down to "
                f"{min(divergences):.3g} nats.",
                plots.information(divergences),
            )
        )
    rows = tuple(
        (
            number(e["step"]),
            number(e.get("token_accuracy"), "{:.3%}"),
            number(e.get("token_accuracy_mean"), "{:.3%}"),
            number(e.get("collapsed_dims")),
        )
        for e in _thinned(run.evaluations)
    )
    heads = ("step", "accuracy, sampled latent", "accuracy, mean latent", "collapsed dimensions")
    table = Table("Reconstruction", heads, rows, folded=True)
    return ReportSection(title, explained, tuple(shown), (table,))


def _filled(value: float | None, pattern: str) -> str:
    if value is not None and pattern == "{:.3g}":
        return power_of_ten(value, 2)
    return MISSING if value is None else pattern.format(value)


def _thinned(records: Sequence[Record]) -> list[Record]:
    """At most a dozen records, evenly spaced, including the last one."""
    if len(records) <= _TABLE_ROWS:
        return list(records)
    last = len(records) - 1
    return [records[number * last // (_TABLE_ROWS - 1)] for number in range(_TABLE_ROWS)]
