"""Reads documents and counts what is left out: empty, short and repeated documents, and faults."""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from calm_dist.errors import DataError
from calm_dist.text.compressed import DamagedFileError
from calm_dist.text.formats import (
    TABLES,
    TEXT_AND_ID,
    Document,
    Problem,
    Reading,
    format_of_file,
    open_file,
)
from calm_dist.text.records import records_in
from calm_dist.text.units import CHUNK_BYTES, Share, Span

LISTED = 100
"""Faults that a report lists; the others are only counted."""

_LINE_COUNT_BYTES = 1 << 22


@dataclass
class Tally:
    """What was read and what was left out.

    Attributes:
        skip: whether faults are counted; otherwise the first one is an error.
        documents, bytes: documents handed out, and their UTF-8 text.
        without_id: those of them whose file gives no id.
        empty, too_short, duplicates: documents left out.
        faults: number of faults by reason.
        first: the first `LISTED` faults in the order of the corpus: unit, span, number of the line
            in the span, and their description.
        lines: of files that are read in several spans, the number of lines of each span.
    """

    skip: bool = False
    documents: int = 0
    bytes: int = 0
    without_id: int = 0
    empty: int = 0
    too_short: int = 0
    duplicates: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    first: list[tuple[int, int, int, dict[str, Any]]] = field(default_factory=list)
    lines: list[tuple[str, int, int]] = field(default_factory=list)

    def add_fault(self, where: tuple[int, int, int], fault: dict[str, Any]) -> None:
        """Count a fault; ``where`` orders it among all of the corpus."""
        self.faults[fault["reason"]] += 1
        self.first.append((*where, fault))
        if len(self.first) >= 2 * LISTED:
            self.first = heapq.nsmallest(LISTED, self.first, key=lambda found: found[:3])

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        first = heapq.nsmallest(LISTED, self.first, key=lambda found: found[:3])
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "without_id": self.without_id,
            "empty": self.empty,
            "too_short": self.too_short,
            "duplicates": self.duplicates,
            "faults": dict(self.faults),
            "first": first,
            "lines": self.lines,
        }


def span_documents(
    span: Span,
    reading: Reading = TEXT_AND_ID,
    tally: Tally | None = None,
    order: tuple[int, int] = (0, 0),
) -> Iterator[tuple[int, Document]]:
    """Place and document of each document of a span; blank and short ones are left out.

    Args:
        span: the part of a file.
        reading: what becomes a document.
        tally: counts what is left out.
        order: number of the unit and of the span in it, for the order of faults.

    Raises:
        DataError: the file cannot be read or was changed; or something in it is not a document, and
            ``tally`` does not skip faults.
    """
    tally = Tally() if tally is None else tally
    number = 0
    try:
        span.check()
        for place, found in records_in(span.file, span.start, span.end, reading):
            number += 1
            if isinstance(found, Problem):
                _handle(span, place, number, found, tally, order)
            elif found is None:
                continue
            elif not found.text or found.text.isspace():
                tally.empty += 1
            elif len(found.text) < reading.min_chars:
                tally.too_short += 1
            else:
                yield place, found
    except DamagedFileError as error:
        if not tally.skip:
            raise
        # What follows in this file is lost.
        fault = {"file": span.file.name, "reason": "damaged file", "message": str(error)}
        tally.add_fault((*order, number + 1), fault)
    if format_of_file(span.file).has_lines and (span.start or span.end is not None):
        tally.lines.append((span.file.name, span.start, number))


def _handle(
    span: Span, place: int, number: int, problem: Problem, tally: Tally, order: tuple[int, int]
) -> None:
    found = format_of_file(span.file)
    if tally.skip:
        fault: dict[str, Any] = {"file": span.file.name}
        if found.has_lines:
            fault |= {"start": span.start, "line": number}
        else:
            fault["row" if found.kind in TABLES else "byte"] = place
        fault |= {"reason": problem.reason, "message": problem.message}
        tally.add_fault((*order, number), fault)
        return
    where = span.file.shown
    if found.has_lines:
        where = span.file.shown_line(number + lines_before(span))
    elif found.kind in TABLES:
        where += f": row {place}"
    # Not every tool that reads text has that option.
    raise DataError(
        f"corpus {where}: {problem.message}; correct it, or leave it out with --on-bad-line skip "
        "of prepare_corpus.py or encode_latents.py"
    )


def lines_before(span: Span) -> int:
    """Number of lines of the file before a span."""
    count, left = 0, span.start
    if left:
        with open_file(span.file) as stream:
            while left > 0 and (read := stream.read(min(left, _LINE_COUNT_BYTES))):
                count, left = count + read.count(b"\n"), left - len(read)
            count += not read.endswith(b"\n")
    return count


class _Chunk:
    """Documents in memory: their bytes one after another, and where each ends."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._ends = array("Q", [0])

    def __len__(self) -> int:
        return len(self._ends) // 2

    @property
    def is_full(self) -> bool:
        return len(self._bytes) >= CHUNK_BYTES

    def add(self, document: Document) -> None:
        for part in (document.id, document.text):
            self._bytes += part.encode()
            self._ends.append(len(self._bytes))

    def __getitem__(self, position: int) -> Document:
        start, middle, end = self._ends[2 * position : 2 * position + 3]
        return Document(self._bytes[start:middle].decode(), self._bytes[middle:end].decode())


def shuffled_documents(
    shares: Iterable[Share],
    seed: int,
    reading: Reading,
    tally: Tally | None = None,
    repeated: Callable[[int], np.ndarray] | None = None,
) -> Iterator[Document]:
    """The documents of some shares of units, in an order that is a function of ``seed``.

    A unit is read into memory in chunks of about `CHUNK_BYTES` of text, and each is shuffled.

    Args:
        shares: from `calm_dist.text.units`.
        seed: seed of the order.
        reading: what becomes a document.
        tally: counts what is read and left out.
        repeated: the numbers, in a unit of the number given, of the documents that are left out as
            repetitions; ascending.

    Raises:
        DataError: as `span_documents`.
    """
    tally = Tally() if tally is None else tally
    for share in shares:
        # Of several parts that share a unit, the first one counts what is left out.
        counts = tally if share.is_first else Tally(skip=tally.skip)
        for number, chunk in enumerate(_chunks(share, reading, counts, repeated)):
            # The same as default_rng(seed) for the first chunk of the first unit: the order of all
            # documents before corpora were divided into units.
            order = np.random.default_rng([seed, share.unit, number]).permutation(len(chunk))
            for position in order[share.slice_of(len(chunk))].tolist():
                document = chunk[position]
                tally.documents += 1
                tally.bytes += len(document.text.encode())
                yield document


def _chunks(
    share: Share,
    reading: Reading,
    tally: Tally,
    repeated: Callable[[int], np.ndarray] | None,
) -> Iterator[_Chunk]:
    chunk = _Chunk()
    for _, _, document in unit_documents(share.unit, share.spans, reading, tally, repeated):
        chunk.add(document)
        if chunk.is_full:
            yield chunk
            chunk = _Chunk()
    if len(chunk):
        yield chunk


def unit_documents(
    unit: int,
    spans: Sequence[Span],
    reading: Reading = TEXT_AND_ID,
    tally: Tally | None = None,
    repeated: Callable[[int], np.ndarray] | None = None,
) -> Iterator[tuple[Span, int, Document]]:
    """Span, place and document of each document of a unit, in the order of its files.

    Args and errors are those of `shuffled_documents`.
    """
    tally = Tally() if tally is None else tally
    left_out = iter(() if repeated is None else repeated(unit).tolist())
    next_left_out, number = next(left_out, -1), 0
    for position, span in enumerate(spans):
        for place, document in span_documents(span, reading, tally, (unit, position)):
            if number == next_left_out:
                tally.duplicates += 1
                next_left_out = next(left_out, -1)
            else:
                tally.without_id += document.without_id
                yield span, place, document
            number += 1
