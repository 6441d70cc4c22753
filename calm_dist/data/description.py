"""Where the files of a store are read: in its own directory, or in a cache that holds its
description and copies of its shards."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

from calm_dist.data.download import DEFAULT, Downloads
from calm_dist.data.layout import INDEX, META, is_remote
from calm_dist.data.remote import fetch_file
from calm_dist.data.shared_names import scratch_directory
from calm_dist.data.store import has_index, read_meta
from calm_dist.errors import DataError


def fetch_description(
    path: str,
    cache_dir: str | Path | None,
    fetch: bool = False,
    downloads: Downloads = DEFAULT,
) -> Path:
    """The local directory of a store: its own, or the cache of a remote or compressed store.

    Args:
        path: the store's path or URL, as the user gave it.
        cache_dir: parent of all caches; None: this user's scratch directory on the node.
        fetch: download ``meta.json`` and ``index.json`` of a remote store. Cached shards are kept
            if the store is still the same.
        downloads: retries and time limits.

    Raises:
        DataError: the download failed; `UnreachableError` if it may succeed later.
    """
    if not is_remote(path):
        if read_meta(path).compression is None:
            return Path(path)
        # A store at another path is another one, and this one may be named in several ways.
        path = str(Path(path).resolve())
    parent = Path(cache_dir) if cache_dir else scratch_directory()
    cache = parent / hashlib.sha256(path.encode()).hexdigest()[:16]
    if not fetch:
        return cache
    parent.mkdir(parents=True, exist_ok=True)
    # One per process, because nodes may share the parent of the cache.
    incoming = Path(tempfile.mkdtemp(prefix="incoming_", dir=parent))

    def get(name: str) -> None:
        if is_remote(path):
            fetch_file(path, name, incoming, downloads)
        else:
            shutil.copyfile(Path(path) / name, incoming / name)

    try:
        get(META)
        present = cache / META
        known = present.read_bytes() if present.exists() else None
        same = known == (incoming / META).read_bytes()
        if same and has_index(cache):
            # The index of a large store is large, and a second one may not fit on the disk.
            shutil.rmtree(incoming)
            return cache
        get(INDEX)
    except (DataError, OSError):
        shutil.rmtree(incoming)
        raise
    # Where there was none, another node may be putting the same files there now.
    if known is not None and not same:
        shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True, exist_ok=True)
    for name in (INDEX, META):
        (incoming / name).replace(cache / name)
    incoming.rmdir()
    return cache
