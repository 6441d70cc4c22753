"""Stores in S3 and other object stores that Streaming supports."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from calm_dist.compat.streaming import CloudUploader
from calm_dist.data.download import DEFAULT, Downloads, check_address, downloader_for, transfer
from calm_dist.data.layout import INDEX, META
from calm_dist.data.shared_names import scratch_directory
from calm_dist.errors import DataError
from calm_dist.progress import progress
from calm_dist.redact import redact


@contextmanager
def fetch_meta(path: str, downloads: Downloads) -> Iterator[Path]:
    """A temporary directory that holds ``meta.json`` of a remote store.

    Raises:
        DataError: the download failed; `UnreachableError` if it may succeed later.
    """
    with tempfile.TemporaryDirectory(prefix="calm_dist_meta_") as directory:
        fetch_file(path, META, Path(directory), downloads)
        yield Path(directory)


def fetch_file(path: str, name: str, directory: Path, downloads: Downloads) -> None:
    """Download a file of a store into a directory.

    Raises:
        DataError: the download failed; `UnreachableError` if it may succeed later.
    """
    check_address(path)

    def attempt() -> None:
        downloader = downloader_for(path)
        try:
            downloader.download(
                f"{path.rstrip('/')}/{name}", str(directory / name), downloads.timeout_seconds
            )
        finally:
            downloader.clean_up()

    transfer(attempt, f"data store {redact(path)}: {name}", downloads)


def staging_directory(url: str) -> Path:
    """The directory where a store is written before upload to ``url``; the same after a kill."""
    return scratch_directory() / f"staging_{hashlib.sha256(url.encode()).hexdigest()[:16]}"


def upload_store(directory: Path, files: Sequence[str], url: str) -> None:
    """Upload a finished store; ``meta.json`` comes last, because it marks a store as complete.

    Args:
        directory: directory of the finished store.
        files: names of its files besides ``meta.json`` and ``index.json``.
        url: address of the store after the upload.

    Raises:
        DataError: the upload failed; the store stays in ``directory``. `UnreachableError` if it may
            succeed later.
    """
    uploaders: list[CloudUploader] = []

    def upload(name: str) -> None:
        if not uploaders:
            # Its construction checks for the bucket.
            place = (str(directory), url.rstrip("/"))
            uploaders.append(CloudUploader.get(place, True, retry=1, exist_ok=True))
        uploaders[0].upload_file(name)

    names = (*files, INDEX, META)
    try:
        for name in progress(names, len(names), label="upload", unit="files"):
            what = f"--out {redact(url)}:"
            transfer(partial(upload, name), what, DEFAULT, verb="uploaded")
    except DataError as error:
        raise type(error)(
            f"{error}; the store stays in {directory}, run the same command again to retry"
        ) from error
