"""Corpus files in object stores and behind other URLs, through fsspec.

pyarrow's own clients serve ``s3``, ``gs`` and ``abfs``: s3fs needs releases of botocore that the
S3 client of Streaming excludes. fsspec serves everything else.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from calm_dist.errors import DataError, UnreachableError
from calm_dist.redact import redact

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_READ_BYTES = 1 << 20
_ARROW = ("s3", "gs", "gcs", "abfs", "abfss")
# By name, since aiohttp, requests and httpx, whose errors they are, may not be installed.
_LOST_CONNECTION = ("ClientConnectionError", "ClientPayloadError", "ConnectionError", "Timeout",
                    "TransportError")  # fmt: skip
_ENDPOINTS = ("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


def is_url(path: str) -> bool:
    """Whether a path of a corpus is a URL."""
    return "://" in path


def open_url(url: str) -> io.BufferedReader:
    """A stream that can seek.

    Raises:
        OSError: the file cannot be opened.
        DataError: there is no client for such a URL, or it is misconfigured.
    """
    with _errors(url):
        files, path = _file_system(url)
        return io.BufferedReader(_Raw(url, files.open(path, "rb")), _READ_BYTES)


class _Raw(io.RawIOBase):
    """A file of fsspec with the methods that `io.BufferedReader` calls."""

    def __init__(self, url: str, file: Any) -> None:
        self._url, self._file = url, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        self._file.seek(place, whence)
        return int(self._file.tell())

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        with _errors(self._url, may_pass=True):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def find_urls(url: str) -> list[tuple[str, str, int, bool]]:
    """The files of a URL, which may be a file, a directory or a glob of both.

    Returns:
        URL, name (relative to the directory, if it is in one), size, and whether the URL or the
        glob gives the file itself; sorted.

    Raises:
        DataError: there is nothing, or it cannot be listed.
    """
    with _errors(url):
        files, path = _file_system(url)
        path = path.rstrip("/")
        scheme, _, rest = url.partition("://")
        host = rest.partition("/")[0]

        def to_url(place: str) -> str:
            if scheme.lower() in _ARROW:
                # Azure's paths begin with the container alone.
                return f"{scheme}://{host}/{place.partition('/')[2]}"
            return place if place.startswith(f"{scheme}://") else f"{scheme}://{place}"

        # A question mark begins the query of a URL and is not a wildcard.
        is_glob = "*" in path or "[" in path
        roots = sorted(files.glob(path)) if is_glob else [path]
        found = []
        for root in roots:
            info = files.info(root)
            if info["type"] == "file":
                # Without the query, which may hold a signature: the name becomes part of ids.
                name = root.partition("?")[0].rpartition("/")[2]
                found.append((to_url(root), name, int(info["size"] or 0), True))
                continue
            inside = files.find(root, detail=True)
            for place in sorted(inside, key=lambda place: place.split("/")):
                name = place.removeprefix(root.rstrip("/") + "/")
                found.append((to_url(place), name, int(inside[place]["size"] or 0), False))
        return found


@contextmanager
def _errors(url: str, *, may_pass: bool = False) -> Iterator[None]:
    """Turn the errors of a client into ours.

    Args:
        may_pass: the file could be opened, so that a lost connection is a fault of the moment.

    Raises:
        UnreachableError: the connection was lost.
        DataError: anything else.
    """
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        lost = may_pass and isinstance(error, ConnectionError | TimeoutError)
        raise (UnreachableError if lost else DataError)(
            f"corpus {redact(url)}: cannot be read ({redact(error.strerror or str(error))[:300]})"
        ) from error
    # Each client has errors of its own.
    except Exception as error:
        bases = {base.__name__ for base in type(error).__mro__}
        lost = may_pass and not bases.isdisjoint(_LOST_CONNECTION)
        raise (UnreachableError if lost else DataError)(
            f"corpus {redact(url)}: cannot be read ({type(error).__name__}: "
            f"{redact(str(error))[:300]})"
        ) from error


def _file_system(url: str) -> tuple[AbstractFileSystem, str]:
    from fsspec.core import url_to_fs

    scheme = url.partition("://")[0].lower()
    if scheme in _ARROW:
        host, _, inside = url.partition("://")[2].partition("/")
        files, root = _arrow_file_system(scheme, host)
        return files, f"{root}/{inside}"
    try:
        files, path = url_to_fs(url)
    except ImportError as error:
        raise DataError(
            f"corpus {redact(url)}: fsspec has no client for {scheme}:// here ({error})"
        ) from error
    return files, path


@lru_cache(maxsize=16)
def _arrow_file_system(scheme: str, host: str) -> tuple[AbstractFileSystem, str]:
    """The client, and the bucket or container as it names it."""
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow import fs

    if scheme != "s3":
        found, root = fs.FileSystem.from_uri(f"{scheme}://{host}/")
        return ArrowFSWrapper(found), root.strip("/")
    options: dict[str, Any] = {"connect_timeout": 30, "request_timeout": 120}
    # As Streaming's client does.
    endpoint = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), None)
    if endpoint is not None:
        options["endpoint_override"] = endpoint
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None and endpoint is None:
        region = fs.resolve_s3_region(host)
    return ArrowFSWrapper(fs.S3FileSystem(region=region or "us-east-1", **options)), host
