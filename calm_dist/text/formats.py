"""The file formats of a corpus and their parsers, which turn files into documents.

This is the only list of formats. Messages, help texts and pages show `SUPPORTED`; a test compares
them.
"""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from calm_dist.errors import DataError, unreadable
from calm_dist.redact import redact
from calm_dist.text.compressed import CODECS, Unpacked
from calm_dist.text.remote_files import is_url, open_url

TEXT_DOCUMENT_CHARACTERS = 100_000
"""A longer text is cut into several documents, so that one large file can be split into train,
valid and test, and is never held in memory as a whole."""

JSON_LINE_BYTES = 128 << 20
"""Most bytes of a line of JSON; a line is held in memory as a whole."""

STANDARD_INPUT_DIRECTORY = "calm_dist_stdin_"
"""How the name of a directory begins that holds a copy of standard input."""

STANDARD_INPUT_FILE = "stdin.jsonl"
"""The name of that copy."""

_READ_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_LONGEST_QUOTE = 80


@dataclass(frozen=True, slots=True)
class Document:
    """One document; its ``id`` decides its split and its number of begin tokens.

    Attributes:
        id: given in the file, or made from the file's name and the place in it.
        text: what is read.
        without_id: whether the id was made, as far as that is known.
    """

    id: str
    text: str
    without_id: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a line, a row or a piece of text is not a document.

    Attributes:
        reason: what reports count it as.
        message: a sentence about it, without its place.
    """

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """A file of a corpus.

    Attributes:
        path: its path or URL.
        name: the machine-independent name that document ids are made from.
        size: its bytes when it was found; -1 if it was not looked at.
    """

    path: str
    name: str
    size: int = -1

    @property
    def base_name(self) -> str:
        """The last part of the path; its suffixes give the format."""
        path = self.path.partition("?")[0] if is_url(self.path) else self.path
        return path.rpartition("/")[2]

    @property
    def shown(self) -> str:
        """The path for messages, without the secrets of a URL."""
        if self._is_standard_input:
            return "standard input"
        return redact(self.path) if is_url(self.path) else self.path

    def shown_line(self, line: int) -> str:
        """The path and the number of a line, counted from 1, for messages."""
        return f"{self.shown}{', line ' if self._is_standard_input else ':'}{line}"

    @property
    def _is_standard_input(self) -> bool:
        # By its path, which is all that the manifest of a store keeps of it.
        *_, directory, name = ("", *self.path.rsplit("/", 2))
        return name == STANDARD_INPUT_FILE and directory.startswith(STANDARD_INPUT_DIRECTORY)


class Reading(BaseModel):
    """What of a file becomes documents.

    Attributes:
        text_key: key or column of the text; dots separate the keys of nested objects.
        id_key: key or column of the document's id, which may be missing.
        min_chars: shorter documents are left out.
        dedup: of documents with the same text, only the first of the corpus is kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    text_key: Annotated[str, Field(min_length=1)] = "text"
    id_key: Annotated[str, Field(min_length=1)] = "id"
    min_chars: Annotated[int, Field(ge=0)] = 0
    dedup: bool = False


TEXT_AND_ID = Reading()
"""The default."""

Found = Document | Problem | None
"""A document, which may be blank; a fault; or None for an empty line."""

# Takes file, stream and the stream's byte position; yields the byte offset of each line or
# document, and what is there.
Parser = Callable[[CorpusFile, io.BufferedReader, int, Reading], Iterator[tuple[int, Found]]]


@dataclass(frozen=True)
class Format:
    """The format that a file name implies: the kind of text, and the compression or ``""``."""

    kind: str
    compression: str

    @property
    def suffix(self) -> str:
        """The suffix of a file name, in lower case."""
        return self.kind + self.compression

    @property
    def has_lines(self) -> bool:
        """Whether each line is a document."""
        return self.kind in LINES

    @property
    def can_start_anywhere(self) -> bool:
        """Whether reading can start at any line or group of rows."""
        return self.kind in TABLES or not (self.compression or self.kind in WHOLE)


def format_of(name: str) -> Format | None:
    """The format of a file of this name, or None if it is not supported."""
    name = name.lower()
    compression = next((suffix for suffix in CODECS if name.endswith(suffix)), "")
    kinds = PARSERS if compression else [*PARSERS, *TABLES]
    name = name.removesuffix(compression)
    kind = next((suffix for suffix in kinds if name.endswith(suffix)), None)
    return None if kind is None else Format(kind, compression)


def format_of_file(file: CorpusFile) -> Format:
    """The format of a corpus file.

    Raises:
        DataError: it is not supported.
    """
    found = format_of(file.base_name)
    if found is None:
        raise unknown_format(file.shown)
    return found


def unknown_format(path: str) -> DataError:
    """The error for a given file in an unsupported format."""
    return DataError(f"corpus {path}: unknown kind of file; give {SUPPORTED}")


def open_packed(file: CorpusFile) -> io.BufferedReader:
    """The bytes of a file as they are stored."""
    if is_url(file.path):
        return open_url(file.path)
    return open(file.path, "rb")


def open_file(file: CorpusFile, start: int = 0) -> io.BufferedReader:
    """The contents of a file, unpacked, from byte ``start`` on (0 for a compressed file).

    Raises:
        DataError: it cannot be opened. Reading may raise the errors of `Unpacked`.
    """
    found = format_of_file(file)
    try:
        stream = open_packed(file)
        if start:
            stream.seek(start)
    except OSError as error:
        raise cannot_be_read(file, error) from error
    if not found.compression:
        return stream
    return io.BufferedReader(Unpacked(file.shown, stream, found.compression), _READ_BYTES)


def cannot_be_read(file: CorpusFile, error: OSError) -> DataError:
    """The error for a file that the system cannot read."""
    what = f"corpus {file.shown}"
    return unreadable(what, error, f"{what}: cannot be read ({error.strerror or error})")


def skip_line(stream: io.BufferedReader) -> int:
    """Read to the end of a line, in pieces; the number of its bytes."""
    size = 0
    while part := stream.readline(_READ_BYTES):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size


def _json_records(
    file: CorpusFile,
    stream: io.BufferedReader,
    start: int,
    reading: Reading,
    *,
    check_first: Callable[[CorpusFile, bytes, Reading], None] | None = None,
) -> Iterator[tuple[int, Found]]:
    """One document per line; ``check_first`` gets the first line of a file that is not blank."""
    if start:
        check_first = None
    while line := stream.readline(JSON_LINE_BYTES + 1):
        size = len(line)
        if size > JSON_LINE_BYTES:
            ends = line.endswith(b"\n")
            del line
            yield start, Problem("line too long", (
                f"is longer than {JSON_LINE_BYTES >> 20} MiB, the limit of a line; give each "
                "document its own line, and split longer ones"
            ))  # fmt: skip
            start += size + (0 if ends else skip_line(stream))
            continue
        found: Found = None
        if not (line.isspace() or (not start and line.removeprefix(_BOM).isspace())):
            if check_first is not None:
                check_first(file, line, reading)
                check_first = None
            found = _json_record(file, line, start, reading)
        # Held until the next one is read, each would add to the largest memory.
        del line
        yield start, found
        del found
        start += size


def _json_record(file: CorpusFile, line: bytes, offset: int, reading: Reading) -> Found:
    try:
        record = json.loads(line)
    # Thousands of nested brackets exhaust the parser's stack.
    except (ValueError, RecursionError) as error:
        return Problem("not JSON", f"is not a line of JSON in UTF-8 ({error})")
    text = _value(record, reading.text_key)
    if not isinstance(text, str):
        found = _keys(record) if isinstance(record, dict) else type(record).__name__
        return Problem("no text", (
            f'has no "{reading.text_key}" string (found {found}); each line must be '
            f"an object like {_example(reading)}; --text-key names another key"
        ))  # fmt: skip
    return document(file, offset, text, _value(record, reading.id_key), reading)


def document(
    file: CorpusFile, place: int, text: str, given_id: Any, reading: Reading
) -> Document | Problem:
    """The document of a line or row; without an id of its own it gets one from its place."""
    if not _encodable(text):
        return Problem(
            "half a surrogate pair",
            f'"{reading.text_key}" holds half of a surrogate pair (a \\ud8xx escape alone)',
        )
    if given_id is None:
        return Document(f"{file.name}@{place}", text, without_id=True)
    if not _encodable(name := str(given_id)):
        return Problem(
            "half a surrogate pair",
            f'"{reading.id_key}" holds half of a surrogate pair (a \\ud8xx escape alone)',
        )
    return Document(name, text)


def _value(record: Any, key: str) -> Any:
    """The value of a key. A dotted name that is not itself a key is looked up in nested objects."""
    if not isinstance(record, dict):
        return None
    if key in record or "." not in key:
        return record.get(key)
    for part in key.split("."):
        if not isinstance(record, dict):
            return None
        record = record.get(part)
    return record


def _example(reading: Reading) -> str:
    """A line as it must be, for messages."""
    value: Any = "..."
    for name in reversed(reading.text_key.split(".")):
        value = {name: value}
    return json.dumps(value, ensure_ascii=False)


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


def _refuse_single_value(file: CorpusFile, line: bytes, reading: Reading) -> None:
    if (found := _single_value(line)) is not None:
        values = ".[]" if "array" in found else "."
        compression = format_of_file(file).compression
        quoted_name = shlex.quote(file.base_name)
        convert = f"jq -c '{values}' {quoted_name}"
        if compression:
            convert = f"{CODECS[compression].command} {quoted_name} | jq -c '{values}'"
        raise DataError(
            f"corpus {file.shown}: holds {found}, but must hold lines of JSON: one object like "
            f"{_example(reading)} per line; convert it, for example with "
            f"{convert} > documents.jsonl"
        )


def _single_value(line: bytes) -> str | None:
    """Contents of a .json file with this first line, or the beginning of a long one, in words; None
    for lines of JSON."""
    is_whole = len(line) < _READ_BYTES or line.endswith(b"\n")
    line = line.removeprefix(_BOM).strip()
    if line.startswith(b"["):
        return "one JSON array"
    # A line that is a complete object cannot end like this.
    several_lines = is_whole and line.startswith(b"{") and line.endswith((b"{", b"[", b","))
    return "one JSON object over several lines" if several_lines else None


def holds_documents(file: CorpusFile, reading: Reading = TEXT_AND_ID) -> bool:
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
        record = json.loads(line) if line else {reading.text_key: ""}
    except (DataError, OSError, ValueError, RecursionError):
        return True
    return _value(record, reading.text_key) is not None


def _text_records(
    file: CorpusFile, stream: io.BufferedReader, start: int, reading: Reading
) -> Iterator[tuple[int, Found]]:
    """A text file as one document, or as several of about `TEXT_DOCUMENT_CHARACTERS`.

    It is cut after the first empty line past that length, or after any line past twice that length.
    """
    offset = start
    lines: list[str] = []
    length = 0

    def piece() -> tuple[int, Document]:
        name = file.name if not start else f"{file.name}@{start}"
        return start, Document(name, "".join(lines), without_id=True)

    while line := _read_line(stream, TEXT_DOCUMENT_CHARACTERS):
        try:
            lines.append(line.decode("utf-8-sig" if not offset else "utf-8"))
        except UnicodeDecodeError as error:
            yield (
                offset,
                Problem(
                    "not UTF-8",
                    f"is not UTF-8 text (byte {offset + error.start}); convert it first",
                ),
            )
            lines.append("")
        offset += len(line)
        length += len(lines[-1])
        paragraph_ends = length >= TEXT_DOCUMENT_CHARACTERS and not line.strip()
        if paragraph_ends or length >= 2 * TEXT_DOCUMENT_CHARACTERS:
            yield piece()
            start, lines, length = offset, [], 0
    if lines:
        yield piece()


def _read_line(stream: io.BufferedReader, limit: int) -> bytes:
    """A line, or its first ``limit`` bytes and the rest of the last character."""
    line = stream.readline(limit)
    # UTF-8 has at most three continuation bytes in a row; the decoder reports more as an error.
    for _ in range(3):
        if len(line) >= limit and 0x80 <= int.from_bytes(stream.peek(1)[:1], "big") < 0xC0:
            line += stream.read(1)
    return line


PARSERS: dict[str, Parser] = {
    ".txt": _text_records,
    ".jsonl": _json_records,
    ".json": partial(_json_records, check_first=_refuse_single_value),
}
"""The kinds of text by suffix."""

LINES = (".jsonl", ".json")
"""The kinds in which each line is a document."""

WHOLE: tuple[str, ...] = ()
"""The kinds of text whose documents may continue past the end of any line: a file is one unit, of
any size, and is never read from the middle."""

TABLES = (".parquet", ".arrow")
"""The kinds of tables, which pyarrow reads; see `calm_dist.text.tables`."""


def _either(suffixes: list[str]) -> str:
    return f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"


SUPPORTED = (
    f"{_either(list(PARSERS))} files, plain or with {_either(list(CODECS))}, and "
    f"{_either(list(TABLES))} files"
)
"""The supported files, in words."""
