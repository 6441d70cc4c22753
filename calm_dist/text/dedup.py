"""Exact deduplication: of documents with the same text, the first of the corpus is kept.

    hashes.00003/00000.npy    hash and position of documents of part 3, sorted; appears whole
    repeated.00007.npy        positions of the repetitions whose hashes are in range 7, sorted

Any number of workers do both steps together: each first does its own share, then whatever is
missing, so none waits for another, and each may die at any moment. Memory holds `_RUN_DOCUMENTS`
hashes, or a range of twice as many, however large the corpus.
"""

from __future__ import annotations

import errno
import io
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from hashlib import blake2b
from itertools import count
from pathlib import Path

import numpy as np

from calm_dist.errors import DataError
from calm_dist.progress import progress
from calm_dist.text.formats import Reading
from calm_dist.text.reading import Tally, span_documents
from calm_dist.text.units import Share

# 128 bits of the text's hash: two of 10^12 documents agree by chance with a probability of 10^-15.
# The position is the unit's number, and the document's number in the unit.
_ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("position", "<u8")])
_NUMBER_BITS = 40
_RUN_DOCUMENTS = 1 << 20
_RANGE_DOCUMENTS = 1 << 21


class Repetitions:
    """The repeated documents of a corpus.

    Args:
        directory: where the hashes are kept; visible to all workers.
        parts: number of parts of the corpus.
        worker: (I, W): this process begins with parts I, I + W, …
    """

    def __init__(self, directory: Path, parts: int, worker: tuple[int, int] = (0, 1)) -> None:
        self._directory, self._parts, self._worker = directory, parts, worker
        self._found: list[np.ndarray] = []

    def find(
        self, shares_of: Callable[[int], Sequence[Share]], reading: Reading, *, skip: bool
    ) -> None:
        """Hash all documents that have no hash yet, and find the duplicates.

        Args:
            shares_of: gives the shares of a part.
            reading, skip: what becomes a document, and whether faults are skipped.

        Raises:
            DataError: as `span_documents`; the disk is full or fails.
        """
        if self._found:
            return
        try:
            self._find(shares_of, reading, skip)
        except OSError as error:
            raise DataError(
                f"--dedup exact: {self._directory}: cannot be used ({error.strerror or error}); it "
                "needs 24 bytes for each document, in the unfinished store or in TMPDIR"
            ) from error

    def _find(
        self, shares_of: Callable[[int], Sequence[Share]], reading: Reading, skip: bool
    ) -> None:
        self._directory.mkdir(exist_ok=True)
        parts = self._own_first(self._parts)
        for part in progress(parts, self._parts, label="hash the documents", unit="parts"):
            if not (self._directory / f"hashes.{part:05}").is_dir():
                self._hash(part, shares_of(part), reading, skip)
        runs = [
            file
            for part in range(self._parts)
            for file in sorted((self._directory / f"hashes.{part:05}").glob("*.npy"))
        ]
        documents = sum(len(np.load(file, mmap_mode="r")) for file in runs)
        ranges = 1 + documents // _RANGE_DOCUMENTS
        for number in self._own_first(ranges):
            if not self._repeated_file(number).is_file():
                self._write(self._repeated_file(number), _repetitions(runs, number, ranges))
        self._found = [np.load(self._repeated_file(i), mmap_mode="r") for i in range(ranges)]

    def of_unit(self, unit: int) -> np.ndarray:
        """The numbers of the repeated documents of a unit, ascending."""
        first, last = unit << _NUMBER_BITS, (unit + 1) << _NUMBER_BITS
        bounds = np.array([first, last], np.uint64)
        parts = [found[slice(*np.searchsorted(found, bounds))] for found in self._found]
        return np.sort(np.concatenate(parts)) - np.uint64(first)

    def _own_first(self, number: int) -> list[int]:
        own = range(self._worker[0], number, self._worker[1])
        return [*own, *(i for i in range(number) if i not in own)]

    def _hash(self, part: int, shares: Sequence[Share], reading: Reading, skip: bool) -> None:
        scratch = self._directory / f"hashes.{part:05}.{secrets.token_hex(4)}.tmp"
        scratch.mkdir()
        entries = np.empty(_RUN_DOCUMENTS, _ENTRY)
        size, runs = 0, count()

        def save() -> None:
            run = np.sort(entries[:size], order=("high", "low", "position"))
            _save(scratch / f"{next(runs):05}.npy", run)

        try:
            # The part in which a unit begins hashes all of it.
            for share in (share for share in shares if share.is_first):
                number = 0
                for span in share.spans:
                    for _, document in span_documents(span, reading, Tally(skip)):
                        digest = blake2b(document.text.encode(), digest_size=16).digest()
                        high, low = int.from_bytes(digest[:8]), int.from_bytes(digest[8:])
                        entries[size] = (high, low, (share.unit << _NUMBER_BITS) + number)
                        number, size = number + 1, size + 1
                        if size == len(entries):
                            save()
                            size = 0
            if size:
                save()
            place = self._directory / f"hashes.{part:05}"
            if not place.is_dir():
                os.rename(scratch, place)
        except OSError as error:
            # Another worker was faster.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _repeated_file(self, number: int) -> Path:
        return self._directory / f"repeated.{number:05}.npy"

    def _write(self, file: Path, values: np.ndarray) -> None:
        partial = file.with_name(f"{file.stem}.{secrets.token_hex(4)}.tmp.npy")
        _save(partial, values)
        partial.replace(file)


def _save(file: Path, values: np.ndarray) -> None:
    """`np.save`, but a full disk raises an error that says so."""
    buffer = io.BytesIO()
    np.save(buffer, values)
    file.write_bytes(buffer.getvalue())


def _repetitions(runs: Sequence[Path], number: int, ranges: int) -> np.ndarray:
    """Sorted positions of the repetitions whose hashes are in a range; uint64[repetitions]."""
    low, high = ((number + i) * 2**64 // ranges for i in (0, 1))
    pieces = []
    for file in runs:
        # A file is closed again, since there may be thousands.
        run = np.load(file, mmap_mode="r")
        start = np.searchsorted(run["high"], np.uint64(low))
        end = len(run) if high == 2**64 else np.searchsorted(run["high"], np.uint64(high))
        pieces.append(np.array(run[start:end]))
    entries = np.concatenate([np.empty(0, _ENTRY), *pieces])
    order = np.lexsort((entries["position"], entries["low"], entries["high"]))
    entries = entries[order]
    same = (entries["high"][1:] == entries["high"][:-1]) & (
        entries["low"][1:] == entries["low"][:-1]
    )
    return np.sort(entries["position"][1:][same])
