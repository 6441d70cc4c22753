"""The report as Markdown, with its plots as PNG files next to it."""

from __future__ import annotations

import re

from calm_dist import __version__
from calm_dist.reports.content import Content, ReportSection
from calm_dist.reports.tables import Table


def render_markdown(content: Content, *, images: bool = True) -> str:
    """The whole report.

    Args:
        images: refer to ``plots/NAME.png``; their alternative text is always written.
    """
    lines = [f"# {_plain(content.title)}", "", _plain(content.lead), ""]
    lines += [
        (
            f"- {_plain(fact.label)}: **{_plain(fact.value)}** "
            + _plain("; ".join(filter(None, (fact.addition, *fact.details))))
        ).rstrip()
        for fact in content.facts
    ]
    if content.notes:
        lines += ["", "To know before comparing:", ""]
        lines += [f"- {_plain(note)}" for note in content.notes]
    for section in content.sections:
        lines += ["", *render_section(section, images)]
    places = ", ".join(f"`{source}`" for source in content.sources)
    lines += ["", f"Made by calm_dist {__version__} from {places}.", ""]
    return "\n".join(lines)


def render_section(section: ReportSection, images: bool) -> list[str]:
    """The lines of a section; ``images`` as in `render_markdown`."""
    lines = [f"## {_plain(section.title)}", ""]
    for plot in section.plots:
        words = _plain(plot.alternative)
        lines += [f"![{words}](plots/{plot.name}.png)" if images else words, ""]
    for text in filter(None, section.text):
        lines += [_plain(text), ""]
    for table in section.tables:
        lines += [*markdown_table(table), ""]
    return lines[:-1]


def markdown_table(table: Table) -> list[str]:
    """Lines of a table whose columns are also aligned in the source."""
    heads = [_plain(head) for head in table.heads]
    rows = [[_plain(cell.text) for cell in row] for row in table.rows]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [heads, ["-" * width for width in widths], *rows]
    return [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    ]


def _plain(text: str) -> str:
    """Text with Markdown's special characters escaped."""
    return re.sub(r"([\\`*_\[\]<>|~&])", r"\\\1", text)
