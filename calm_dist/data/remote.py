"""Stores in S3 and the other object stores that Streaming knows."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from streaming.base.storage import CloudDownloader, CloudUploader

from calm_dist.data.layout import INDEX, META, is_remote
from calm_dist.data.progress import progress
from calm_dist.data.shared_names import scratch_directory
from calm_dist.errors import DataError


@contextmanager
def fetch_meta(path: str) -> Iterator[Path]:
    """A temporary directory that holds ``meta.json`` of a remote store.

    Raises:
        DataError: the download failed.
    """
    with tempfile.TemporaryDirectory(prefix="calm_dist_meta_") as directory:
        _download(path, META, Path(directory))
        yield Path(directory)


def _download(path: str, name: str, directory: Path) -> None:
    try:
        CloudDownloader.direct_download(f"{path.rstrip('/')}/{name}", str(directory / name))
    except Exception as error:  # each cloud has exceptions of its own
        raise DataError(f"data store {path}: {name} cannot be downloaded ({error})") from error


def fetch_description(path: str, cache_dir: str | Path | None, fetch: bool = False) -> Path:
    """The local directory of a store: its own, or the one that a remote store is cached in.

    Args:
        path: as the user gave it.
        cache_dir: parent of all caches; None: this user's scratch directory on the node.
        fetch: download ``meta.json`` and ``index.json`` of a remote store. Shards that are
            cached stay if the store is still the same.

    Raises:
        DataError: the download failed.
    """
    if not is_remote(path):
        return Path(path)
    parent = Path(cache_dir) if cache_dir else scratch_directory()
    cache = parent / hashlib.sha256(path.encode()).hexdigest()[:16]
    if not fetch:
        return cache
    parent.mkdir(parents=True, exist_ok=True)
    # Its own for each process: nodes may share the parent of the cache.
    incoming = Path(tempfile.mkdtemp(prefix="incoming_", dir=parent))
    try:
        for name in (META, INDEX):
            _download(path, name, incoming)
    except DataError:
        shutil.rmtree(incoming)
        raise
    present = cache / META
    if not present.exists() or present.read_bytes() != (incoming / META).read_bytes():
        shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True, exist_ok=True)
    for name in (INDEX, META):
        (incoming / name).replace(cache / name)
    incoming.rmdir()
    return cache


def staging_directory(url: str) -> Path:
    """Where a store is written before it is uploaded to ``url``; the same after a kill."""
    return scratch_directory() / f"staging_{hashlib.sha256(url.encode()).hexdigest()[:16]}"


def upload_store(directory: Path, files: Sequence[str], url: str) -> None:
    """Upload a finished store, ``meta.json`` last, since it is what makes a store complete.

    Args:
        directory: of the finished store.
        files: names of its files besides ``meta.json`` and ``index.json``.
        url: where the store will be.

    Raises:
        DataError: the upload failed; the store stays in ``directory``.
    """
    try:
        uploader = CloudUploader.get((str(directory), url.rstrip("/")), True, exist_ok=True)
        names = (*files, INDEX, META)
        for name in progress(names, len(names), label="upload", unit="files"):
            uploader.upload_file(name)
    except Exception as error:  # each cloud has exceptions of its own
        raise DataError(
            f"--out {url}: cannot be uploaded ({error}); the store stays in {directory}, and the "
            "same command tries again"
        ) from error
