"""The report page: one HTML file that needs no network, readable on light and dark screens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from calm_dist import __version__
from calm_dist.reports import plots
from calm_dist.reports.runs import Record, Run, conditions, first_of_kind

MISSING = "–"
_TABLE_ROWS = 12

_CSS = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfc; --panel: #f3f4f2; --ink: #1d2126; --muted: #667079; --line: #dcdfdd;
  --series-1: #2367c9; --series-2: #c4551a; --series-3: #2c8a57; --series-4: #8a4fbf;
  --series-5: #b58a09; --series-6: #1796a8; --series-7: #c23d75;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181b; --panel: #1e2226; --ink: #e7e9ea; --muted: #9aa4ac; --line: #343a40;
    --series-1: #74a9f5; --series-2: #f0935a; --series-3: #6cc796; --series-4: #c39af0;
    --series-5: #dfbb4a; --series-6: #5fcbd9; --series-7: #ef86b0;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 3rem 1.25rem 4rem; max-width: 56rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif;
}
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.015em; }
h2 { font-size: 1.25rem; margin: 3rem 0 .4rem; letter-spacing: -.01em; }
p { max-width: 42rem; margin: .5rem 0; }
.lead { font-size: 1.1rem; }
.muted, figcaption, footer { color: var(--muted); font-size: .9rem; }
.facts { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.5rem 0; padding: 0; }
.facts div { flex: 1 1 12rem; background: var(--panel); border-radius: .5rem; padding: .9rem 1rem; }
.facts div { display: flex; flex-direction: column; justify-content: space-between; }
.facts dt { color: var(--muted); font-size: .9rem; }
.facts dd { margin: 0; font-size: 1.6rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.facts dd small { font-size: .9rem; font-weight: 400; color: var(--muted); }
.notes { border-left: 3px solid var(--series-2); padding: .1rem 1rem; margin: 1.5rem 0; }
.notes ul { margin: .4rem 0; padding-left: 1.1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; margin: .75rem 0; }
th, td { padding: .4rem .6rem; text-align: right; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
sup { line-height: 0; font-size: .75em; }
figure { margin: 1rem 0 0; }
figure svg { display: block; width: 100%; min-width: 34rem; height: auto; }
figure svg text { font-family: inherit !important; }
summary { cursor: pointer; color: var(--muted); font-size: .9rem; }
footer { margin-top: 3.5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
code { font-size: .9em; }
"""


def render_page(summary: dict[str, Any], models: Sequence[Run], autoencoder: Run | None) -> str:
    """The whole page as HTML.

    Args:
        summary: the content of report.json.
        models: the runs behind ``summary["models"]``, in the same order.
        autoencoder: the run behind ``summary["autoencoder"]``.
    """
    sections = [
        _headline(summary),
        _notes(missing_and_incomparable(models, autoencoder)),
        _models_section(summary["models"]),
        _brier_section(models),
        _flops_section(models),
        _loss_section(models),
        _autoencoder_section(summary["autoencoder"], autoencoder),
        _footer(models),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>CALM report</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def _headline(summary: dict[str, Any]) -> str:
    """One sentence, and the numbers that it rests on."""
    calm, transformer = (first_of_kind(summary["models"], k) for k in ("calm", "transformer"))
    title = "<h1>Next patch against next token</h1>"
    if calm is None or transformer is None:
        absent = "CALM" if calm is None else "Transformer"
        return f'{title}<p class="lead">There is no {absent} among the runs to compare with.</p>'
    ratios = summary["comparison"]
    training, inference = ratios["train_flops_ratio"], ratios["inference_flops_ratio"]
    spent = f"{training:.2f} times" if training is not None else "an unknown share of"
    lead = (
        f"{escape(calm['name'])} predicts {calm['patch_size']} tokens in one step. It was trained "
        f"with {spent} the FLOPs of {escape(transformer['name'])}, and needs {inference:.2f} times "
        "its FLOPs to generate a token."
    )
    facts = [(f"BrierLM, {escape(entry['name'])}", _score(entry)) for entry in (calm, transformer)]
    facts.append(("training FLOPs, CALM / Transformer", _times(training)))
    facts.append(("inference FLOPs, CALM / Transformer", _times(inference)))
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    return f'{title}<p class="lead">{lead}</p><dl class="facts">{cells}</dl>'


def _score(entry: Record) -> str:
    """BrierLM with its standard error, or why there is none."""
    if entry["brierlm"] is None:
        return "<small>not evaluated</small>"
    if entry["brierlm_stderr"] is None:
        return f"{entry['brierlm']:.2f} <small>no standard error</small>"
    return f"{entry['brierlm']:.2f} <small>± {entry['brierlm_stderr']:.2f}</small>"


def missing_and_incomparable(models: Sequence[Run], autoencoder: Run | None) -> list[str]:
    """What a reader must know before comparing: what runs lack, and what differs between them."""
    notes = []
    for run in (*models, *([autoencoder] if autoencoder else [])):
        if not run.training:
            notes.append(f"{run.name}: no training records in metrics.jsonl.")
        elif not run.evaluations:
            notes.append(f"{run.name}: trained, but not evaluated.")
        elif run.evaluations[-1]["step"] != run.training[-1]["step"]:
            notes.append(
                f"{run.name}: evaluated at step {run.evaluations[-1]['step']}, but trained to "
                f"step {run.training[-1]['step']}."
            )
        reason = run.last_evaluation.get("stderr_undefined")
        if reason:
            notes.append(f"{run.name}: BrierLM has no standard error ({reason}).")
    if autoencoder is None:
        notes.append("No autoencoder run was given.")
    evaluated = [run for run in models if run.evaluations]
    if len({conditions(run.last_evaluation) for run in evaluated}) > 1:
        notes.append(
            "The models were evaluated on different data, block sizes or n-grams: their BrierLM "
            "do not compare."
        )
    tokens = {run.name: run.tokens_seen for run in models if run.tokens_seen}
    if len(set(tokens.values())) > 1:
        seen = ", ".join(f"{name} {_compact(count)}" for name, count in tokens.items())
        notes.append(f"The models saw different amounts of text: {seen} tokens.")
    return notes


def _notes(notes: list[str]) -> str:
    if not notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<div class="notes"><ul>{items}</ul></div>'


def _models_section(entries: Sequence[dict[str, Any]]) -> str:
    """One column a model, one row a fact."""
    facts: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("kind", lambda e: "CALM" if e["kind"] == "calm" else "Transformer"),
        ("tokens per step, K", lambda e: str(e["patch_size"])),
        ("parameters", lambda e: _compact(e["parameters"])),
        ("tokens seen", lambda e: _compact(e["tokens_seen"])),
        ("training FLOPs", lambda e: _scientific(e["train_flops"])),
        ("FLOPs per generated token", lambda e: _scientific(e["inference_flops_per_token"])),
        ("BrierLM", _score),
        ("Brier-1, -2, -3, -4, in %", lambda e: _percentages(e["brier"])),
        ("cross entropy", lambda e: _number(e["evaluation"].get("cross_entropy"), "{:.3f}")),
        ("energy loss", lambda e: _number(e["evaluation"].get("energy_loss"), "{:.4f}")),
        ("layout", lambda e: _layout(e["layout"])),
        ("training speed, tokens/s", lambda e: _compact(e["tokens_per_second"])),
    ]
    rows = [[name, *(show(entry) for entry in entries)] for name, show in facts]
    return (
        "<h2>Models</h2>"
        + _table(["", *(escape(entry["name"]) for entry in entries)], rows)
        + '<p class="muted">BrierLM: 0 to 100, higher is better, ± one standard error. Cross '
        "entropy in nats per held-out token. Layout: tensor × pipeline × data parallel, and the "
        "ZeRO stage of the head's engine.</p>"
    )


def _percentages(values: Sequence[float] | None) -> str:
    return MISSING if values is None else ", ".join(f"{100 * value:.2f}" for value in values)


def _brier_section(models: Sequence[Run]) -> str:
    rows = [
        [
            escape(run.name),
            str(e["step"]),
            _scientific(run.counts(e["tokens_seen"]).train_flops if e.get("tokens_seen") else None),
            _number(e["brierlm"], "{:.3f}"),
            _number(e.get("brierlm_stderr"), "{:.3f}"),
        ]
        for run in models
        for e in run.comparable_evaluations
    ]
    measured = "; ".join(filter(None, (_measured(run) for run in models)))
    return _figure(
        "BrierLM against training FLOPs",
        "Every evaluated checkpoint on held-out text; bars are one standard error (bootstrap over "
        f"blocks). {measured}",
        lambda: plots.brierlm_against_flops(models),
        ["model", "step", "training FLOPs", "BrierLM", "standard error"],
        rows,
    )


def _measured(run: Run) -> str:
    """How a run's last evaluation was taken."""
    protocol = run.last_evaluation.get("protocol")
    if not protocol:
        return ""
    aligned = f"at the beginnings of patches of {protocol['patch_size']}"
    where = aligned if protocol["alignment"] == "patch" else "at every token"
    return (
        f"{escape(run.name)}: {protocol['blocks']} blocks of {protocol['block_size']} tokens, "
        f"{protocol['positions']} n-grams {where}, "
        f"{protocol['samples']} draws each, data {run.last_evaluation['data_fingerprint'][:12]}"
    )


def _flops_section(models: Sequence[Run]) -> str:
    rows = [
        [
            escape(run.name),
            label,
            _compact(part.train_flops_per_token),
            _compact(part.inference_flops_per_token),
        ]
        for run in models
        for part in run.counts().parts
        if (label := plots.PART_NAMES.get(part.name)) is not None
    ]
    return _figure(
        "FLOPs by part",
        "Counted from the recipe: matrix multiplications, two FLOPs a multiply-add, training three "
        "times the forward pass, inference one token from a full context with a cache.",
        lambda: plots.flops_by_part(models),
        ["model", "part", "training, per token", "inference, per token"],
        rows,
    )


def _loss_section(models: Sequence[Run]) -> str:
    trained = [run for run in models if run.training]
    rows = [
        [escape(run.name), str(record["step"]), _number(record["loss"], "{:.4f}")]
        for run in trained
        for record in _thinned(run.training)
    ]
    return _figure(
        "Training loss",
        "Faint: logged steps; strong: running mean. The losses of the two kinds of model have "
        "different units and do not compare.",
        lambda: plots.loss_curves(trained),
        ["model", "step", "loss"],
        rows,
    )


def _autoencoder_section(entry: dict[str, Any], run: Run | None) -> str:
    if run is None or not run.evaluations:
        return "<h2>Autoencoder</h2><p>There is no evaluation of an autoencoder to show.</p>"
    collapsed, size = entry["collapsed_dims"], entry["latent_size"]
    caption = (
        f"At step {entry['step']} the autoencoder rebuilds "
        f"{_number(entry['token_accuracy'], '{:.2%}')} of held-out tokens from sampled latents, "
        f"{_number(entry['token_accuracy_mean'], '{:.2%}')} from their means; "
        f"{_number(collapsed, '{}')} of {_number(size, '{}')} latent dimensions are collapsed; the "
        f"mean posterior std is {_number(entry['mean_std'], '{:.3f}')}. The dashed line is 99% "
        "reconstruction."
    )
    rows = [
        [
            str(e["step"]),
            _number(e.get("token_accuracy"), "{:.3%}"),
            _number(e.get("token_accuracy_mean"), "{:.3%}"),
            _number(e.get("collapsed_dims"), "{}"),
        ]
        for e in _thinned(run.evaluations)
    ]
    return _figure(
        "Autoencoder",
        caption,
        lambda: plots.reconstruction(run),
        ["step", "accuracy, sampled latent", "accuracy, mean latent", "collapsed dimensions"],
        rows,
    )


def _figure(
    title: str, caption: str, plot: Callable[[], str], heads: list[str], rows: list[list[str]]
) -> str:
    """A plot with its caption, and its numbers as a table for those who cannot see it."""
    if not rows:
        return f"<h2>{title}</h2><p>No run has records to show here.</p>"
    svg = plot().replace("<svg", f'<svg role="img" aria-label="{title}; numbers follow"', 1)
    return (
        f'<h2>{title}</h2><figure><div class="scroll">{svg}</div>'
        f"<figcaption>{caption}</figcaption></figure>"
        f"<details><summary>The numbers as a table</summary>{_table(heads, rows)}</details>"
    )


def _footer(models: Sequence[Run]) -> str:
    places = ", ".join(f"<code>{escape(str(run.path))}</code>" for run in models)
    return (
        f"<footer>Made by calm_dist {__version__} from {places}. The same numbers are in "
        '<a href="report.json">report.json</a>.</footer>'
    )


def _table(heads: list[str], rows: list[list[str]]) -> str:
    """A table whose cells are HTML."""
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _thinned(records: Sequence[Record]) -> list[Record]:
    """At most a dozen records, evenly spaced, the last one among them."""
    if len(records) <= _TABLE_ROWS:
        return list(records)
    last = len(records) - 1
    return [records[number * last // (_TABLE_ROWS - 1)] for number in range(_TABLE_ROWS)]


def _layout(layout: dict[str, int]) -> str:
    sizes = f"{layout['tensor']} × {layout['pipeline']} × {layout['data']}"
    return f"{sizes}, ZeRO-{layout['zero_stage']}" if layout["zero_stage"] else sizes


def _number(value: float | None, pattern: str) -> str:
    return MISSING if value is None else pattern.format(value)


def _times(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}×"


def _compact(value: float | None) -> str:
    """1234567 -> 1.23 M."""
    if value is None:
        return MISSING
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.3g}"


def _scientific(value: float | None) -> str:
    """3.12e13 -> 3.12 × 10^13."""
    if value is None:
        return MISSING
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits} × 10<sup>{int(exponent)}</sup>"
