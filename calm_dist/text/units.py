"""The division of a corpus into units, which are read, shuffled and assigned to workers.

A unit is a part of a file, or several small files, of about `CHUNK_BYTES`. Lines and tables can be
read from the middle; a compressed file, or one of a kind in `formats.WHOLE`, is one unit of any
size. Units depend on the files alone, so documents and their ids are the same whatever the number
of parts and workers.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any

import numpy as np

from calm_dist.errors import DataError
from calm_dist.text.compressed import DamagedFileError
from calm_dist.text.formats import (
    TABLES,
    CorpusFile,
    Reading,
    cannot_be_read,
    format_of_file,
    open_packed,
)
from calm_dist.text.remote_files import is_url
from calm_dist.text.tables import groups

CHUNK_BYTES = 64 << 20
"""Bytes of text that are in memory at once and shuffled together."""

# A unit of at most this fraction of a part is not divided.
_WHOLE = 8

# What the division counts for opening a file, and for a byte of a compressed file.
_FILE_BYTES = 4096
_UNPACKED_BYTES = 4

_SAMPLE_BYTES = 64 << 10
# File systems of clusters and object stores answer many requests as fast as one.
_THREADS = 16
_FILES_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a file: from place ``start`` up to ``end``; see `records.records_in`."""

    file: CorpusFile
    start: int = 0
    end: int | None = None

    def check(self) -> None:
        """Raises DataError if the file no longer has the size with which it was found."""
        if self.file.size < 0 or is_url(self.file.path):
            return
        try:
            size = os.stat(self.file.path).st_size
        except OSError as error:
            raise cannot_be_read(self.file, error) from error
        if size != self.file.size:
            raise DataError(
                f"corpus {self.file.shown}: was changed while it was used: it had "
                f"{self.file.size} bytes, now {size}; start again"
            )


@dataclass(frozen=True, slots=True)
class Unit:
    """Spans that are read together, and their weight: about the bytes of their text."""

    spans: tuple[Span, ...]
    weight: int


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a unit that belongs to one part of a store.

    Attributes:
        unit: number of the unit.
        spans: what the unit consists of.
        first, last, of: of each chunk of n documents, those from n·first/of up to n·last/of.
    """

    unit: int
    spans: tuple[Span, ...]
    first: int = 0
    last: int = 1
    of: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether no other part has a share of the unit."""
        return (self.first, self.last) == (0, self.of)

    @property
    def is_first(self) -> bool:
        """Whether the share begins where the unit does."""
        return self.first == 0

    def slice_of(self, count: int) -> slice:
        """The positions of the share among ``count`` documents."""
        return slice(count * self.first // self.of, count * self.last // self.of)


def units_of(files: Iterable[CorpusFile], reading: Reading, *, skip: bool = False) -> list[Unit]:
    """The units of a corpus, in the order of its files.

    Args:
        files: the corpus.
        reading: what becomes a document.
        skip: whether faults are counted when a unit is read. A damaged table, of which the groups
            of rows are unknown, is then not divided; otherwise it is an error.

    Raises:
        DataError: a table cannot be read, is damaged, or has no column of text.
    """
    units: list[Unit] = []
    waiting: list[Span] = []
    weight = 0
    for span, size in _spans(files, reading, skip):
        if waiting and weight + size > CHUNK_BYTES:
            units.append(Unit(tuple(waiting), weight))
            waiting, weight = [], 0
        waiting.append(span)
        weight += size
    if waiting:
        units.append(Unit(tuple(waiting), weight))
    return units


def _spans(files: Iterable[CorpusFile], reading: Reading, skip: bool) -> Iterator[tuple[Span, int]]:
    for _, spans in in_threads(lambda file: _spans_of(file, reading, skip), files):
        yield from spans


def in_threads(function: Any, files: Iterable[CorpusFile]) -> Iterator[tuple[CorpusFile, Any]]:
    """Each file and the function's result for it, in order."""
    waiting = iter(files)
    if isinstance(files, Sequence) and len(files) == 1:
        yield files[0], function(files[0])
        return
    with ThreadPoolExecutor(_THREADS) as threads:
        while some := list(islice(waiting, _FILES_AT_ONCE)):
            if any(is_url(file.path) or format_of_file(file).kind in TABLES for file in some):
                # pyarrow 25 crashes if the thread that imported it ends (apache/arrow#50471).
                import pyarrow  # noqa: F401
            yield from zip(some, threads.map(function, some), strict=True)


def _spans_of(file: CorpusFile, reading: Reading, skip: bool) -> list[tuple[Span, int]]:
    found = format_of_file(file)
    if found.kind in TABLES:
        try:
            sizes = groups(file, found.kind, reading)
        except DamagedFileError:
            if not skip:
                raise
            # Who reads this span meets the fault again, and counts it.
            return [(Span(file), _FILE_BYTES + file.size)]
        if sizes is not None:
            return _row_spans(file, sizes)
    # A table whose rows are unknown, such as an Arrow stream at a URL, is read from its start.
    if found.kind in TABLES or not found.can_start_anywhere or file.size <= CHUNK_BYTES:
        factor = _UNPACKED_BYTES if found.compression else 1
        return [(Span(file), _FILE_BYTES + factor * file.size)]
    starts = range(0, file.size, CHUNK_BYTES)
    return [
        (
            Span(file, start, start + CHUNK_BYTES if start + CHUNK_BYTES < file.size else None),
            min(CHUNK_BYTES, file.size - start),
        )
        for start in starts
    ]


def _row_spans(file: CorpusFile, sizes: Sequence[tuple[int, int]]) -> list[tuple[Span, int]]:
    spans: list[tuple[Span, int]] = []
    start = end = weight = 0
    for rows, size in sizes:
        if end > start and weight + size > CHUNK_BYTES:
            spans.append((Span(file, start, end), weight))
            start, weight = end, 0
        end += rows
        weight += size
    return [*spans, (Span(file, start, end), weight + _FILE_BYTES)]


def shuffled_shares(units: Sequence[Unit], seed: int, parts: int) -> Iterator[list[Share]]:
    """For each part its shares of the units, in an order that is a function of ``seed``.

    All parts have about the same weight. Parts share a unit, which each of them reads, only where
    it is larger than a fraction of a part.
    """
    order = np.random.default_rng([seed, 0, 0, 1]).permutation(len(units)).tolist()
    ends = list(accumulate(units[i].weight for i in order))
    total = ends[-1]

    def bound(part: int) -> int:
        """Where a part begins; like all places here, in units of 1/parts, to be a whole number."""
        place = part * total
        at = bisect_right(ends, place // parts)
        small = at < len(order) and units[order[at]].weight * parts * _WHOLE <= total
        return (ends[at] - units[order[at]].weight) * parts if small else place

    at = 0
    for part in range(parts):
        low, high = bound(part), bound(part + 1)
        shares = []
        while at < len(order):
            unit = units[order[at]]
            begin, end = (ends[at] - unit.weight) * parts, ends[at] * parts
            of = end - begin
            first, last = max(0, low - begin), min(of, high - begin)
            if last > first:
                shares.append(Share(order[at], unit.spans, first, last, of))
            if end > high:
                break
            at += 1
        yield shares


def file_fingerprint(file: CorpusFile) -> str:
    """sha256 of a file's size and of its beginning, middle and end, 64 KiB each; so of all bytes of
    a small file.

    Raises:
        DataError: the file cannot be read.
    """
    digest = hashlib.sha256(f"{file.size}\0".encode())
    try:
        with open_packed(file) as stream:
            # A byte behind the end shows that the file has grown, which a URL does not tell.
            if file.size <= 3 * _SAMPLE_BYTES:
                digest.update(stream.read(max(3 * _SAMPLE_BYTES, file.size + 1)))
            else:
                for place, behind in ((0, 0), (file.size // 2, 0), (file.size - _SAMPLE_BYTES, 1)):
                    stream.seek(place)
                    digest.update(stream.read(_SAMPLE_BYTES + behind))
    except OSError as error:
        raise cannot_be_read(file, error) from error
    return digest.hexdigest()


def sampled_sha256(fingerprints: Mapping[str, str]) -> str:
    """Fingerprint of a corpus from those of its files, by name, in their order."""
    digest = hashlib.sha256()
    for name, found in fingerprints.items():
        digest.update(f"{name}\0{found}\n".encode())
    return digest.hexdigest()
