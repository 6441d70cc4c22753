"""Streams over compressed files, which end with an error where the file does not end as it should.

The standard library's own file classes are not used: `lzma` and `bz2` drop what follows the last
whole stream without an error, and zstandard's reader takes a frame that ends early for a whole one.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from calm_dist.errors import DataError

# The dictionary of an .xz file may demand any amount of memory; `xz -9` makes files of 65 MiB. So
# may the window of a .zst file, up to 2 GiB with `zstd --long=31`.
_MEMORY_BYTES = 1 << 30


class Decoder(Protocol):
    """Decodes one frame (gzip: member; xz and bzip2: stream), as `bz2.BZ2Decompressor` does."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class _Adapted:
    """A library's object, given the rest of the interface of `Decoder` by a subclass."""

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
    """zlib's; it checks the checksum and the length."""

    def __init__(self) -> None:
        super().__init__(zlib.decompressobj(wbits=16 + zlib.MAX_WBITS))

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        text: bytes = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        # Where the output is full, zlib may hold more of it without any input left.
        self.needs_input = len(text) < max_length and not self._inner.unconsumed_tail
        return text


class _Zstd(_Adapted):
    """zstandard's, which has no limit on the output."""

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
    """A compression: how its frames are decoded.

    Attributes:
        decoder: makes the decoder of a frame.
        step: bytes that a decoder is given at once.
        padding: whether zero bytes may follow the last frame, as tapes and `xz` leave them.
    """

    decoder: Callable[[], Decoder]
    step: int = 1 << 16
    padding: bool = False


CODECS = {
    ".gz": Codec(_Gzip, padding=True),
    ".xz": Codec(lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, _MEMORY_BYTES), padding=True),
    ".bz2": Codec(bz2.BZ2Decompressor),
    # 4 bytes can stand for 128 KiB: a step gives at most 32 MiB.
    ".zst": Codec(_Zstd, step=1 << 10),
}
"""The compressions that a corpus may have, by suffix."""


class Unpacked(io.RawIOBase):
    """The contents of a compressed file of one or more frames.

    Reading raises:
        DataError: the file is empty, ends inside a frame, is damaged, or holds something else
            after its last frame. A file that was cut exactly between two frames cannot be told
            from a whole one.
    """

    def __init__(self, path: Path, source: io.BufferedReader, suffix: str) -> None:
        self._path, self._source, self._suffix = path, source, suffix
        self._codec = CODECS[suffix]
        self._decoder: Decoder | None = None
        self._frames = 0
        self._position = 0
        """Bytes of the file that were read, without those in `_ahead`."""
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
                raise DataError(
                    f"corpus {self._path}: is empty, and no {self._suffix} file; write it again or "
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
                raise DataError(
                    f"corpus {self._path}: is cut off: it ends after byte {self._position}, inside "
                    f"its compressed frame {self._frames + 1}; copy or write it again"
                )
        try:
            self._ready = memoryview(self._decoder.decompress(data, max_length))
            finished = self._decoder.eof
        except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError) as error:
            if "memory" in str(error).lower():
                raise DataError(
                    f"corpus {self._path}: needs more than {_MEMORY_BYTES >> 20} MiB of memory to "
                    f"unpack, the limit ({error}); compress it again with a smaller window or "
                    "dictionary (zstd --long=27, xz -9)"
                ) from error
            after = f", or other bytes follow its frame {self._frames}" if self._frames else ""
            raise DataError(
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
