"""A guard around Streaming's dataset that turns its silent errors into a `DataError`.

MosaicML Streaming 0.13.0 silently ignores a damaged or missing shard (the epoch ends early), damage
to data on local disk (never hashed) or changes to it, and a failure of its background threads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np

from calm_dist.compat.streaming import (
    Reader,
    ShardState,
    SharedArray,
    SharedScalar,
    Stream,
    World,
    reader_has_moved,
)
from calm_dist.data.cache import EvictingDataset, overhead_bytes
from calm_dist.data.download import (
    Downloads,
    InterruptedTransferError,
    busy,
    downloader_for,
    transfer,
)
from calm_dist.data.layout import is_remote
from calm_dist.data.mixture import Mixture
from calm_dist.data.shared_names import RunNumber
from calm_dist.data.store import DamagedShardError, Shard, StoreMeta, read_meta, read_shards
from calm_dist.errors import DataError, unreadable
from calm_dist.log import NOTE
from calm_dist.redact import redact

_log = logging.getLogger(__name__)

# Local stores up to this size are hashed when they are opened, so that damage is found before a
# run starts; each shard of a larger store is hashed when it is first used.
CHECK_ON_OPEN_BYTES = 4 << 30

# Independent paths through the shards: more mix better, fewer let more nodes keep to their own
# shards. The number used is the greatest common divisor of this and the global batch size.
_MOST_CANONICAL_NODES = 64
# Samples over which a shard is spread. Blocks were already shuffled by document when written.
SHUFFLE_BLOCK_SIZE = 1 << 12
# Streaming selects the part of a store for an epoch in a Python loop over this many picks.
_MOST_PICKS_PER_EPOCH = 1 << 16


def canonical_nodes(global_batch_size: int) -> int:
    """Number of paths through the shards."""
    return gcd(_MOST_CANONICAL_NODES, global_batch_size)


@dataclass(frozen=True)
class OpenedStore:
    """An opened store: the path as given, the directory of its files (now or after download), its
    description and its shards."""

    path: str
    directory: Path
    meta: StoreMeta
    shards: list[Shard]

    @property
    def is_cached(self) -> bool:
        """Whether its shards are read from copies in ``directory``, which may be deleted."""
        return is_remote(self.path) or self.meta.compression is not None

    @property
    def checked(self) -> bool:
        """Whether every shard is hashed on opening."""
        size = sum(shard.size for shard in self.shards)
        return not self.is_cached and size <= CHECK_ON_OPEN_BYTES

    def check(self) -> None:
        """Check that no shard is missing or of a wrong size or, in small stores, damaged.

        Shards of remote stores are checked when they are downloaded.

        Raises:
            DataError: for the first such shard.
        """
        if is_remote(self.path):
            return
        if self.is_cached:
            # The originals, from which the copies are unpacked.
            for shard in self.shards:
                replace(shard.stored, path=Path(self.path) / shard.stored.path.name).check_size()
            return
        for shard in self.shards:
            shard.check_size()
        if self.checked:
            for shard in self.shards:
                shard.check()


def open_source(path: str, directory: Path) -> OpenedStore:
    """Read and check the description of the store in ``directory``, but not its shards.

    Raises:
        DataError: see `read_meta` and `read_shards`.
    """
    meta = read_meta(directory)
    return OpenedStore(path, directory, meta, read_shards(directory, meta))


class _CheckedStream(Stream):
    """A store that hashes every shard before its first use on a node, and after a change."""

    # The time of the last change of each hashed shard, 0 for others; our entries begin at _first.
    _hashed: SharedArray
    _first: int
    _stopping: Callable[[], bool]

    def __init__(self, source: OpenedStore, downloads: Downloads, limited: bool) -> None:
        super().__init__(
            remote=source.path if source.is_cached else None,
            local=str(source.directory),
        )
        self._number_of = {shard.path.name: i for i, shard in enumerate(source.shards)}
        self._shards = source.shards
        self._downloads = downloads
        self._source = source
        self.is_cached = source.is_cached
        self._evictable = limited and source.is_cached
        if self.remote is not None:
            self._downloader = downloader_for(self.remote)

    def share(self, hashed: SharedArray, first: int, stopping: Callable[[], bool]) -> None:
        """Record hashed shards in ``hashed``, which the readers of a node share; do not retry
        downloads once ``stopping`` returns True, that is, the readers end."""
        self._hashed, self._first, self._stopping = hashed, first, stopping

    def _download_file(self, from_basename: str, to_basename: str | None = None) -> str:
        """Like Streaming's, which retries every failure twice without a pause, even one of
        credentials; this retries transient faults only."""
        if self.remote is None:
            return super()._download_file(from_basename, to_basename)
        url = f"{self.remote.rstrip('/')}/{from_basename}"
        local = str(Path(self.local) / (to_basename or from_basename))

        def attempt() -> None:
            try:
                self._downloader.download(url, local, self._downloads.timeout_seconds)
            except Exception:
                # Also drops connections that may be broken.
                self._downloader.clean_up()
                raise

        what = f"data store {redact(self.remote)}: {from_basename}"
        transfer(attempt, what, self._downloads, stopping=self._stopping)
        return local

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: np.ndarray) -> None:
        """Report all shards as absent, so that `prepare_shard` is called: a shard that was hashed
        on opening may have changed since. Under a limit, what the cache holds must be counted."""
        super().set_up_local(shards, cache_usage_per_shard)
        if not self._evictable:
            cache_usage_per_shard[:] = 0

    def get_index_size(self) -> int:
        """Bytes in the cache besides the shards."""
        return overhead_bytes(self._source) if self.is_cached else 0

    def prepare_shard(self, shard: Reader) -> int:
        """Download the shard if needed, then hash it."""
        if self.remote is None:
            # For a missing shard, Streaming would only report that there is no remote.
            self._expected(shard)[1].check_size()
        cached = self._expected(shard)[1].path.exists()
        try:
            change = super().prepare_shard(shard)
            self.check(shard)
        except DamagedShardError as error:
            if self.remote is None or cached:
                raise
            # The download was damaged: a proxy may have cut it, and another may not.
            _log.log(NOTE, f"{error}; downloading it again")
            change = super().prepare_shard(shard)
            self.check(shard)
        return change

    def _decompress_shard_part(
        self, zip_info: Any, zip_filename: str, raw_filename: str, compression: str | None
    ) -> None:
        """Like Streaming's, which believes the file and unpacks whatever it holds."""
        packed, place = Path(zip_filename), Path(raw_filename)
        try:
            self._shards[self._number_of[place.name]].unpack(packed, place)
        finally:
            # A damaged one must not be taken for a good copy, and a good one is not needed again.
            packed.unlink(missing_ok=True)

    def check(self, shard: Reader) -> bool:
        """Hash a shard, unless it has not changed since it was hashed on this node.

        Returns:
            False if it has been deleted to make room for another one.

        Raises:
            DataError: it is missing or damaged.
        """
        number, expected = self._expected(shard)
        if self._evictable and not expected.path.exists():
            return False
        try:
            changed = expected.changed()
            if changed != self._hashed[self._first + number]:
                expected.check()
                self._hashed[self._first + number] = changed
        except DataError:
            if self._evictable and not expected.path.exists():
                return False
            if self.remote is not None:
                # A later start must not take a damaged download for a good copy.
                expected.path.unlink(missing_ok=True)
            raise
        return True

    def _expected(self, shard: Reader) -> tuple[int, Shard]:
        number = self._number_of[shard.file_pairs[0][0].basename]
        return number, self._shards[number]

    def fault(self, shard: Reader) -> DataError:
        """The error for a shard that another reader on this node failed to prepare."""
        _, expected = self._expected(shard)
        if self.remote is None:
            try:
                expected.check()
            except DataError as error:
                return error
        return DataError(
            f"shard {expected.path}: another reader on this node could not prepare it; see the "
            "message of the first rank that failed"
        )


class GuardedDataset(EvictingDataset):
    """A StreamingDataset that raises where its parent ends an epoch early or hangs."""

    def __init__(
        self,
        sources: Sequence[OpenedStore],
        mixture: Mixture,
        *,
        batch_size: int,
        replication: int,
        seed: int,
        number: RunNumber,
        downloads: Downloads,
        cache_limit: int | None = None,
        readers: int = 1,
    ) -> None:
        world = World.detect()
        num_replicas = world.num_ranks // replication
        global_batch_size = batch_size * num_replicas
        num_blocks = sum(source.meta.num_blocks for source in sources)
        streams = [_CheckedStream(source, downloads, cache_limit is not None) for source in sources]
        with number.used_by_streaming():
            super().__init__(
                streams=streams,
                epoch_size=mixture.steps_per_epoch * global_batch_size,
                sampling_granularity=-(-num_blocks // _MOST_PICKS_PER_EPOCH),
                partition_algo="orig",
                num_canonical_nodes=canonical_nodes(global_batch_size),
                batch_size=batch_size,
                shuffle=True,
                shuffle_seed=seed,
                shuffle_block_size=SHUFFLE_BLOCK_SIZE,
                replication=replication,
                predownload=_blocks_ahead(sources, batch_size, cache_limit, readers),
            )
        self.mixture = mixture
        self.limit = cache_limit
        if world.is_local_leader:
            self.shrink()
        assert self.num_canonical_nodes is not None
        if self.num_canonical_nodes % self._parallel_rank_world.num_nodes:
            # Streaming refuses such node counts. Treated as one large node, every node reads from
            # all shards instead of its own share; the batches are the same.
            rank = world.rank // replication
            self._parallel_rank_world = World(1, num_replicas, 1, rank)
        self._number = number
        self._failed_shard = number.shared_scalar("failed_shard")
        busy.share(number.shared_scalar("busy_until"))
        hashed = number.shared_array("hashed", self.num_shards)
        for stream, first in zip(streams, self.shard_offset_per_stream, strict=True):
            stream.share(hashed, int(first), self.is_stopping)
        self._failure: BaseException | None = None
        self._num_expected = 0

    def _get_work(self, epoch: int, sample_in_epoch: int) -> np.ndarray:
        """The blocks of this reader; an epoch of Streaming is a stretch of the mixture."""
        stretch = self.mixture.numbered(epoch)
        self.epoch_size = sum(stretch.counts)
        for stream, count in zip(self.streams, stretch.counts, strict=True):
            stream.choose = count
        ids = super()._get_work(epoch, sample_in_epoch)
        self._num_expected = int((ids != -1).sum())
        return ids

    def resample_streams(
        self, epoch: int, stream_id: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The blocks of a stretch before they are shuffled: how many come from each shard in turn,
        and their numbers over all stores. Streaming's own draw knows nothing of earlier ones."""
        if not self.mixture.passes:
            return super().resample_streams(epoch, stream_id)
        units, ids = [], []
        found = self.mixture.blocks_of(self.mixture.numbered(epoch))
        for first, num_shards, passes in zip(
            self.shard_offset_per_stream, self.shards_per_stream, found, strict=True
        ):
            begins = self.sample_offset_per_shard[first : first + num_shards]
            for blocks in passes:
                ids.append(begins[0] + blocks)
                per_shard = np.diff(np.searchsorted(ids[-1], begins), append=len(blocks))
                units.append(per_shard[per_shard > 0])
        return np.concatenate(units), np.concatenate(ids)

    def on_exception(self, future: Future) -> None:
        """Keep the failure of a background thread for `__iter__`; the parent only logs it."""
        error = future.exception()
        if error is not None:
            self._failure = error
            self._event.set()
            # At the end of an iteration the parent waits for each of its threads to report its
            # exit, which a thread that raises does not do (mosaicml-streaming 0.13.0).
            self._iterator.on_exit()

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """As the parent's, but tells all readers on the node about a failure.

        After a failure, the parent leaves the shard "being prepared", and readers would wait for it
        forever: in their loops, which check for failures, and inside this method, which does not.
        """
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception as error:
            if not isinstance(error, InterruptedTransferError):
                self._number.tell_failure(as_data_error(error))
                self._failed_shard.set(shard_id + 1)
            self._shard_states[shard_id] = ShardState.REMOTE
            raise

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """The sample and its number, from a shard that has not changed since it was hashed.

        Corruption on disk that the file system does not record as a change is not detected.
        """
        number, _ = self.spanner[sample_id]
        for _ in range(1 + retry):
            try:
                sample = super().get_item(sample_id, retry)
            finally:
                # Check after reading, even if reading failed: a change may be the cause.
                there = self.streams[self.stream_per_shard[number]].check(self.shards[number])
            if there:
                return {"index": int(sample_id), **sample}
        raise DataError(
            f"data.cache_limit={self.limit}: shards are deleted before they are read; set a higher "
            "limit, or use fewer data.num_workers"
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # The parent's threads and loops end when this event is set.
        self._event = _NodeEvent(self._failed_shard)
        received = 0
        # Its threads stay ahead by at least three quarters of what they may.
        wake_every = max(1, (self.predownload or 0) // 4)
        try:
            for sample in super().__iter__():
                received += 1
                if received % wake_every == 0:
                    reader_has_moved()
                yield sample
        except Exception as error:
            raise self._problem(error) from error
        finally:
            # If the iteration is abandoned, the parent's two threads would poll until the process
            # ends. Do not wait for them here: one may be downloading.
            if hasattr(self, "_iterator"):
                self._iterator.non_blocking_exit()
        if self._event.is_set():
            raise self._problem(None)
        if received != self._num_expected:
            raise DataError(
                f"data store: the epoch ended after {received} of {self._num_expected} blocks of "
                "this reader; shards were lost while it was read"
            )

    def _problem(self, error: Exception | None) -> DataError:
        """The first cause of a failure, on this reader or another one on the node."""
        cause = self._failure or error
        if isinstance(cause, DataError):
            return cause
        told = self._number.failure()
        if told is not None:
            return told
        failed = int(self._failed_shard.get()) - 1
        if self._failure is None and failed >= 0:
            stream = self.streams[self.stream_per_shard[failed]]
            return stream.fault(self.shards[failed])
        return as_data_error(cause)

    def is_stopping(self) -> bool:
        """Whether the readers are ending: after a failure, or with their process."""
        iterator = getattr(self, "_iterator", None)
        # Neither exists before the first sample is requested.
        if iterator is None or not hasattr(self, "_event"):
            return False
        return bool(self._event.is_set() or iterator.should_exit())


def _blocks_ahead(
    sources: Sequence[OpenedStore], batch_size: int, cache_limit: int | None, readers: int
) -> int:
    """Blocks whose shards a reader downloads ahead: Streaming's default, or fewer under a limit, so
    that they are not evicted before they are read, even if each block is in another shard."""
    usual = 8 * batch_size
    sizes = [shard.most_bytes for source in sources if source.is_cached for shard in source.shards]
    if cache_limit is None or not sizes:
        return usual
    return max(1, min(usual, cache_limit // max(sizes) // readers - 2))


def as_data_error(error: BaseException | None) -> DataError:
    """The error for any failure while a store is read."""
    if isinstance(error, DataError):
        return error
    message = f"data store: cannot be read ({type(error).__name__}: {error})"
    file = getattr(error, "filename", None)
    return unreadable(f"data store: {file}" if file else "data store", error, message)


class _NodeEvent(Event):
    """An event that also counts as set once any reader on the node failed to prepare a shard."""

    def __init__(self, failed_shard: SharedScalar) -> None:
        super().__init__()
        self._failed_shard = failed_shard

    def is_set(self) -> bool:
        return super().is_set() or self._failed_shard.get() != 0
