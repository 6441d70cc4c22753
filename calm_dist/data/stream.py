"""Read data stores: an endless stream of training batches, and random access for evaluation.

MosaicML Streaming orders, distributes and downloads the samples, behind the guard of `guard.py`.

Order. With G blocks in a global batch, an epoch is N // G global batches drawn from N blocks
without repetition; each epoch leaves out a different set of N % G blocks. Weights and limits divide
epochs into stretches, over which each store is read pass after pass (`mixture.py`). The blocks of
step s are a function of the stores, their weights, G and the seed; they do not depend on the number
of ranks, nodes or workers, or on where the run was resumed. A run that is resumed with more stores
begins a new order at that step.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader

from calm_dist.compat.streaming import LocalDataset, World, patient_attaching
from calm_dist.data.cache import check_limit, paths_of_node, remove_abandoned
from calm_dist.data.download import DEFAULT, Downloads
from calm_dist.data.guard import (
    SHUFFLE_BLOCK_SIZE,
    GuardedDataset,
    OpenedStore,
    canonical_nodes,
    open_source,
)
from calm_dist.data.int8 import dequantize
from calm_dist.data.layout import INDEX, META, is_remote
from calm_dist.data.mixture import Mixture, Weight
from calm_dist.data.opening import check_together, check_world, on_all_ranks, open_on_all_ranks
from calm_dist.data.readers import (
    PREFETCHED,
    batches_of,
    check_shared_memory,
    check_socket_path,
    end_readers,
    hand_over,
    poll_seconds,
)
from calm_dist.data.shared_names import RunNumber
from calm_dist.data.store import StoreMeta
from calm_dist.errors import (
    DataError,
    is_lost_connection,
    listed,
    unreadable,
)
from calm_dist.redact import redact

Batch = dict[str, torch.Tensor]
T = TypeVar("T")


class Store:
    """Random access to the blocks of a local store.

    ``store[i]`` is ``{"index", "tokens" uint32[T] or uint16[T]}`` and, in the variant ``fp16``,
    ``"mean"`` and ``"log_std"`` float16[P, l] (float32 if they are stored as int8), as numpy
    arrays.

    Raises:
        DataError: on opening or on access, if something is missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        if is_remote(path):
            raise DataError(f"data store {path}: random access needs a local copy; download it")
        self._source = open_source(str(path), Path(path))
        self._source.check()
        if self._source.meta.compression is not None:
            self._unpack()
        self._checked = {i for i, _ in enumerate(self._source.shards) if self._source.checked}
        self._samples = LocalDataset(str(self._source.directory))

    def _unpack(self) -> None:
        """Unpack all shards into a temporary directory, which is removed with this object."""
        self._scratch = tempfile.TemporaryDirectory(prefix="calm_dist_store_")
        directory = Path(self._scratch.name)
        for shard in self._source.shards:
            shard.unpack(shard.stored.path, directory / shard.path.name)
        for name in (META, INDEX):
            shutil.copyfile(self._source.directory / name, directory / name)
        self._source = open_source(self._source.path, directory)

    @property
    def meta(self) -> StoreMeta:
        """The description of the store."""
        return self._source.meta

    def __len__(self) -> int:
        return self.meta.num_blocks

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)} in {self._source.path}")
        number, _ = self._samples.spanner[index]
        shard = self._source.shards[number]
        if number not in self._checked:
            shard.check()
            self._checked.add(number)
        try:
            return {"index": index, **dequantize(self._samples[index])}
        except (OSError, ValueError, LookupError, TypeError) as error:
            what = f"shard {shard.path}: block {index}"
            message = f"{what} cannot be read ({error}); copy or encode it again"
            raise unreadable(what, error, message) from error


def open_store(path: str | Path) -> Store:
    """Open a local store for random access; see `Store`."""
    return Store(path)


class TrainingStream:
    """Batches of one rank, one per optimizer step, endless over epochs.

    Iterating gives ``{"index": int64[B], "tokens": int64[B, T]}`` and, in the variant ``fp16``,
    ``"mean"`` and ``"log_std"`` float32[B, P, l], on the CPU. ``index`` is the number of the block
    over all stores in the order given.

    Attributes:
        metas: descriptions of the stores, in the order given.
        mixture: which blocks of which store are read when.
    """

    def __init__(
        self,
        dataset: GuardedDataset,
        loader: DataLoader,
        sources: Sequence[OpenedStore],
        timeout_seconds: float,
    ) -> None:
        self._timeout_seconds = timeout_seconds
        self._dataset, self._loader = dataset, loader
        self._paths = [redact(source.path) for source in sources]
        self._step = 0
        self._started = False
        self.metas = [source.meta for source in sources]

    @property
    def mixture(self) -> Mixture:
        return self._dataset.mixture

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch."""
        return self.mixture.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        if self._started:
            raise RuntimeError("a TrainingStream can be iterated only once; open another one")
        self._started = True
        while True:
            steps_left = self.mixture.at(self._step).end - self._step
            received = 0
            for batch in self._epoch():
                received += 1
                yield batch
            if received != steps_left:
                raise DataError(
                    f"data store: the epoch ended after {received} of {steps_left} steps; shards "
                    "were lost while it was read"
                )
            self._step += received

    def close(self) -> None:
        """End the reader processes. Nothing may be read from this stream any more."""
        end_readers(self._loader)

    def _epoch(self) -> Iterator[Batch]:
        try:
            yield from batches_of(self._loader, self._timeout_seconds)
        except DataError as error:
            # A worker process wraps the message in its traceback.
            message = str(error).rstrip().rpartition(f"{type(error).__name__}: ")[2]
            raise type(error)(message) from error
        except (RuntimeError, OSError, EOFError) as error:
            if is_lost_connection(error):
                raise
            raise DataError(
                f"data store: a reader process died or timed out ({error}); "
                "data.num_workers=0 reads in the training process"
            ) from error

    def state_dict(self, steps_done: int) -> dict[str, Any]:
        """The position after ``steps_done`` optimizer steps, as plain values; no communication."""
        fingerprints = [meta.fingerprint for meta in self.metas]
        return {"steps_done": steps_done, "stores": fingerprints, **self.mixture.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> str | None:
        """Continue after ``state["steps_done"]`` steps; the number of ranks may differ.

        The run may have further stores at the end of its list, and other weights for later steps.
        Every rank must call this before the first batch.

        Returns:
            what changes in the order, if anything does.

        Raises:
            DataError: the state belongs to other stores, weights, batch size or seed.
        """
        if self._started:
            raise RuntimeError("load_state_dict must be called before the first batch")
        self._step = state["steps_done"]
        note = self._continue(state)
        if not self.mixture.has(self._step):
            # A run that has read all that its max_epochs allow; another step is refused.
            return note
        stretch = self.mixture.at(self._step)
        done = self._step - stretch.first
        position = {
            "epoch": stretch.number,
            "sample_in_epoch": done * self.mixture.global_batch_size,
            "num_canonical_nodes": self._dataset.num_canonical_nodes,
            "shuffle_seed": self._dataset.shuffle_seed,
        }
        # All ranks of a node create or attach to the shared memory that holds the position.
        with patient_attaching():
            self._dataset.load_state_dict(position)
        return note

    def _continue(self, state: dict[str, Any]) -> str | None:
        """Make the mixture continue that of a state; what changes in the order."""
        mixture, step = self.mixture, self._step
        ours = self.state_dict(step)
        for key in ("global_batch_size", "seed"):
            if state.get(key) != ours[key]:
                raise _other_data(key, state.get(key), ours[key])
        known = len(state["stores"])
        if ours["stores"][:known] != state["stores"]:
            raise _other_data("stores", state["stores"], ours["stores"])
        before = Mixture.of_state(state, mixture.sizes[:known])
        # An order that an earlier version began, or a run without limits, goes on as it was begun.
        now = replace(mixture, start=before.start, passes=before.passes)
        if known == len(self.metas):
            if now.until(step) == before.until(step):
                self._dataset.mixture = now
                return None
            changes = {*before.changes_until(step), *now.changes_until(step)}
            if any(now.weights_at(s) != before.weights_at(s) for s in changes):
                raise _other_data("weights", state["weights"], ours["weights"])
        self._dataset.mixture = before.restarted(step, mixture)
        new = [
            f"{path} ({meta.num_blocks:,} blocks)"
            for path, meta in zip(self._paths[known:], self.metas[known:], strict=True)
        ]
        what = f"{len(new)} more store(s), {listed(new, 5)}" if new else "other weights or limits"
        again = ""
        if step and (read := step - before.at(step - 1).first) < before.at(step - 1).steps:
            again = (
                f"; the present epoch ends after {read:,} of its steps, and the blocks of these "
                "may come again in the next one"
            )
        return f"data: {what}: from step {step + 1:,} on, blocks come in a new order{again}"

    def describe(self, step: int, last: int) -> list[str]:
        """What a run reads that is at ``step`` and ends after step ``last``, a line per store.

        Raises:
            DataError: the stores may not be read as often as this needs.
        """
        mixture = self.mixture
        if step < last:
            mixture.at(last - 1)
        done, by_then = mixture.read_at(step), mixture.read_at(last)
        counts = mixture.at(min(step, last - 1)).counts
        lines = []
        for i, (path, size) in enumerate(zip(self._paths, mixture.sizes, strict=True)):
            share = counts[i] / sum(counts)
            part = "" if len(counts) == 1 else f", {share:.3g} of each batch"
            so_far = f"{done[i] / size:.3g} epochs read, " if step else ""
            lines.append(
                f"data: {path}: {size:,} blocks{part}; {so_far}{by_then[i] / size:.3g} epochs by "
                f"step {last:,}"
            )
        return lines

    def describe_read(self, step: int) -> str:
        """How often each store has been read after ``step`` steps."""
        read = zip(self.mixture.read_at(step), self.mixture.sizes, self._paths, strict=True)
        return "data: read " + ", ".join(
            f"{r / size:.3g} epochs of {path}" for r, size, path in read
        )


def _other_data(key: str, before: Any, now: Any) -> DataError:
    return DataError(
        f"checkpoint: its data position is for {key}={before}, this run has {now}; continue with "
        "the same stores, weights, batch size and seed, with further stores at the end of the "
        "list, or with other weights from a later step on; or train on others in another run.dir "
        "with run.continue_from"
    )


def open_training_stream(
    paths: Sequence[str | Path],
    weights: Sequence[Weight] | None = None,
    *,
    batch_size: int,
    most_epochs: Sequence[float | None] | None = None,
    replication: int = 1,
    seed: int = 0,
    num_workers: int = 0,
    cache_dir: str | Path | None = None,
    cache_limit: int | None = None,
    timeout_seconds: float = 600.0,
    downloads: Downloads = DEFAULT,
) -> TrainingStream:
    """Open stores for training.

    Every rank must call this. RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE must be set, and
    with several ranks the process group must exist.

    Args:
        paths: stores: local directories, or URLs with ``s3://…`` or another scheme of Streaming.
        weights: share of the blocks drawn from each store, relative to the others, or a list of
            ``(step, weight)`` in the order of steps; None: in proportion to their sizes.
        batch_size: blocks of this rank per optimizer step, B.
        most_epochs: how often each store may be read; then the others take its share.
        replication: consecutive ranks that get the same blocks (TP·CP·PP).
        seed: seed of the order.
        num_workers: reader processes per rank; 0 reads in this process.
        cache_dir: directory for the shards of remote stores.
        cache_limit: most bytes that these take on a node, in all stores together; the shards read
            longest ago are deleted. None: there must be room for all of them.
        timeout_seconds: longest time for a batch from a reader process, without downloads.
        downloads: retries and time limits for object stores.

    Raises:
        DataError: on every rank, if on any rank something is missing, damaged or inconsistent, or
            if the stores are smaller than one global batch. `UnreachableError` if an object store
            did not answer.
    """
    world = World.detect()
    check_world(world, replication)
    given = [str(path) for path in paths]
    if len(given) == 1:
        weights = None
    global_batch_size = batch_size * (world.num_ranks // replication)

    readers = max(1, num_workers) * world.ranks_per_node

    check_node = partial(
        _check_node,
        world=world,
        batch_size=batch_size,
        global_batch_size=global_batch_size,
        num_workers=num_workers,
        cache_limit=cache_limit,
        readers=readers,
    )
    sources = open_on_all_ranks(given, world, cache_dir, downloads, check_node)
    on_all_ranks(lambda: check_together(sources, weights, global_batch_size))
    mixture = Mixture(
        tuple(source.meta.num_blocks for source in sources),
        None if weights is None else tuple(weights),
        tuple(most_epochs or [None] * len(sources)),
        global_batch_size,
        seed,
        passes=weights is not None or any(most is not None for most in most_epochs or ()),
    )

    # It warns at each epoch that its state must account for replication; ours does.
    logging.getLogger("streaming.base.dataset").setLevel(logging.ERROR)
    dataset = GuardedDataset(
        sources,
        mixture,
        batch_size=batch_size,
        replication=replication,
        seed=seed,
        number=RunNumber(world),
        downloads=downloads,
        cache_limit=cache_limit,
        readers=readers,
    )
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate,
        timeout=poll_seconds(timeout_seconds) if num_workers else 0,
        prefetch_factor=PREFETCHED if num_workers else None,
        persistent_workers=num_workers > 0,
    )
    return TrainingStream(dataset, loader, sources, timeout_seconds)


def _check_node(
    sources: list[OpenedStore],
    *,
    world: World,
    batch_size: int,
    global_batch_size: int,
    num_workers: int,
    cache_limit: int | None,
    readers: int,
) -> None:
    """Refuse a node without room for the readers' memory, sockets or the shards of the stores."""
    metas = [source.meta for source in sources]
    check_shared_memory(metas, batch_size, num_workers, world.ranks_per_node)
    if num_workers:
        check_socket_path()
    if cache_limit is None:
        return
    paths = paths_of_node(canonical_nodes(global_batch_size), world.num_nodes)
    check_limit(cache_limit, sources, readers, paths, SHUFFLE_BLOCK_SIZE)
    for source in sources:
        if source.is_cached:
            remove_abandoned(source.directory)


def _collate(samples: list[dict[str, Any]]) -> Batch:
    batch = {"index": torch.tensor([sample["index"] for sample in samples])}
    # One by one: stores of a mixture may have latents of different types.
    samples = [dequantize(sample) for sample in samples]
    for name, dtype in (
        ("tokens", torch.int64),
        ("mean", torch.float32),
        ("log_std", torch.float32),
    ):
        if name in samples[0]:
            stacked = np.stack([sample[name] for sample in samples])
            # Converted by torch, which takes half as long as numpy from fp16.
            batch[name] = torch.from_numpy(stacked).to(dtype)
    return hand_over(batch)
