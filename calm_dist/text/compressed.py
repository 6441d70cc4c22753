"""Streams over compressed files that raise an error if the file is truncated or has extra bytes.

The libraries' own file classes are not used: `lzma` and `bz2` silently drop bytes after the last
complete stream, and zstandard's reader accepts a truncated frame as complete.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from calm_dist.errors import DataError

# The dictionary of an .xz file may demand any amount of memory; files of `xz -9` need 65 MiB. So
# may the window of a .zst file, up to 2 GiB with `zstd --long=31`.
_MEMORY_BYTES = 1 << 30


class DamagedFileError(DataError):
    """A file is damaged or cut off; reading it again will not help."""


class FrameDecoder(Protocol):
    """Decodes one frame (gzip: member; xz and bzip2: stream), like `bz2.BZ2Decompressor`."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class _Adapted:
    """Wraps a library's decompressor; a subclass adds the rest of `FrameDecoder`."""

    needs_input = True

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    @property
    def eof(self) -> bool:
        return bool(self._inner.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._inner.unused_data)


class _Gzip(_Adapted):
    """zlib's decompressor, which verifies checksum and length."""

    def __init__(self) -> None:
        super().__init__(zlib.decompressobj(wbits=16 + zlib.MAX_WBITS))

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        text: bytes = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        # If the output is full, zlib may hold more output although all input is consumed.
        self.needs_input = len(text) < max_length and not self._inner.unconsumed_tail
        return text


class _Zstd(_Adapted):
    """zstandard's decompressor, which does not limit its output."""

    def __init__(self) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        super().__init__(zstandard.ZstdDecompressor(max_window_size=_MEMORY_BYTES).decompressobj())

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        try:
            return bytes(self._inner.decompress(data))
        except self._error as error:
            raise ValueError(str(error)) from error


@dataclass(frozen=True)
class Codec:
    """A compression.

    Attributes:
        command: unpacks a file in a shell.
        decoder: makes the decoder of a frame.
        step: bytes passed to a decoder at once.
        padding: whether zero bytes may follow the last frame, as tapes and `xz` leave them.
    """

    command: str
    decoder: Callable[[], FrameDecoder]
    step: int = 1 << 16
    padding: bool = False


CODECS = {
    ".gz": Codec("zcat", _Gzip, padding=True),
    ".xz": Codec(
        "xzcat", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, _MEMORY_BYTES), padding=True
    ),
    ".bz2": Codec("bzcat", bz2.BZ2Decompressor),
    # 4 bytes can expand to 128 KiB: a step gives at most 32 MiB.
    ".zst": Codec("zstdcat", _Zstd, step=1 << 10),
}
"""The supported compressions by suffix."""


class Unpacked(io.RawIOBase):
    """The contents of a compressed file of one or more frames.

    Reading raises:
        DamagedFileError: the file is empty, ends inside a frame, is damaged, or has other bytes
            after its last frame. A file that was cut exactly between two frames looks like a
            complete one.
    """

    def __init__(self, path: str, source: io.BufferedReader, suffix: str) -> None:
        self._path, self._source, self._suffix = path, source, suffix
        self._codec = CODECS[suffix]
        self._decoder: FrameDecoder | None = None
        self._frames = 0
        self._position = 0
        """Bytes read from the file, without those in `_ahead`."""
        self._ahead = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            if self._decoder is None and not self._next_frame():
                return 0
            self._decode(len(buffer))
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _take(self) -> bytes:
        data = self._ahead or self._source.read(self._codec.step)
        self._ahead = b""
        self._position += len(data)
        return data

    def _put_back(self, data: bytes) -> None:
        self._ahead = data
        self._position -= len(data)

    def _next_frame(self) -> bool:
        data = self._take()
        if self._codec.padding and self._frames:
            while data and not (data := data.lstrip(b"\0")):
                data = self._take()
        if not data:
            if not self._frames:
                raise DamagedFileError(
                    f"corpus {self._path}: is empty, not a {self._suffix} file; write it again or "
                    "remove it"
                )
            return False
        self._put_back(data)
        self._decoder = self._codec.decoder()
        return True

    def _decode(self, max_length: int) -> None:
        assert self._decoder is not None
        start, data = self._position, b""
        if self._decoder.needs_input:
            data = self._take()
            if not data:
                raise DamagedFileError(
                    f"corpus {self._path}: is cut off: it ends after byte {self._position}, inside "
                    f"its compressed frame {self._frames + 1}; copy or write it again"
                )
        try:
            self._ready = memoryview(self._decoder.decompress(data, max_length))
            finished = self._decoder.eof
        except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError) as error:
            if "memory" in str(error).lower():
                raise DamagedFileError(
                    f"corpus {self._path}: unpacking needs more memory than the limit of "
                    f"{_MEMORY_BYTES >> 20} MiB ({error}); compress it again with a smaller window "
                    "or dictionary (zstd --long=27, xz -9)"
                ) from error
            after = f", or other bytes follow its frame {self._frames}" if self._frames else ""
            raise DamagedFileError(
                f"corpus {self._path}: damaged {self._suffix} file, near byte {start}{after} "
                f"({error}); copy or write it again"
            ) from error
        if finished:
            self._frames += 1
            self._put_back(self._decoder.unused_data)
            self._decoder = None

    def close(self) -> None:
        self._source.close()
        super().close()
