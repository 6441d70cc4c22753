"""The file formats of a corpus and their parsers, which turn files into documents.

This is the only list of formats. Messages, help texts and pages show `SUPPORTED`; a test compares
them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from calm_dist.data.compressed import CODECS, Unpacked
from calm_dist.errors import DataError

# A longer .txt file is read as several documents, so that one large file can be split into train,
# valid and test, and is never held in memory as a whole.
TEXT_DOCUMENT_CHARACTERS = 100_000

JSON_LINE_BYTES = 256 << 20
"""Most bytes of a line of JSON; a line is held in memory as a whole."""

_READ_BYTES = 1 << 20
_LONGEST_QUOTE = 80


@dataclass(frozen=True)
class Document:
    """One document; its ``id`` decides its split and its number of begin tokens."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """A file of a corpus, with the machine-independent name that document ids are made from."""

    path: Path
    name: str


# Takes file, stream and the stream's byte position; yields byte offset and document.
Parser = Callable[[CorpusFile, io.BufferedReader, int], Iterator[tuple[int, Document]]]


@dataclass(frozen=True)
class Format:
    """The format that a file name implies: the kind of text, and the compression or ``""``."""

    kind: str
    compression: str

    @property
    def suffix(self) -> str:
        """The suffix of a file name, in lower case."""
        return self.kind + self.compression


def format_of(name: str) -> Format | None:
    """The format of a file of this name, or None if it is not supported."""
    name = name.lower()
    compression = next((suffix for suffix in CODECS if name.endswith(suffix)), "")
    name = name.removesuffix(compression)
    kind = next((suffix for suffix in PARSERS if name.endswith(suffix)), None)
    return None if kind is None else Format(kind, compression)


def unknown_format(path: str | Path) -> DataError:
    """The error for a given file in an unsupported format."""
    path = Path(path)
    if path.suffix.lower() in NOT_YET:
        return DataError(
            f"corpus {path}: {path.suffix.lower()} files cannot be read yet; convert it to lines "
            'of JSON, {"text": "..."}, in a .jsonl file'
        )
    return DataError(f"corpus {path}: unknown kind of file; give {SUPPORTED}")


def open_file(file: CorpusFile) -> io.BufferedReader:
    """The contents of a file, unpacked.

    Raises:
        DataError: it cannot be opened. Reading may raise the errors of `Unpacked`.
    """
    found = format_of(file.path.name)
    if found is None:
        raise unknown_format(file.path)
    try:
        stream = file.path.open("rb")
    except OSError as error:
        raise DataError(f"corpus {file.path}: cannot be read ({error.strerror})") from error
    if not found.compression:
        return stream
    return io.BufferedReader(Unpacked(file.path, stream, found.compression), _READ_BYTES)


def documents_in(
    file: CorpusFile, stream: io.BufferedReader, start: int = 0
) -> Generator[tuple[int, Document], None, None]:
    """Byte offset and document of each document; the stream is at byte ``start``.

    Offsets are those of the unpacked contents. A document's id is given in the file, or is a
    function of the file's name and the offset, so it is the same whether a file is read from its
    start or from the document's offset. Blank texts are left out.

    Raises:
        DataError: the file cannot be read, or a document is invalid.
    """
    found = format_of(file.path.name)
    if found is None:
        raise unknown_format(file.path)
    try:
        yield from PARSERS[found.kind](file, stream, start)
    except OSError as error:
        raise DataError(f"corpus {file.path}: cannot be read ({error.strerror})") from error


def _json_documents(
    file: CorpusFile,
    stream: io.BufferedReader,
    start: int,
    *,
    check_first: Callable[[CorpusFile, bytes], None] | None = None,
) -> Iterator[tuple[int, Document]]:
    """One document per line; ``check_first`` gets the first line that is not blank."""
    number = 0
    while line := stream.readline(JSON_LINE_BYTES + 1):
        number += 1
        if len(line) > JSON_LINE_BYTES:
            raise DataError(
                f"corpus {file.path}:{number}: is longer than {JSON_LINE_BYTES >> 20} MiB, the "
                "limit of a line; give each document its own line, and split longer ones"
            )
        if line.strip():
            if check_first is not None:
                check_first(file, line)
                check_first = None
            document = _json_document(file, line, start, number)
            if document is not None:
                yield start, document
        start += len(line)


def _json_document(file: CorpusFile, line: bytes, offset: int, number: int) -> Document | None:
    where = f"corpus {file.path}:{number}"
    try:
        record = json.loads(line)
    # Thousands of nested brackets exhaust the parser's stack.
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not a line of JSON in UTF-8 ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        found = _keys(record) if isinstance(record, dict) else type(record).__name__
        raise DataError(
            f'{where}: has no "text" string (found {found}); each line must be '
            'an object like {"text": "..."}'
        )
    text = record["text"]
    if not _encodable(text):
        raise DataError(f'{where}: "text" holds half of a surrogate pair (a \\ud8xx escape alone)')
    if not text.strip():
        return None
    given = record.get("id")
    if given is None:
        return Document(f"{file.name}@{offset}", text)
    if not _encodable(name := str(given)):
        raise DataError(f'{where}: "id" holds half of a surrogate pair (a \\ud8xx escape alone)')
    return Document(name, text)


def _keys(record: dict[str, Any]) -> str:
    names = sorted(record)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"keys {[quoted(name) for name in names[:8]]}{more}"


def quoted(text: str) -> str:
    """A name for a message, shortened if it is long."""
    return text if len(text) <= _LONGEST_QUOTE else text[:_LONGEST_QUOTE] + "…"


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_single_value(file: CorpusFile, line: bytes) -> None:
    if (found := _single_value(line)) is not None:
        raise DataError(
            f"corpus {file.path}: holds {found}, but must hold lines of JSON: one object like "
            f'{{"text": "..."}} per line; convert it, for example with '
            f"jq -c '{'.[]' if 'array' in found else '.'}' {file.path.name} > documents.jsonl"
        )


def _single_value(line: bytes) -> str | None:
    """Contents of a .json file with this first line, in words; None for lines of JSON."""
    line = line.removeprefix(b"\xef\xbb\xbf").strip()
    if line.startswith(b"["):
        return "one JSON array"
    # A line that is a complete object cannot end like this.
    several_lines = line.startswith(b"{") and line.endswith((b"{", b"[", b","))
    return "one JSON object over several lines" if several_lines else None


def holds_documents(file: CorpusFile) -> bool:
    """Whether a .json file in a directory is part of the corpus, judging by its first line.

    Directories of text may also hold settings and descriptions in .json files. A damaged file
    counts as text, so that reading it reports the damage.
    """
    try:
        with open_file(file) as stream:
            while (line := stream.readline(_READ_BYTES)) and not line.strip():
                pass
        if _single_value(line) is not None:
            return False
        record = json.loads(line) if line else {"text": ""}
    except (DataError, OSError, ValueError, RecursionError):
        return True
    return isinstance(record, dict) and "text" in record


def _text_documents(
    file: CorpusFile, stream: io.BufferedReader, start: int
) -> Iterator[tuple[int, Document]]:
    """A text file as one document, or as several of about `TEXT_DOCUMENT_CHARACTERS`.

    It is cut after the first empty line past that length, or after any line past twice that length.
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
    """A line, or its first ``limit`` bytes and the rest of the last character."""
    line = stream.readline(limit)
    # UTF-8 has at most three continuation bytes in a row; the decoder reports more as an error.
    for _ in range(3):
        if len(line) >= limit and 0x80 <= int.from_bytes(stream.peek(1)[:1], "big") < 0xC0:
            line += stream.read(1)
    return line


PARSERS: dict[str, Parser] = {
    ".txt": _text_documents,
    ".jsonl": _json_documents,
    ".json": partial(_json_documents, check_first=_refuse_single_value),
}
"""The kinds of text by suffix."""

NOT_YET = (".parquet", ".arrow")
"""Formats that are recognized but cannot be read."""


def _either(suffixes: list[str]) -> str:
    return f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"


SUPPORTED = f"{_either(list(PARSERS))} files, plain or with {_either(list(CODECS))}"
"""The supported files, in words."""
