"""Tables of documents, one per row, read by pyarrow: Parquet, and Arrow as Hugging Face's
``save_to_disk`` writes it (IPC streams) or as IPC files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from calm_dist.errors import DataError
from calm_dist.text.compressed import DamagedFileError
from calm_dist.text.formats import (
    CorpusFile,
    Found,
    Problem,
    Reading,
    cannot_be_read,
    document,
    open_file,
    quoted,
)
from calm_dist.text.remote_files import is_url

if TYPE_CHECKING:
    import pyarrow

# Rows decoded at a time: few, because a row may hold a book; and fewer if rows are that large.
_ROWS = 32
_BATCH_BYTES = 8 << 20
_READ_BYTES = 1 << 20
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_IPC_FILE = b"ARROW1"


def groups(file: CorpusFile, kind: str, reading: Reading) -> list[tuple[int, int]] | None:
    """Where reading can start: number of rows and of bytes of text of each group of rows.

    Returns:
        Row groups of Parquet, record batches of Arrow; None for a remote stream of Arrow, which
        can only be read from its start.

    Raises:
        DataError: the file is damaged, or has no column of text.
    """
    with _errors(file):
        if kind == ".parquet":
            return _row_groups(file, reading)
        with closing(_Ipc(file)) as ipc:
            ipc.check(reading)
            if ipc.reader is None and is_url(file.path):
                return None
            return [(batch.num_rows, batch.nbytes) for batch in ipc.batches(0)]


def rows(
    file: CorpusFile, kind: str, start: int, end: int | None, reading: Reading
) -> Iterator[tuple[int, Found]]:
    """Number of each row of whole groups from ``start`` up to ``end``, and its document.

    Raises:
        DataError: as `groups`.
    """
    with _errors(file):
        batches = _parquet_batches if kind == ".parquet" else _arrow_batches
        row = start
        for batch in batches(file, start, end, reading):
            for texts, ids in _pieces(*batch):
                for text, given in zip(_values(texts), _values(ids, len(texts)), strict=True):
                    yield row, _record(file, row, text, given, reading)
                    row += 1


def _pieces(texts: Any, ids: Any) -> Iterator[tuple[Any, Any]]:
    """Columns cut into pieces of at most `_BATCH_BYTES` of text, or of one row."""
    half = len(texts) // 2
    if not half or texts.nbytes <= _BATCH_BYTES:
        yield texts, ids
        return
    for piece in (slice(half), slice(half, None)):
        yield from _pieces(texts[piece], None if ids is None else ids[piece])


def _record(file: CorpusFile, row: int, text: Any, given: Any, reading: Reading) -> Found:
    if isinstance(text, str):
        return document(file, row, text, given, reading)
    if isinstance(text, UnicodeDecodeError):
        return Problem("not UTF-8", f'its "{reading.text_key}" is not UTF-8 (byte {text.start})')
    return Problem("no text", f'its "{reading.text_key}" is null')


@contextmanager
def _errors(file: CorpusFile) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (DataError, MemoryError):
        raise
    # Some of them are also OSError or ValueError.
    except (pyarrow.ArrowException, EOFError, ValueError) as error:
        raise DamagedFileError(
            f"corpus {file.shown}: is damaged or cut off ({str(error)[:300]}); copy or write it "
            "again"
        ) from error
    except OSError as error:
        if error.errno is None:
            raise DamagedFileError(
                f"corpus {file.shown}: is damaged or cut off ({str(error)[:300]}); copy or write "
                "it again"
            ) from error
        raise cannot_be_read(file, error) from error


def _values(column: Any, length: int = 0) -> list[Any]:
    """The values of a column; instead of a value that is not UTF-8, the error; instead of a time
    that Python cannot hold, such as one with nanoseconds, its printed form."""
    if column is None:
        return [None] * length
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError):
        import pyarrow

        found: list[Any] = []
        for value in column:
            try:
                found.append(value.as_py())
            except UnicodeDecodeError as error:
                found.append(error)
            except (ValueError, OverflowError):
                found.append(value.cast(pyarrow.string()).as_py())
        return found


def _column(table: Any, key: str) -> Any:
    """The column of a key or of a dotted name; None if there is none."""
    import pyarrow.compute

    if key in table.schema.names:
        return table.column(key)
    if _field_type(table.schema, key) is None:
        return None
    first, *inner = key.split(".")
    return pyarrow.compute.struct_field(table.column(first), inner)


def _field_type(schema: pyarrow.Schema, key: str) -> Any:
    """The type of a key or dotted name in a schema; None if there is none."""
    import pyarrow

    if key in schema.names:
        return schema.field(key).type
    first, *inner = key.split(".")
    if first not in schema.names or not inner:
        return None
    found = schema.field(first).type
    for name in inner:
        if not pyarrow.types.is_struct(found) or found.get_field_index(name) < 0:
            return None
        found = found.field(name).type
    return found


def _check_schema(file: CorpusFile, schema: pyarrow.Schema, reading: Reading) -> list[str]:
    """The columns to read.

    Raises:
        DataError: there is no column of strings for the text, or several of the same name.
    """
    import pyarrow

    for key in (reading.text_key, reading.id_key):
        name = key if key in schema.names else key.partition(".")[0]
        if schema.names.count(name) > 1:
            raise DataError(
                f'corpus {file.shown}: has several columns "{quoted(name)}"; rename or drop all '
                "but one"
            )
    found = _field_type(schema, reading.text_key)
    types = pyarrow.types
    kind = found.value_type if found is not None and types.is_dictionary(found) else found
    if kind is None or not (
        types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    ):
        names = [quoted(name) for name in schema.names[:20]]
        what = f"is of type {str(found)[:80]}, not text" if found is not None else "is missing"
        raise DataError(
            f'corpus {file.shown}: its column "{reading.text_key}" {what} (columns {names}); '
            "--text-key names another one"
        )
    wanted = [reading.text_key]
    if _field_type(schema, reading.id_key) is not None:
        wanted.append(reading.id_key)
    return wanted


class _Parquet:
    """An open Parquet file."""

    def __init__(self, file: CorpusFile, reading: Reading) -> None:
        from pyarrow import parquet

        self._stream = open_file(file)
        try:
            # Buffered and without read-ahead: memory holds pages, not a whole group of rows.
            self.table = parquet.ParquetFile(
                self._stream, buffer_size=_READ_BYTES, pre_buffer=False
            )
            self.columns = _check_schema(file, self.table.schema_arrow, reading)
        except BaseException:
            self._stream.close()
            raise

    def close(self) -> None:
        self.table.close()
        self._stream.close()


def _row_groups(file: CorpusFile, reading: Reading) -> list[tuple[int, int]]:
    with closing(_Parquet(file, reading)) as opened:
        metadata = opened.table.metadata
        found = []
        for i in range(metadata.num_row_groups):
            group = metadata.row_group(i)
            found.append((group.num_rows, _text_bytes(group, reading)))
        return found


def _text_bytes(group: pyarrow.RowGroupMetaData, reading: Reading) -> int:
    columns = [group.column(j) for j in range(group.num_columns)]
    size = sum(
        column.total_uncompressed_size
        for column in columns
        if column.path_in_schema == reading.text_key
    )
    return int(size or group.total_byte_size)


def _parquet_batches(
    file: CorpusFile, start: int, end: int | None, reading: Reading
) -> Iterator[tuple[Any, Any]]:
    with closing(_Parquet(file, reading)) as opened:
        metadata = opened.table.metadata
        row, chosen, rows_at_once = 0, [], _ROWS
        for i in range(metadata.num_row_groups):
            group = metadata.row_group(i)
            if start <= row and (end is None or row < end):
                chosen.append(i)
                fitting = _BATCH_BYTES * group.num_rows // max(1, _text_bytes(group, reading))
                rows_at_once = min(rows_at_once, max(1, fitting))
            row += group.num_rows
        for batch in opened.table.iter_batches(
            rows_at_once, row_groups=chosen, columns=opened.columns, use_threads=False
        ):
            yield _column(batch, reading.text_key), _column(batch, reading.id_key)


class _Ipc:
    """An open file of Arrow's IPC format, stream or file.

    Attributes:
        reader: of a file; None for a stream.
    """

    def __init__(self, file: CorpusFile) -> None:
        import pyarrow

        self._file = file
        # Mapped, skipping batches costs no reading.
        self._source = (
            pyarrow.PythonFile(open_file(file), "r")
            if is_url(file.path)
            else pyarrow.memory_map(file.path)
        )
        try:
            magic = self._source.read(len(_IPC_FILE))
            size = self._source.size()
            self._source.seek(max(0, size - len(_END_OF_STREAM)))
            tail = self._source.read()
            self._source.seek(0)
            self.reader = None
            if magic == _IPC_FILE:
                self.reader = pyarrow.ipc.open_file(self._source)
                self.schema = self.reader.schema
                return
            # pyarrow takes a stream that was cut between two batches for a complete one. Streams
            # from before Arrow 0.15, whose messages begin otherwise, end in four zeros only.
            is_old = magic[:4] != _END_OF_STREAM[:4]
            if tail != _END_OF_STREAM and not (is_old and tail[4:] == bytes(4)):
                raise DamagedFileError(
                    f"corpus {file.shown}: is cut off: it has no end mark of an Arrow stream; copy "
                    "or write it again"
                )
            self._stream = pyarrow.ipc.open_stream(self._source)
            self.schema = self._stream.schema
        except BaseException:
            self._source.close()
            raise

    def check(self, reading: Reading) -> list[str]:
        return _check_schema(self._file, self.schema, reading)

    def batches(self, start: int) -> Iterator[Any]:
        """The batches from row ``start`` on, which is the first of a batch."""
        row = 0
        if self.reader is None:
            for batch in self._stream:
                if row >= start:
                    yield batch
                row += batch.num_rows
            return
        for i in range(self.reader.num_record_batches):
            batch = self.reader.get_batch(i)
            if row >= start:
                yield batch
            row += batch.num_rows

    def close(self) -> None:
        self._source.close()


def _arrow_batches(
    file: CorpusFile, start: int, end: int | None, reading: Reading
) -> Iterator[tuple[Any, Any]]:
    with closing(_Ipc(file)) as ipc:
        ipc.check(reading)
        row = start
        for batch in ipc.batches(start):
            if end is not None and row >= end:
                return
            for first in range(0, batch.num_rows, _ROWS):
                some = batch.slice(first, _ROWS)
                yield _column(some, reading.text_key), _column(some, reading.id_key)
            row += batch.num_rows
