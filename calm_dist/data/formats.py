"""The formats of a corpus: which files are read, and how each becomes documents.

This is the only list of them. Messages, help texts and pages say `SUPPORTED`; a test compares.
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

# A longer .txt file is read as several documents, so that one big file can be split into train,
# valid and test, and is never held in memory as a whole.
TEXT_DOCUMENT_CHARACTERS = 100_000

JSON_LINE_BYTES = 256 << 20
"""The longest line of JSON that is read; a line is held in memory as a whole."""

_READ_BYTES = 1 << 20
_LONGEST_QUOTE = 80


@dataclass(frozen=True)
class Document:
    """One document; its ``id`` decides its split and how many begin tokens precede it."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """A file of a corpus, and the machine-independent name that document ids are made from."""

    path: Path
    name: str


# Takes file, stream and the byte at which it stands; gives byte offset and document of each.
Parser = Callable[[CorpusFile, io.BufferedReader, int], Iterator[tuple[int, Document]]]


@dataclass(frozen=True)
class Format:
    """What a file's name says: its kind of text, and its compression or ``""``."""

    kind: str
    compression: str

    @property
    def suffix(self) -> str:
        """As in a file's name, in lower case."""
        return self.kind + self.compression


def format_of(name: str) -> Format | None:
    """The format of a file of this name, or None where it is not one that is read."""
    name = name.lower()
    compression = next((suffix for suffix in CODECS if name.endswith(suffix)), "")
    name = name.removesuffix(compression)
    kind = next((suffix for suffix in PARSERS if name.endswith(suffix)), None)
    return None if kind is None else Format(kind, compression)


def unknown_format(path: str | Path) -> DataError:
    """The error for a file that was named although it is not in a format that is read."""
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
        DataError: it cannot be opened. Reading raises what `Unpacked` does.
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
    """Byte offset and document of each document; the stream stands at byte ``start``.

    Offsets are those of the unpacked contents. A document's id is its own, or a function of the
    file's name and the offset, so it is the same whether a file is read from its start or from the
    document's own place. Texts without content are left out.

    Raises:
        DataError: the file cannot be read, or a document is not as it should be.
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
    """One document a line; ``check_first`` sees the first line that is not blank."""
    number = 0
    while line := stream.readline(JSON_LINE_BYTES + 1):
        number += 1
        if len(line) > JSON_LINE_BYTES:
            raise DataError(
                f"corpus {file.path}:{number}: is longer than {JSON_LINE_BYTES >> 20} MiB, the "
                "limit of a line; give each document a line of its own, and cut longer ones"
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
    # Thousands of nested brackets exhaust the stack of the parser.
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
    """A name that a message can hold, however long it is."""
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
            f"corpus {file.path}: holds {found}, but lines of JSON are read: one object like "
            f'{{"text": "..."}} a line; convert it, for example with '
            f"jq -c '{'.[]' if 'array' in found else '.'}' {file.path.name} > documents.jsonl"
        )


def _single_value(line: bytes) -> str | None:
    """What a .json file with this first line holds, if not lines of JSON."""
    line = line.removeprefix(b"\xef\xbb\xbf").strip()
    if line.startswith(b"["):
        return "one JSON array"
    # No line that is an object of its own ends like this.
    several_lines = line.startswith(b"{") and line.endswith((b"{", b"[", b","))
    return "one JSON object over several lines" if several_lines else None


def holds_documents(file: CorpusFile) -> bool:
    """Whether a .json file of a directory is a part of the corpus, by its first line.

    Such directories have settings and descriptions in .json files beside the text. A file that is
    damaged counts as text, so that reading it names the damage.
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
    # UTF-8 has at most three such bytes in a row; more are an error that the decoder names.
    for _ in range(3):
        if len(line) >= limit and 0x80 <= int.from_bytes(stream.peek(1)[:1], "big") < 0xC0:
            line += stream.read(1)
    return line


PARSERS: dict[str, Parser] = {
    ".txt": _text_documents,
    ".jsonl": _json_documents,
    ".json": partial(_json_documents, check_first=_refuse_single_value),
}
"""The kinds of text, by suffix."""

NOT_YET = (".parquet", ".arrow")
"""Formats of corpora that are named where they are met, but not read."""


def _either(suffixes: list[str]) -> str:
    return f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"


SUPPORTED = f"{_either(list(PARSERS))} files, plain or with {_either(list(CODECS))}"
"""What may be given, in words."""
