"""Text corpora: from files to documents, splits and blocks of tokens.

`corpus_files` finds the files and `formats` reads them. Every fault of a file is a `DataError` that
names the file and, for lines, the line.
"""

from __future__ import annotations

import hashlib
import sysconfig
import tempfile
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calm_dist.errors import DataError
from calm_dist.files import file_sha256
from calm_dist.randomness import key_fraction
from calm_dist.text.corpus_files import CorpusFiles, CorpusPaths, find_files
from calm_dist.text.dedup import Repetitions
from calm_dist.text.formats import (
    TABLES,
    TEXT_AND_ID,
    CorpusFile,
    Document,
    Reading,
    format_of_file,
    quoted,
)
from calm_dist.text.reading import Tally, lines_before, shuffled_documents, unit_documents
from calm_dist.text.remote_files import is_url, open_url
from calm_dist.text.tokenizing import Piece, tokenized_ahead
from calm_dist.text.units import (
    Share,
    Span,
    file_fingerprint,
    in_threads,
    sampled_sha256,
    shuffled_shares,
    units_of,
)

if TYPE_CHECKING:
    from calm_dist.text.tokenizer import Tokenizer

__all__ = [
    "SPLITS",
    "CorpusFile",
    "CorpusFiles",
    "Document",
    "DocumentIds",
    "ShuffledDocuments",
    "corpus_sha256",
    "find_files",
    "iter_documents",
    "pack_blocks",
    "split_documents",
    "standard_library_documents",
]

SPLITS = ("train", "valid", "test")

# Parts of the standard library's directory that are not used as text: installed packages, tests,
# programs, and generated tables of character sets.
_NOT_LIBRARY = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "turtledemo",
    "encodings",
    "__pycache__",
}

_TOKENIZER_BATCH_CHARACTERS = 1 << 18

TOKENIZED_CHARACTERS = 250_000
"""A document of more than twice as many characters is tokenized in pieces."""


def corpus_sha256(files: Iterable[CorpusFile]) -> str:
    """Fingerprint of the names and contents of corpus files."""
    digest = hashlib.sha256()
    for file, found in in_threads(_content_sha256, files):
        digest.update(f"{file.name}\0{found}\n".encode())
    return digest.hexdigest()


def describe_corpus(
    files: CorpusFiles, reading: Reading, *, skip: bool = False
) -> tuple[str, bool]:
    """Fingerprint of a corpus, and whether it is a single unit.

    That of a single unit covers all contents, that of a larger corpus a sample of each file.
    ``skip`` is that of `units_of`.
    """
    units = units_of(files, reading, skip=skip)
    if len(units) == 1:
        return corpus_sha256(files), True
    found = {file.name: sampled for file, sampled in in_threads(file_fingerprint, files)}
    return sampled_sha256(found), False


def _content_sha256(file: CorpusFile) -> str:
    if not is_url(file.path):
        return file_sha256(Path(file.path))
    with open_url(file.path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def iter_documents(
    paths: CorpusPaths,
    reading: Reading = TEXT_AND_ID,
    tally: Tally | None = None,
    repeated: Callable[[int], np.ndarray] | None = None,
) -> Iterator[Document]:
    """The documents of a corpus in the order of its files; blank texts are left out.

    Args:
        paths: the corpus.
        reading: what becomes a document.
        tally: counts what is left out; None: the first fault is an error.
        repeated: from `repetitions`; None: repetitions are documents, too.

    Raises:
        DataError: see `find_files`; a file is damaged or truncated; a line or row is not a
            document; or no document of the corpus has content.
    """
    for _, _, document in _places_and_documents(find_files(paths), reading, tally, repeated):
        yield document


def _places_and_documents(
    files: CorpusFiles,
    reading: Reading = TEXT_AND_ID,
    tally: Tally | None = None,
    repeated: Callable[[int], np.ndarray] | None = None,
) -> Iterator[tuple[CorpusFile, int, Document]]:
    """File, place and document of each document."""
    empty, skip = True, tally is not None and tally.skip
    for number, unit in enumerate(units_of(files, reading, skip=skip)):
        for span, place, document in unit_documents(number, unit.spans, reading, tally, repeated):
            empty = False
            yield span.file, place, document
    if empty:
        raise no_text(files)


@contextmanager
def repetitions(
    files: CorpusFiles, reading: Reading, *, skip: bool
) -> Iterator[Callable[[int], np.ndarray] | None]:
    """The repeated documents of each unit, if ``reading`` leaves them out; else None.

    Their hashes are kept in ``TMPDIR``, 24 bytes per document.
    """
    if not reading.dedup:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="calm_dist_dedup_") as directory:
        found = Repetitions(Path(directory), 1)
        units = enumerate(units_of(files, reading, skip=skip))
        shares = [Share(number, unit.spans) for number, unit in units]
        found.find(lambda _: shares, reading, skip=skip)
        yield found.of_unit


class ShuffledDocuments:
    """The documents of a corpus in an order that is a function of ``seed`` and the files.

    Memory holds one chunk of text; see `calm_dist.text.units`.

    Raises:
        DataError: as `iter_documents`; a file changes while it is used.
    """

    def __init__(self, paths: CorpusPaths, seed: int, reading: Reading = TEXT_AND_ID) -> None:
        self._files, self._seed, self._reading = find_files(paths), seed, reading
        (self._shares,) = shuffled_shares(units_of(self._files, reading), seed, 1)

    def __iter__(self) -> Iterator[Document]:
        tally = Tally()
        yield from shuffled_documents(self._shares, self._seed, self._reading, tally)
        if not tally.documents:
            raise no_text(self._files)


def no_text(files: Sequence[CorpusFile]) -> DataError:
    """The error for a corpus without any document."""
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return DataError(f"corpus {files[0].shown}{more}: holds no text")


def standard_library_documents() -> list[Document]:
    """The source files of the running Python's standard library, sorted by name.

    Each document is one file with its docstrings and comments. Files that do not decode are left
    out, as are tests, installed packages and generated tables.

    Raises:
        DataError: this Python has no source files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _NOT_LIBRARY.intersection(name.parts):
            continue
        try:
            with tokenize.open(path) as stream:
                text = stream.read()
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        if text.strip():
            documents.append(Document(name.as_posix(), text))
    if not documents:
        raise DataError(f"{root}: this Python has no standard library sources; give --corpus PATH")
    return documents


class DocumentIds:
    """Hashes of document ids, 16 bytes each; the first six bytes decide the split.

    A document's split depends only on ``(seed, id)``, about 90, 5 and 5 percent; but if valid or
    test would be empty, the document nearest to it is moved there.
    """

    def __init__(self, seed: int) -> None:
        # The common prefix of `key_fraction(seed, "split", id)`, hashed once.
        self._prefix = hashlib.sha256(f"{seed}\0split\0".encode())
        self._hashes = bytearray()

    def __len__(self) -> int:
        return len(self._hashes) // 16

    def add(self, document_id: str) -> None:
        digest = self._prefix.copy()
        digest.update(document_id.encode())
        self._hashes += digest.digest()[:16]

    def add_all(self, others: DocumentIds) -> None:
        """Add ids that were hashed elsewhere with the same seed."""
        self._hashes += others._hashes

    def __getstate__(self) -> bytes:
        # A hash object cannot be pickled.
        return bytes(self._hashes)

    def __setstate__(self, hashes: bytes) -> None:
        self._hashes = bytearray(hashes)

    def repeated(self) -> tuple[int, int] | None:
        """Positions of two documents with the same id, or None."""
        halves = np.frombuffer(self._hashes, ">u8").reshape(-1, 2)
        order = np.lexsort((halves[:, 1], halves[:, 0]))
        same = (halves[order[1:]] == halves[order[:-1]]).all(axis=1)
        if not same.any():
            return None
        at = int(same.argmax())
        first, second = sorted(int(i) for i in order[at : at + 2])
        return first, second

    def splits(self) -> np.ndarray:
        """For each document the position of its split in `SPLITS`; uint8[documents].

        Raises:
            DataError: fewer than 3 documents.
        """
        count = len(self)
        if count < len(SPLITS):
            raise DataError(
                f"corpus: {count} document(s) cannot be split into train, valid and test; "
                f"give at least {len(SPLITS)} documents (files, or lines of .jsonl)"
            )
        places = (np.frombuffer(self._hashes, ">u8")[::2] >> 16) / 2**48
        num_test = max(1, int((places >= 0.95).sum()))
        num_valid = max(1, int(((places >= 0.9) & (places < 0.95)).sum()))
        # Leave documents for valid and train.
        num_test = min(num_test, count - 2)
        num_valid = min(num_valid, count - num_test - 1)
        by_place = np.argsort(places, kind="stable")
        splits = np.zeros(count, np.uint8)
        splits[by_place[count - num_test - num_valid :]] = 1
        splits[by_place[count - num_test :]] = 2
        return splits


def split_documents(ids: Sequence[str], seed: int) -> dict[str, list[int]]:
    """Divide documents into train, valid and test by the rule of `DocumentIds`.

    Returns:
        For each split the positions in ``ids``, ascending.

    Raises:
        DataError: fewer than 3 documents, or two with the same id.
    """
    known = DocumentIds(seed)
    for document_id in ids:
        known.add(document_id)
    if (pair := known.repeated()) is not None:
        raise _repeated_id(ids[pair[0]], *(f"document {position}" for position in pair))
    splits = known.splits()
    return {name: np.flatnonzero(splits == i).tolist() for i, name in enumerate(SPLITS)}


def refuse_repeated_ids(
    known: DocumentIds,
    paths: CorpusPaths,
    reading: Reading = TEXT_AND_ID,
    repeated: Callable[[int], np.ndarray] | None = None,
    *,
    skip: bool = False,
) -> None:
    """Refuse a corpus in which two documents have the same id and hence share a split.

    Args:
        known: the ids of the documents of ``paths``, in their order.
        paths: the corpus; it is read again to find file and line of both documents.
        reading, repeated, skip: as when ``known`` was read.

    Raises:
        DataError: there are such documents; the message names the id and both places.
    """
    pair = known.repeated()
    if pair is None:
        return
    places, document_id = [], ""
    again = _places_and_documents(find_files(paths), reading, Tally(skip), repeated)
    for position, (file, place, document) in enumerate(again):
        if position in pair:
            places.append(_place(file, place))
            document_id = document.id
        if position == pair[1]:
            break
    raise _repeated_id(document_id, *places)


def _place(file: CorpusFile, place: int) -> str:
    """File and line, or row, of a document."""
    if format_of_file(file).kind in TABLES:
        return f"{file.shown}: row {place}"
    return file.shown_line(1 + lines_before(Span(file, place)))


def _repeated_id(document_id: str, *places: str) -> DataError:
    return DataError(
        f"corpus: {' and '.join(places)} have the same id {quoted(document_id)!r}, so both would "
        'be in the same split; give each document a unique id, or leave "id" out'
    )


def pack_blocks(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    block_size: int,
    patch_size: int,
    seed: int,
    counts: Counter[str] | None = None,
) -> Iterator[np.ndarray]:
    """Cut documents, in the order given, into blocks of exactly ``block_size`` tokens.

    Each document is preceded by 1 to ``patch_size`` begin tokens (the number is a function of
    ``seed`` and the document's id) and followed by one end token. A prompt that is left-padded with
    begin tokens to whole patches therefore looks like the training text. If one token is both, the
    begin tokens of the next document also end this one: with an additional end token, a whole patch
    of begin tokens could be followed by another begin token, which would end a generated text at
    once. Tokens after the last full block are dropped. A document of more than twice
    `TOKENIZED_CHARACTERS` is tokenized in pieces, whose tokens are joined. ``counts`` counts tokens
    and lost text as `LostText.since` names them, and, after the last block, `tokens_dropped`.

    Yields:
        uint32 arrays of shape [block_size].
    """
    waiting = np.empty(0, np.uint32)
    for batch, tokens_of in tokenized_ahead(_batches(_pieces(documents)), tokenizer):
        before = replace(tokenizer.lost)
        tokenizer.count([piece.text for piece in batch], tokens_of)
        if counts is not None:
            counts.update(tokenizer.lost.since(before))
        arrays = [waiting]
        for piece, tokens in zip(batch, tokens_of, strict=True):
            if piece.begins is not None:
                num_begin = 1 + int(key_fraction(seed, "begin", piece.begins) * patch_size)
                arrays.append(np.full(num_begin, tokenizer.begin_id, np.uint32))
            arrays.append(np.array(tokens, np.uint32))
            if piece.ends and tokenizer.end_id != tokenizer.begin_id:
                arrays.append(np.array([tokenizer.end_id], np.uint32))
        waiting = np.concatenate(arrays)
        num_blocks = len(waiting) // block_size
        yield from waiting[: num_blocks * block_size].reshape(num_blocks, block_size)
        waiting = waiting[num_blocks * block_size :]
    if counts is not None:
        counts["tokens_dropped"] += len(waiting)


def _pieces(documents: Iterable[Document]) -> Iterator[Piece]:
    """Documents, the long ones in pieces: a tokenizer needs 150 bytes per character of a text."""
    for document in documents:
        text, begins, start = document.text, document.id, 0
        while len(text) - start > 2 * TOKENIZED_CHARACTERS:
            end = _cut(text, start)
            yield Piece(text[start:end], begins if not start else None, False)
            start = end
        yield Piece(text[start:], begins if not start else None, True)


def _cut(text: str, start: int) -> int:
    """Where to cut a text: after the first empty line past the limit, or else after a line or a
    word before twice the limit, or there."""
    first, last = start + TOKENIZED_CHARACTERS, start + 2 * TOKENIZED_CHARACTERS
    for separator, find in (("\n\n", text.find), ("\n", text.rfind), (" ", text.rfind)):
        if (at := find(separator, first, last)) >= 0:
            # Tokens of most tokenizers begin with a space, and end with line breaks.
            return at + (0 if separator == " " else len(separator))
    return last


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Texts in groups; a thread tokenizes one group at a time."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= _TOKENIZER_BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
