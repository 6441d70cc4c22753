"""Reads files of any format, from any place at which reading can start."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from calm_dist.text.formats import (
    PARSERS,
    TABLES,
    TEXT_AND_ID,
    CorpusFile,
    Found,
    Reading,
    cannot_be_read,
    format_of_file,
    open_file,
    skip_line,
)
from calm_dist.text.tables import rows


def records_in(
    file: CorpusFile, start: int = 0, end: int | None = None, reading: Reading = TEXT_AND_ID
) -> Iterator[tuple[int, Found]]:
    """Place of each line or document from place ``start`` up to ``end``, and what is there.

    Places are bytes of the unpacked contents, or rows. A line belongs to the range in which it
    starts, and a range of a table consists of whole groups of `tables.groups`. A document's id is
    given in the file, or is a function of the file's name and the place, so it is the same
    whichever range is read.

    Raises:
        DataError: the file cannot be read.
    """
    found = format_of_file(file)
    try:
        if found.kind in TABLES:
            yield from rows(file, found.kind, start, end, reading)
            return
        start = _next_line(file, start)
        size = None if end is None else _next_line(file, end) - start
        with open_file(file, start) as stream:
            part: Any = stream if size is None else io.BufferedReader(_Part(stream, size))
            yield from PARSERS[found.kind](file, part, start, reading)
    except OSError as error:
        raise cannot_be_read(file, error) from error


class _Part(io.RawIOBase):
    """The next ``size`` bytes of a stream."""

    def __init__(self, stream: io.BufferedReader, size: int) -> None:
        self._stream, self._left = stream, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = self._stream.readinto1(buffer[: min(len(buffer), self._left)])
        self._left -= size
        return size


def _next_line(file: CorpusFile, place: int) -> int:
    """The byte at which the first line at or behind ``place`` starts."""
    if not place:
        return 0
    with open_file(file, place - 1) as stream:
        return place - 1 + skip_line(stream)
