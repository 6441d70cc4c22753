"""Reads a corpus and writes its splits, unit by unit, in one process or several.

train.jsonl                  the units' documents in the order of the files
.units/00007.train.jsonl     those of unit 7, until they are appended
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from calm_dist.errors import DataError, UnreachableError
from calm_dist.progress import progress
from calm_dist.text.corpus import (
    SPLITS,
    CorpusFiles,
    DocumentIds,
    no_text,
    refuse_repeated_ids,
    repetitions,
    standard_library_documents,
)
from calm_dist.text.formats import Document, Reading
from calm_dist.text.reading import Tally, unit_documents
from calm_dist.text.reports import merged_report
from calm_dist.text.units import Span, units_of

_UNITS = ".units"
_COPIED_BYTES = 1 << 20

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class _Unit:
    """A unit of a corpus as a process reads it; without spans, Python's standard library.

    Attributes:
        number: its position in the corpus.
        spans: what it consists of.
        reading, skip: what becomes a document, and whether faults are skipped.
        repeated: numbers of the documents that are left out as repetitions; None: none are.
    """

    number: int
    spans: tuple[Span, ...]
    reading: Reading
    skip: bool
    repeated: np.ndarray | None

    def documents(self, tally: Tally) -> Iterable[Document]:
        if not self.spans:
            return standard_library_documents()
        repeated = None if self.repeated is None else self._repeated
        found = unit_documents(self.number, self.spans, self.reading, tally, repeated)
        return (document for _, _, document in found)

    def _repeated(self, unit: int) -> np.ndarray:
        assert self.repeated is not None
        return self.repeated


def split_corpus(
    folder: Path,
    files: CorpusFiles | None,
    seed: int,
    reading: Reading,
    *,
    skip: bool,
    processes: int,
    before_writing: Callable[[], object],
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Write ``folder/{train,valid,test}.jsonl``; they do not depend on the number of processes.

    Args:
        folder: where the splits are written.
        files: the corpus; None: Python's standard library.
        seed: decides the split of each document.
        reading, skip: what becomes a document, and whether faults are skipped.
        processes: processes that read and write units at once.
        before_writing: is called when the corpus has been read without an error.

    Returns:
        For each split the number of documents and characters and the sha256; and the report.

    Raises:
        DataError: the corpus is faulty, too small, has an id twice or changes meanwhile; or the
            splits cannot be written.
        UnreachableError: a process was killed.
    """
    with ExitStack() as until_done:
        repeated = None
        units = [_Unit(0, (), reading, skip, None)]
        if files is not None:
            repeated = until_done.enter_context(repetitions(files, reading, skip=skip))
            units = [
                _Unit(number, unit.spans, reading, skip, repeated and repeated(number))
                for number, unit in enumerate(units_of(files, reading, skip=skip))
            ]
        known, sizes, tallies = DocumentIds(seed), [], []
        results = in_processes(partial(_read, seed), units, processes)
        for ids, tally in progress(results, len(units), label="read the corpus", unit="units"):
            known.add_all(ids)
            sizes.append(len(ids))
            tallies.append(tally.to_dict())
        if files is not None:
            if not len(known):
                raise no_text(files)
            refuse_repeated_ids(known, files, reading, repeated, skip=skip)
        split_of = np.split(known.splits(), np.cumsum(sizes)[:-1])
    before_writing()
    try:
        splits = _write_splits(folder, list(zip(units, split_of, strict=True)), processes)
    except OSError as error:
        raise DataError(
            f"--out {folder.parent}: cannot be written ({error.strerror}); make room there, or "
            "give another directory"
        ) from error
    finally:
        shutil.rmtree(folder / _UNITS, ignore_errors=True)
    return splits, merged_report(tallies)


def _read(seed: int, unit: _Unit) -> tuple[DocumentIds, Tally]:
    tally, ids = Tally(unit.skip), DocumentIds(seed)
    for document in unit.documents(tally):
        ids.add(document.id)
        tally.documents += 1
        tally.bytes += len(document.text.encode())
    return ids, tally


def _write_splits(
    folder: Path, work: Sequence[tuple[_Unit, np.ndarray]], processes: int
) -> dict[str, dict[str, Any]]:
    shutil.rmtree(folder / _UNITS, ignore_errors=True)
    (folder / _UNITS).mkdir()
    counts = {split: {"documents": 0, "characters": 0} for split in SPLITS}
    digests = {split: hashlib.sha256() for split in SPLITS}
    with ExitStack() as until_done:
        streams = {
            split: until_done.enter_context((folder / f"{split}.jsonl").open("wb"))
            for split in SPLITS
        }
        written = in_processes(partial(_write, folder / _UNITS), work, processes)
        for (unit, _), found in zip(
            work, progress(written, len(work), label="split", unit="units"), strict=True
        ):
            for split in SPLITS:
                for name, count in found[split].items():
                    counts[split][name] += count
                file = _unit_file(folder / _UNITS, unit, split)
                with file.open("rb") as source:
                    while data := source.read(_COPIED_BYTES):
                        digests[split].update(data)
                        streams[split].write(data)
                file.unlink()
    return {split: {**counts[split], "sha256": digests[split].hexdigest()} for split in SPLITS}


def _unit_file(folder: Path, unit: _Unit, split: str) -> Path:
    return folder / f"{unit.number:05}.{split}.jsonl"


def _write(folder: Path, work: tuple[_Unit, np.ndarray]) -> dict[str, dict[str, int]]:
    """Write the documents of a unit, and count them for each split."""
    unit, split_of = work
    counts = {split: {"documents": 0, "characters": 0} for split in SPLITS}
    done = 0
    with ExitStack() as until_done:
        streams = {
            split: until_done.enter_context(
                _unit_file(folder, unit, split).open("w", encoding="utf-8", newline="\n")
            )
            for split in SPLITS
        }
        for document in unit.documents(Tally(unit.skip)):
            if done == len(split_of):
                raise _changed(len(split_of))
            split = SPLITS[split_of[done]]
            record = {"id": document.id, "text": document.text}
            streams[split].write(json.dumps(record, ensure_ascii=False) + "\n")
            counts[split]["documents"] += 1
            counts[split]["characters"] += len(document.text)
            done += 1
    if done < len(split_of):
        raise _changed(len(split_of))
    return counts


def _changed(number: int) -> DataError:
    return DataError(
        f"corpus: was changed while it was read: a part of it first held {number} documents; "
        "start again"
    )


def in_processes(function: Callable[[T], R], items: Sequence[T], processes: int) -> Iterator[R]:
    """The function's result for each item, in order; a few items are worked on ahead.

    With one process, or one item, this process does the work itself. The error of an item is raised
    in its turn.

    Raises:
        UnreachableError: a process was killed, for example for lack of memory.
    """
    processes = min(processes, len(items))
    if processes <= 1:
        yield from map(function, items)
        return
    # A fork would copy this process's threads' locks: those of pyarrow and tokenizers, for example.
    executor = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_end_with_parent
    )
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(executor.submit(function, item))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UnreachableError(
            "corpus: a process that reads it was killed; the system may do this for lack of "
            "memory: use fewer --processes; start the same command again"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """End this process when its parent ends, which may be killed; leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
