"""A limit on the disk space that downloaded shards take on a node.

MosaicML Streaming 0.13.0 has such a limit, but reserves no space for downloads in progress, so that
R readers exceed it by up to 3 R shards, deletes shards of stores on local disk, and waits forever
for a shard that is evicted in the 7 ms before it looks at it. So its limit stays unset, and its
shared table of shards is managed here.
"""

from __future__ import annotations

import logging
import os
import time
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from calm_dist.compat.streaming import Reader, ShardState, StreamingDataset
from calm_dist.data.download import InterruptedTransferError
from calm_dist.data.layout import INDEX, META
from calm_dist.data.store import Shard, StoreMeta
from calm_dist.errors import DataError
from calm_dist.log import NOTE

_log = logging.getLogger(__name__)

_PAUSE_SECONDS = 0.007
# A reader holds one shard while it downloads another.
_SHARDS_PER_READER = 2
_LEAST_SHARDS = 4
# An attempt to download ends long before.
_ABANDONED_SECONDS = 6 * 3600.0


class CacheableStore(Protocol):
    """A `guard.OpenedStore`."""

    @property
    def directory(self) -> Path: ...

    @property
    def meta(self) -> StoreMeta: ...

    @property
    def shards(self) -> list[Shard]: ...

    @property
    def is_cached(self) -> bool: ...


def overhead_bytes(source: CacheableStore) -> int:
    """Bytes of a store's description, which stays in the cache."""
    return sum((source.directory / name).stat().st_size for name in (INDEX, META))


def check_limit(
    limit: int, sources: Sequence[CacheableStore], readers: int, paths: int, spread: int
) -> None:
    """Check that a limit has room for what the readers of a node need at once.

    Args:
        limit: bytes on this node, for all its remote stores together.
        sources: all stores; those on local disk take nothing from the limit.
        readers: processes of the node that read: ranks, or their reader processes.
        paths: paths through the shards that this node follows at the same time.
        spread: blocks over which a shard is spread on its path.

    Raises:
        DataError: the limit is too small; the message gives the smallest one that works.
    """
    cached = [source for source in sources if source.is_cached]
    if not cached:
        return
    largest = max(shard.most_bytes for source in cached for shard in source.shards)
    fixed = sum(map(overhead_bytes, cached))
    least = fixed + max(_LEAST_SHARDS, _SHARDS_PER_READER * readers) * largest
    if limit < least:
        raise DataError(
            f"data.cache_limit={limit}: the {readers} reader(s) of a node need {least} bytes: "
            f"{max(_LEAST_SHARDS, _SHARDS_PER_READER * readers)} shards of up to {largest} bytes, "
            f"and {fixed} for the descriptions of the stores; set data.cache_limit to {least} or "
            "more, use fewer data.num_workers, or encode with a smaller --shard-mib"
        )
    wanted, whole = fixed, fixed
    for source in cached:
        size = sum(shard.most_bytes for shard in source.shards)
        samples = source.meta.num_blocks / len(source.shards)
        # Those whose spread covers the block that is read.
        at_once = paths * (1 + spread / samples)
        wanted += int(min(1.0, at_once / len(source.shards)) * size)
        whole += size
    if limit < wanted:
        _log.log(
            NOTE,
            f"data.cache_limit={limit}: about {wanted / 1e9:,.2f} GB of the {whole / 1e9:,.2f} GB "
            "are read at the same time on a node, so shards will be downloaded more than once in "
            "an epoch; a higher limit, smaller shards (--shard-mib) or more nodes avoid this",
        )


def paths_of_node(canonical_nodes: int, num_nodes: int) -> int:
    """Paths through the shards that one node follows; see `GuardedDataset`."""
    return canonical_nodes // (1 if canonical_nodes % num_nodes else num_nodes)


def remove_abandoned(directory: Path) -> None:
    """Remove what a process that was killed left of its downloads."""
    for file in directory.glob("*.mds.zstd"):
        file.unlink(missing_ok=True)
    for file in directory.glob("*.tmp"):
        try:
            if time.time() - file.stat().st_mtime > _ABANDONED_SECONDS:
                file.unlink()
        except FileNotFoundError:
            pass


class EvictingDataset(StreamingDataset):
    """A StreamingDataset that keeps its downloaded shards within a limit.

    The bytes of a shard are reserved before its download begins, and the shards read longest ago
    make room for it. What lies in the cache already counts.
    """

    limit: int | None = None
    """Bytes for downloaded shards on this node; None: no limit. Set after construction."""

    @abstractmethod
    def is_stopping(self) -> bool:
        """Whether the readers on this node are ending."""

    def is_evictable(self, shard_id: int) -> bool:
        """Whether a shard was downloaded under a limit, so that it may be deleted at any time."""
        return self.limit is not None and self.streams[self.stream_per_shard[shard_id]].is_cached

    def shrink(self) -> None:
        """Evict what is over the limit, from earlier runs without one or with a higher one."""
        if self.limit is not None:
            with self._cache_lock():
                self._make_room(0)

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Download a shard if it is not there, after making room for it.

        Raises:
            InterruptedTransferError: the readers are ending.
        """
        if not self.is_evictable(shard_id):
            super().prepare_shard(shard_id, blocking)
            return
        shard = self.shards[shard_id]
        if not self._reserve(shard_id, shard, blocking):
            return
        try:
            self.streams[self.stream_per_shard[shard_id]].prepare_shard(shard)
        except BaseException:
            with self._cache_lock():
                self.cache_usage -= shard.get_max_size()
                self._shard_states[shard_id] = ShardState.REMOTE
            raise
        with self._cache_lock():
            # The compressed form is deleted after unpacking.
            self.cache_usage -= shard.get_max_size() - shard.get_raw_size()
            self._shard_access_times[shard_id] = time.time_ns()
            self._shard_states[shard_id] = ShardState.LOCAL

    def _reserve(self, shard_id: int, shard: Reader, blocking: bool) -> bool:
        """Reserve room for a shard; False if another reader downloads it or has done so."""
        needed = shard.get_max_size()
        while True:
            with self._cache_lock():
                state = self._shard_states[shard_id]
                if state == ShardState.LOCAL:
                    if os.path.exists(_raw_file(shard)):
                        self._shard_access_times[shard_id] = time.time_ns()
                        return False
                    # Another run that shares the directory has deleted it.
                    self.cache_usage -= shard.get_raw_size()
                    self._shard_states[shard_id] = state = ShardState.REMOTE
                if state == ShardState.REMOTE and self._make_room(needed):
                    self._shard_states[shard_id] = ShardState.PREPARING
                    self.cache_usage += needed
                    return True
                if state == ShardState.PREPARING and not blocking:
                    return False
            if self.is_stopping():
                raise InterruptedTransferError
            time.sleep(_PAUSE_SECONDS)

    def _make_room(self, needed: int) -> bool:
        """Evict shards until ``needed`` bytes are free; False if all of them are in use by
        downloads. The caller holds the lock."""
        assert self.limit is not None
        states, times = self._shard_states.numpy(), self._shard_access_times.numpy()
        while self.cache_usage + needed > self.limit:
            present = [i for i in (states == ShardState.LOCAL).nonzero()[0] if self.is_evictable(i)]
            if not present:
                return False
            oldest = min(present, key=lambda i: times[i])
            shard = self.shards[oldest]
            shard.evict()
            self.cache_usage -= shard.get_raw_size()
            self._shard_states[oldest] = ShardState.REMOTE
        return True

    def _ready_thread(self, it: Any) -> None:
        """Let the reader follow the downloads; it downloads again what was evicted meanwhile."""
        if self.limit is None:
            super()._ready_thread(it)
            return
        while not (it.should_exit() or self._event.is_set() or it.ready_index == it.total):
            if it.ready_index < it.prepare_index:
                it.ready_index += 1
            else:
                time.sleep(_PAUSE_SECONDS)
        it.on_exit()

    def _cache_lock(self) -> FileLock:
        # Not kept: it cannot be pickled, and processes that are forked would share it.
        return FileLock(self._cache_filelock_path)


def _raw_file(shard: Reader) -> str:
    raw, _ = shard.file_pairs[0]
    return os.path.join(shard.dirname, shard.split, raw.basename)
