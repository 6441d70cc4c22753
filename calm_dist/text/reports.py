"""``report.json`` beside a store or a prepared corpus: what was read and what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from calm_dist.text.formats import TEXT_AND_ID, Reading
from calm_dist.text.reading import LISTED

REPORT = "report.json"

_COUNTS = (
    "documents",
    "bytes",
    "without_id",
    "empty",
    "too_short",
    "duplicates",
    "tokens",
    "tokens_dropped",
    "unknown_tokens",
    "dropped_characters",
    "special_words",
)
_LATER = ("without_id", "tokens_dropped")
"""Counts that the first version of reports did not have."""


def merged_report(tallies: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The report of all parts, without the counts that a part of an earlier version does not have.

    Args:
        tallies: of each part, as `Tally.to_dict` gives them, with the counts of its tokens.
    """
    total: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    first: list[Any] = []
    lines: dict[str, list[tuple[int, int]]] = {}
    names = set(_COUNTS)
    for tally in tallies:
        # The sum of the other parts would pass for that of all.
        names -= {name for name in _LATER if name not in tally}
        total.update({name: tally.get(name, 0) for name in _COUNTS})
        reasons.update(tally["faults"])
        first = sorted([*first, *tally["first"]], key=lambda fault: tuple(fault[:3]))[:LISTED]
        for name, start, count in tally["lines"]:
            lines.setdefault(name, []).append((start, count))
    return {
        **{name: total[name] for name in _COUNTS if name in names},
        "faults": sum(reasons.values()),
        "faults_by_reason": dict(sorted(reasons.items())),
        "first_faults": list(_with_lines((fault[3] for fault in first), lines)),
    }


def _with_lines(
    faults: Iterable[dict[str, Any]], lines: dict[str, list[tuple[int, int]]]
) -> Iterator[dict[str, Any]]:
    """The faults, with line numbers of the file instead of those of a span."""
    for fault in faults:
        start = fault.get("start", 0)
        numbered = {key: value for key, value in fault.items() if key != "start"}
        if start:
            before = (count for place, count in lines.get(fault["file"], []) if place < start)
            numbered["line"] += sum(before)
        yield numbered


def missing_id_key(report: dict[str, Any], reading: Reading) -> str | None:
    """A line that no document has the key that was given for the id; None if that is not so."""
    documents = report["documents"]
    # A report of an earlier version does not have the count.
    if reading.id_key == TEXT_AND_ID.id_key or not 0 < documents == report.get("without_id"):
        return None
    return (
        f"--id-key {reading.id_key}: none of the {documents:,} documents has this key; their ids "
        "are made from file and place"
    )


def summary(report: dict[str, Any]) -> str | None:
    """A line on what was left out; None if nothing was."""
    counts = {
        "empty": report["empty"],
        "too short": report["too_short"],
        "duplicates": report["duplicates"],
        **report["faults_by_reason"],
    }
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count)
    if not left_out:
        return None
    return f"{report['documents']:,} documents read; left out: {left_out}"
