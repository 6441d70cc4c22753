"""Text corpora: files to documents, splits, and blocks of tokens.

A corpus is any mix of ``.txt``, ``.jsonl`` (one ``{"text": ...}`` a line, ``"id"`` optional) and
``.jsonl.zst`` files, directories of them and globs. Every fault of a file is a `DataError` that
names the file and, for lines, the line.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import shutil
import sysconfig
import tempfile
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calm_dist.data.progress import Meter
from calm_dist.errors import DataError
from calm_dist.files import file_sha256

if TYPE_CHECKING:
    import zstandard

    from calm_dist.data.tokenizer import Tokenizer

SUFFIXES = (".txt", ".jsonl", ".jsonl.zst")
SPLITS = ("train", "valid", "test")

# A longer .txt file is read as several documents, so that one big file can be split into train,
# valid and test, and is never held in memory as a whole.
TEXT_DOCUMENT_CHARACTERS = 100_000

# Parts of the standard library's directory that are not its text: installed packages, tests,
# programs, and the machine-made tables of character sets.
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


@dataclass(frozen=True)
class Document:
    """One document; its ``id`` decides its split and how many begin tokens precede it."""

    id: str
    text: str


@dataclass(frozen=True)
class CorpusFile:
    """A file of a corpus, and the machine-independent name that document ids are made from."""

    path: Path
    name: str


def find_files(paths: Iterable[str | Path]) -> list[CorpusFile]:
    """The corpus files behind files, directories and globs, in a fixed order.

    Raises:
        DataError: a path that does not exist, a glob without match, a directory without corpus
            files, or a file of another kind.
    """
    found: list[CorpusFile] = []
    for given in paths:
        if not str(given):
            raise DataError("corpus: an empty path; an unset variable on the command line?")
        matches = [Path(given)]
        if not matches[0].exists():
            matches = sorted(Path(match) for match in glob.glob(str(given), recursive=True))
        if not matches:
            raise DataError(
                f"corpus {given}: no such file or directory; give .txt, .jsonl or .jsonl.zst "
                "files, or directories or globs of them"
            )
        for match in matches:
            found += _files_of(match)
    if not found:
        raise DataError("corpus: no path was given; name at least one file or directory")
    repeated = [file.path for i, file in enumerate(found) if file in found[:i]]
    if repeated:
        raise DataError(f"corpus {repeated[0]}: is named twice; name each file once")
    return found


def _files_of(path: Path) -> list[CorpusFile]:
    if path.is_dir():
        inside = sorted(
            entry
            for entry in path.rglob("*")
            if entry.is_file()
            and entry.name.endswith(SUFFIXES)
            and not any(part.startswith(".") for part in entry.relative_to(path).parts)
        )
        if not inside:
            raise DataError(f"corpus {path}: this directory holds no {', '.join(SUFFIXES)} file")
        return [CorpusFile(entry, entry.relative_to(path).as_posix()) for entry in inside]
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"corpus {path}: unknown kind of file; known are {', '.join(SUFFIXES)}")
    return [CorpusFile(path, path.name)]


def corpus_sha256(files: Iterable[CorpusFile]) -> str:
    """Fingerprint of the names and contents of corpus files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file_sha256(file.path)}\n".encode())
    return digest.hexdigest()


def iter_documents(paths: Iterable[str | Path]) -> Iterator[Document]:
    """The documents of a corpus in the order of its files; texts without content are left out.

    Raises:
        DataError: see `find_files`; a line that is not JSON, has no text, or is not UTF-8; a
            corpus in which no document has content.
    """
    files = find_files(paths)
    empty = True
    for file in files:
        with _open_plain(file.path) as stream:
            for _, document in _documents_in(file, stream):
                empty = False
                yield document
    if empty:
        raise _no_text(files)


class ShuffledDocuments:
    """The documents of a corpus in an order that is a function of ``seed`` and the files.

    Memory holds 16 bytes a document, not the text: a first pass, in the constructor, notes where
    each document starts; iteration reads them in the new order. Compressed files are unpacked
    into a temporary directory for that (``TMPDIR`` chooses the disk).

    Raises:
        DataError: as `iter_documents`.
    """

    def __init__(self, paths: Iterable[str | Path], seed: int) -> None:
        self._files = find_files(paths)
        self._scratch = tempfile.TemporaryDirectory(prefix="calm_dist_corpus_")
        scratch = Path(self._scratch.name)
        self._plain = [_unpacked(file, scratch / str(i)) for i, file in enumerate(self._files)]
        places = []
        reading = Meter(None, label="read the corpus", unit="documents")
        for i, (file, path) in enumerate(zip(self._files, self._plain, strict=True)):
            offsets = []
            with path.open("rb") as stream:
                for offset, _ in _documents_in(file, stream):
                    offsets.append(offset)
                    reading.advance()
            places.append(np.stack([np.full(len(offsets), i), np.array(offsets, np.int64)], 1))
        reading.close()
        in_order = np.concatenate(places)
        if not len(in_order):
            raise _no_text(self._files)
        self._places = np.random.default_rng(seed).permutation(in_order)

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Document]:
        return self.read(range(len(self)))

    def part(self, number: int, parts: int) -> range:
        """Positions, in the new order, of one of ``parts`` parts of equally many documents."""
        start, end = (len(self) * bound // parts for bound in (number, number + 1))
        return range(start, end)

    def read(self, positions: range) -> Iterator[Document]:
        """The documents at some positions of the new order; no others are read."""
        for i, offset in self._places[positions.start : positions.stop]:
            with self._plain[i].open("rb") as stream:
                stream.seek(offset)
                yield next(_documents_in(self._files[i], stream, int(offset)))[1]


def _no_text(files: Sequence[CorpusFile]) -> DataError:
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return DataError(f"corpus {files[0].path}{more}: holds no text")


def _unpacked(file: CorpusFile, target: Path) -> Path:
    if file.path.suffix != ".zst":
        return file.path
    with _open_plain(file.path) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink)
    return target


def _open_plain(path: Path) -> io.BufferedReader:
    try:
        stream = path.open("rb")
    except OSError as error:
        raise DataError(f"corpus {path}: cannot be read ({error.strerror})") from error
    if path.suffix != ".zst":
        return stream
    import zstandard

    reader = zstandard.ZstdDecompressor().stream_reader(
        stream, read_across_frames=True, closefd=True
    )
    return io.BufferedReader(_ZstdErrors(path, reader))


class _ZstdErrors(io.RawIOBase):
    """A raw stream over a zstd reader whose faults name the file."""

    def __init__(self, path: Path, reader: zstandard.ZstdDecompressionReader) -> None:
        self._path, self._reader = path, reader

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        import zstandard

        try:
            data = self._reader.read(len(buffer))
        except zstandard.ZstdError as error:
            raise DataError(f"corpus {self._path}: damaged zstd file ({error})") from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._reader.close()
        super().close()


def _documents_in(
    file: CorpusFile, stream: io.BufferedReader, start: int = 0
) -> Iterator[tuple[int, Document]]:
    """Byte offset and document of each document; the stream stands at byte ``start``.

    A document's id is a function of the file's name and the offset, so it is the same whether a
    file is read from its start or from the document's own place.
    """
    if file.path.name.endswith(".txt"):
        yield from _text_documents(file, stream, start)
        return
    number = 0
    while line := stream.readline():
        number += 1
        document = _json_document(file, line, start, number)
        if document is not None:
            yield start, document
        start += len(line)


def _json_document(file: CorpusFile, line: bytes, offset: int, number: int) -> Document | None:
    if not line.strip():
        return None
    where = f"corpus {file.path}:{number}"
    try:
        record = json.loads(line)
    # Thousands of nested brackets exhaust the stack of the parser.
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not a line of JSON in UTF-8 ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        found = f"keys {sorted(record)}" if isinstance(record, dict) else type(record).__name__
        raise DataError(
            f'{where}: has no "text" string (found {found}); each line must be '
            'an object like {"text": "..."}'
        )
    if not _encodable(record["text"]):
        raise DataError(f'{where}: "text" holds half of a surrogate pair (a \\ud8xx escape alone)')
    if not record["text"].strip():
        return None
    return Document(str(record.get("id", f"{file.name}@{offset}")), record["text"])


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text_documents(
    file: CorpusFile, stream: io.BufferedReader, start: int
) -> Iterator[tuple[int, Document]]:
    """A text file as one document, or as several of about `TEXT_DOCUMENT_CHARACTERS`.

    A cut is made after the first empty line past that length, or after any line past twice it.
    """
    offset = start
    lines: list[str] = []
    length = 0

    def document() -> tuple[int, Document]:
        return start, Document(file.name if not start else f"{file.name}@{start}", "".join(lines))

    while line := _read_line(stream, TEXT_DOCUMENT_CHARACTERS):
        try:
            lines.append(line.decode("utf-8-sig" if not offset else "utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"corpus {file.path}: is not UTF-8 text (byte {offset + error.start}); "
                "convert it first"
            ) from error
        offset += len(line)
        length += len(lines[-1])
        paragraph_ends = length >= TEXT_DOCUMENT_CHARACTERS and not line.strip()
        if paragraph_ends or length >= 2 * TEXT_DOCUMENT_CHARACTERS:
            if any(part.strip() for part in lines):
                yield document()
            start, lines, length = offset, [], 0
    if any(part.strip() for part in lines):
        yield document()


def _read_line(stream: io.BufferedReader, limit: int) -> bytes:
    """A line, or its first ``limit`` bytes and what completes the character there."""
    line = stream.readline(limit)
    while len(line) >= limit and 0x80 <= int.from_bytes(stream.peek(1)[:1], "big") < 0xC0:
        line += stream.read(1)
    return line


def standard_library_documents() -> list[Document]:
    """The source files of the running Python's standard library, sorted by name.

    Each document is one file with its docstrings and comments. Files that do not decode are left
    out, as are tests, installed packages and machine-made tables.

    Raises:
        DataError: this Python carries no source files.
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


def split_documents(ids: Sequence[str], seed: int) -> dict[str, list[int]]:
    """Divide documents into train, valid and test, about 90, 5 and 5 percent.

    A document's split depends on ``(seed, id)`` alone; only where valid or test would stay empty,
    the document that came nearest to it is moved there. Documents of one id stay together.

    Returns:
        For each split the positions in ``ids``, ascending.

    Raises:
        DataError: fewer than 3 different documents.
    """
    distinct = sorted(set(ids))
    if len(distinct) < len(SPLITS):
        raise DataError(
            f"corpus: {len(distinct)} document(s) cannot be split into train, valid and test; "
            f"give at least {len(SPLITS)} documents (files, or lines of .jsonl)"
        )
    places = {name: _fraction(seed, "split", name) for name in distinct}
    by_place = sorted(distinct, key=lambda name: places[name])
    num_test = max(1, sum(place >= 0.95 for place in places.values()))
    num_valid = max(1, sum(0.9 <= place < 0.95 for place in places.values()))
    # Test may not take what valid and train need.
    num_test = min(num_test, len(distinct) - 2)
    num_valid = min(num_valid, len(distinct) - num_test - 1)
    valid_from = len(distinct) - num_test - num_valid
    split_of = {
        name: SPLITS[(rank >= valid_from) + (rank >= valid_from + num_valid)]
        for rank, name in enumerate(by_place)
    }
    splits: dict[str, list[int]] = {split: [] for split in SPLITS}
    for position, name in enumerate(ids):
        splits[split_of[name]].append(position)
    return splits


def _fraction(seed: int, kind: str, document_id: str) -> float:
    """A number in [0, 1) that is a function of its arguments alone."""
    digest = hashlib.sha256(f"{seed}\0{kind}\0{document_id}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def pack_blocks(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    block_size: int,
    patch_size: int,
    seed: int,
) -> Iterator[np.ndarray]:
    """Cut documents, in the order given, into blocks of exactly ``block_size`` tokens.

    Each document stands between 1 to ``patch_size`` begin tokens (how many is a function of
    ``seed`` and the document's id) and one end token. A prompt that is left-filled with begin
    tokens to whole patches therefore looks like the training text. Where one token is both, the
    begin tokens of the next document are the end of this one: with one more, a patch of begin
    tokens could be followed by another, which would end a generated text at once. Tokens after the
    last full block are dropped.

    Yields:
        uint32 arrays of shape [block_size].
    """
    waiting = np.empty(0, np.uint32)
    for batch in _batches(documents):
        pieces = [waiting]
        for document, tokens in zip(
            batch, tokenizer.encode_batch([document.text for document in batch]), strict=True
        ):
            num_begin = 1 + int(_fraction(seed, "begin", document.id) * patch_size)
            pieces.append(np.full(num_begin, tokenizer.begin_id, np.uint32))
            pieces.append(np.array(tokens, np.uint32))
            if tokenizer.end_id != tokenizer.begin_id:
                pieces.append(np.array([tokenizer.end_id], np.uint32))
        waiting = np.concatenate(pieces)
        num_blocks = len(waiting) // block_size
        yield from waiting[: num_blocks * block_size].reshape(num_blocks, block_size)
        waiting = waiting[num_blocks * block_size :]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in groups of about a megabyte of text, for the tokenizer's own threads."""
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
