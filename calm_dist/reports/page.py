"""The report page: one HTML file that needs no network, with light and dark colours."""

from __future__ import annotations

from html import escape

from calm_dist import __version__
from calm_dist.reports.content import Content, Fact, ReportSection
from calm_dist.reports.page_style import CSS, SCRIPT
from calm_dist.reports.plots import Plot
from calm_dist.reports.tables import Cell, Table


def render_page(content: Content) -> str:
    """The whole page as HTML. Without its script only the sorting of tables does not work."""
    body = [
        f"<h1>{escape(content.title)}</h1>",
        f'<p class="lead">{escape(content.lead)}</p>',
        _facts(content.facts),
        _notes(content.notes),
        *(_section(section) for section in content.sections),
        _footer(content.sources),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Otherwise browsers request an icon from a server.
        '<link rel="icon" href="data:,">\n'
        f"<title>CALM report</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _facts(facts: tuple[Fact, ...]) -> str:
    cells = "".join(
        f"<div><dt>{escape(fact.label)}</dt><dd>{escape(fact.value)}"
        + (f" <small>{escape(fact.addition)}</small>" if fact.addition else "")
        + "".join(f' <small class="line">{escape(line)}</small>' for line in fact.details)
        + "</dd></div>"
        for fact in facts
    )
    return f'<dl class="facts">{cells}</dl>' if cells else ""


def _notes(notes: tuple[str, ...]) -> str:
    if not notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<div class="notes"><ul>{items}</ul></div>'


def _section(section: ReportSection) -> str:
    """Open tables first, then plots, then text, then folded tables."""
    open_tables = "".join(_table(table) for table in section.tables if not table.folded)
    folded = "".join(
        f"<details><summary>{escape(table.title)}: the numbers</summary>{_table(table)}</details>"
        for table in section.tables
        if table.folded
    )
    words = "".join(f'<p class="muted">{escape(text)}</p>' for text in section.text if text)
    figures = "".join(_figure(plot, alone=len(section.plots) == 1) for plot in section.plots)
    if figures:
        figures = f'<div class="plots{" one" * (len(section.plots) == 1)}">{figures}</div>'
    return f"<h2>{escape(section.title)}</h2>{open_tables}{figures}{words}{folded}"


def _figure(plot: Plot, *, alone: bool) -> str:
    """A plot with its alternative text, and with its title if the section has several plots."""
    label = f'<svg role="img" aria-label="{escape(plot.alternative)}"'
    caption = "" if alone else f"<figcaption>{escape(plot.title)}</figcaption>"
    return f"<figure>{caption}{plot.svg().replace('<svg', label, 1)}</figure>"


def _table(table: Table) -> str:
    words = [
        any(isinstance(row[column].value, str) for row in table.rows)
        for column in range(len(table.heads))
    ]
    heads = "".join(
        f'<th scope="col" aria-sort="none"{_class(is_words)}><button type="button">{escape(head)}'
        "</button></th>"
        for head, is_words in zip(table.heads, words, strict=True)
    )
    rows = "".join(
        "<tr>" + "".join(_cell(cell, number, words[number]) for number, cell in enumerate(row))
        + "</tr>"
        for row in table.rows
    )  # fmt: skip
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(table.title)}">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell(cell: Cell, column: int, words: bool) -> str:
    value = "" if cell.value is None else f' data-value="{escape(str(cell.value))}"'
    if column == 0:
        return f'<th scope="row"{value}>{escape(cell.text)}</th>'
    return f"<td{_class(words)}{value}>{escape(cell.text)}</td>"


def _class(words: bool) -> str:
    return ' class="words"' if words else ""


def _footer(sources: tuple[str, ...]) -> str:
    places = ", ".join(f"<code>{escape(source)}</code>" for source in sources)
    return (
        f"<footer>Made by calm_dist {__version__} from {places}. The same numbers are in "
        '<a href="report.json">report.json</a>, the same words in <a href="report.md">report.md'
        "</a>, the plots in <code>plots/</code>.</footer>"
    )
