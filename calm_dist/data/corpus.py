"""Text corpora: from files to documents, splits and blocks of tokens.

`corpus_files` finds the files and `formats` reads them. Every fault of a file is a `DataError` that
names the file and, for lines, the line.
"""

from __future__ import annotations

import hashlib
import io
import sysconfig
import tempfile
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from calm_dist.data.corpus_files import CorpusFiles, CorpusPaths, find_files
from calm_dist.data.formats import (
    CorpusFile,
    Document,
    documents_in,
    format_of,
    open_file,
    quoted,
)
from calm_dist.errors import DataError
from calm_dist.files import file_sha256
from calm_dist.progress import Meter
from calm_dist.randomness import key_fraction

if TYPE_CHECKING:
    from calm_dist.data.tokenizer import Tokenizer

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

_TOKENIZER_BATCH_CHARACTERS = 1 << 20


def corpus_sha256(files: Iterable[CorpusFile]) -> str:
    """Fingerprint of the names and contents of corpus files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file_sha256(file.path)}\n".encode())
    return digest.hexdigest()


def iter_documents(paths: CorpusPaths) -> Iterator[Document]:
    """The documents of a corpus in the order of its files; blank texts are left out.

    Raises:
        DataError: see `find_files`; a file is damaged or truncated; a line is not JSON, has no
            text, or is not UTF-8; or no document of the corpus has content.
    """
    for _, _, document in _places_and_documents(find_files(paths)):
        yield document


def _places_and_documents(files: CorpusFiles) -> Iterator[tuple[CorpusFile, int, Document]]:
    """File, byte offset and document of each document."""
    empty = True
    for file in files:
        with open_file(file) as stream:
            for offset, document in documents_in(file, stream):
                empty = False
                yield file, offset, document
    if empty:
        raise _no_text(files)


class ShuffledDocuments:
    """The documents of a corpus in an order that is a function of ``seed`` and the files.

    Memory holds 16 bytes per document, not the text: the constructor records where each document
    starts, and iteration reads the documents in the new order. For that, compressed files are
    unpacked into a temporary directory (``TMPDIR`` chooses the disk).

    Raises:
        DataError: as `iter_documents`; the disk is full; a file changes while it is used.
    """

    def __init__(self, paths: CorpusPaths, seed: int) -> None:
        self._files = find_files(paths)
        self._scratch = tempfile.TemporaryDirectory(prefix="calm_dist_corpus_")
        self._plain = []
        places = []
        with Meter(None, label="read the corpus", unit="documents") as reading:
            for i, file in enumerate(self._files):
                plain, stream = self._open(i, file)
                offsets = []
                with stream:
                    for offset, _ in documents_in(file, stream):
                        offsets.append(offset)
                        reading.advance()
                self._plain.append(plain)
                places.append(np.stack([np.full(len(offsets), i), np.array(offsets, np.int64)], 1))
        in_order = np.concatenate(places)
        if not len(in_order):
            raise _no_text(self._files)
        self._places = np.random.default_rng(seed).permutation(in_order)

    def _open(self, number: int, file: CorpusFile) -> tuple[Path, io.BufferedReader]:
        """The path of a file's unpacked contents, complete once the stream has been read to its
        end, and the stream."""
        stream = open_file(file)
        if not format_of(file.path.name).compression:  # type: ignore[union-attr]
            return file.path, stream
        copy = Path(self._scratch.name, str(number))
        return copy, io.BufferedReader(_Copying(stream, copy), 1 << 20)

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Document]:
        return self.read(range(len(self)))

    def part(self, number: int, parts: int) -> range:
        """Positions, in the new order, of part ``number`` of ``parts`` parts of equal size."""
        start, end = (len(self) * bound // parts for bound in (number, number + 1))
        return range(start, end)

    def read(self, positions: range) -> Iterator[Document]:
        """The documents at ``positions`` of the new order; reads no others."""
        for i, offset in self._places[positions.start : positions.stop]:
            yield self._document(int(i), int(offset))

    def _document(self, number: int, offset: int) -> Document:
        file = self._files[number]
        try:
            with (
                self._plain[number].open("rb") as stream,
                closing(documents_in(file, stream, offset)) as documents,
            ):
                stream.seek(offset)
                found, document = next(documents)
            if found != offset:
                raise DataError(f"a document starts at byte {found} instead of {offset}")
        except (DataError, StopIteration, OSError) as error:
            raise DataError(
                f"corpus {file.path}: was changed while it was used (byte {offset}: "
                f"{str(error) or 'no document'}); start again"
            ) from error
        return document


class _Copying(io.RawIOBase):
    """A stream that copies everything read from it into a file."""

    def __init__(self, source: io.BufferedReader, target: Path) -> None:
        self._source, self._target = source, target
        self._sink: BinaryIO = target.open("wb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = self._source.readinto1(buffer)
        try:
            self._sink.write(buffer[:size])
            if not size:
                self._sink.flush()
        except OSError as error:
            raise DataError(
                f"{self._target.parent}: a compressed file of the corpus cannot be unpacked there "
                f"({error.strerror}); set TMPDIR to a directory on a larger disk"
            ) from error
        return size

    def close(self) -> None:
        self._source.close()
        self._sink.close()
        super().close()


def _no_text(files: Sequence[CorpusFile]) -> DataError:
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return DataError(f"corpus {files[0].path}{more}: holds no text")


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


def refuse_repeated_ids(known: DocumentIds, paths: CorpusPaths) -> None:
    """Refuse a corpus in which two documents have the same id and hence share a split.

    Args:
        known: the ids of the documents of ``paths``, in their order.
        paths: the corpus; it is read again to find file and line of both documents.

    Raises:
        DataError: there are such documents; the message names the id and both places.
    """
    pair = known.repeated()
    if pair is None:
        return
    places, document_id = [], ""
    for position, (file, offset, document) in enumerate(_places_and_documents(find_files(paths))):
        if position in pair:
            places.append(_place(file, offset))
            document_id = document.id
        if position == pair[1]:
            break
    raise _repeated_id(document_id, *places)


def _place(file: CorpusFile, offset: int) -> str:
    """File and line of a byte offset in the unpacked contents."""
    line = 1
    with open_file(file) as stream:
        while offset > 0 and (read := stream.read(min(offset, 1 << 20))):
            line, offset = line + read.count(b"\n"), offset - len(read)
    return f"{file.path}:{line}"


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
) -> Iterator[np.ndarray]:
    """Cut documents, in the order given, into blocks of exactly ``block_size`` tokens.

    Each document is preceded by 1 to ``patch_size`` begin tokens (the number is a function of
    ``seed`` and the document's id) and followed by one end token. A prompt that is left-padded with
    begin tokens to whole patches therefore looks like the training text. If one token is both, the
    begin tokens of the next document also end this one: with an additional end token, a whole patch
    of begin tokens could be followed by another begin token, which would end a generated text at
    once. Tokens after the last full block are dropped.

    Yields:
        uint32 arrays of shape [block_size].
    """
    waiting = np.empty(0, np.uint32)
    for batch in _batches(documents):
        pieces = [waiting]
        for document, tokens in zip(
            batch, tokenizer.encode_batch([document.text for document in batch]), strict=True
        ):
            num_begin = 1 + int(key_fraction(seed, "begin", document.id) * patch_size)
            pieces.append(np.full(num_begin, tokenizer.begin_id, np.uint32))
            pieces.append(np.array(tokens, np.uint32))
            if tokenizer.end_id != tokenizer.begin_id:
                pieces.append(np.array([tokenizer.end_id], np.uint32))
        waiting = np.concatenate(pieces)
        num_blocks = len(waiting) // block_size
        yield from waiting[: num_blocks * block_size].reshape(num_blocks, block_size)
        waiting = waiting[num_blocks * block_size :]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in groups of about a megabyte of text, for the tokenizer's threads."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _TOKENIZER_BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
