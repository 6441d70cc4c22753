"""Open the stores of a run on all of its ranks: the same stores everywhere, an error everywhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from calm_dist.compat.streaming import World
from calm_dist.data.description import fetch_description
from calm_dist.data.download import Downloads
from calm_dist.data.guard import OpenedStore, as_data_error, open_source
from calm_dist.data.mixture import Weight
from calm_dist.data.store import StoreMeta
from calm_dist.errors import (
    DataError,
    LaunchError,
    first_failure,
    is_lost_mount,
    plain_failure,
)

T = TypeVar("T")

# Properties in which the stores of one run must agree.
_COMMON: dict[str, Callable[[StoreMeta], Any]] = {
    **{
        name: attrgetter(name)
        for name in ("variant", "block_size", "patch_size", "latent_size", "vocab_size")
    },
    "tokenizer": attrgetter("tokenizer.sha256"),
    "begin token": attrgetter("tokenizer.begin_id"),
    "end token": attrgetter("tokenizer.end_id"),
    "autoencoder": lambda meta: meta.autoencoder and meta.autoencoder.sha256,
}


def open_on_all_ranks(
    paths: Sequence[str],
    world: World,
    cache_dir: str | Path | None,
    downloads: Downloads,
    check_node: Callable[[list[OpenedStore]], None],
) -> list[OpenedStore]:
    """Open the stores on every rank. The first rank of each node fetches their descriptions,
    checks their files and calls ``check_node``.

    Raises:
        DataError: on every rank, if it fails on any or the ranks see different stores.
    """

    def fetch() -> None:
        if world.is_local_leader:
            sources = []
            for path in paths:
                source = open_source(path, fetch_description(path, cache_dir, True, downloads))
                source.check()
                sources.append(source)
            check_node(sources)

    on_all_ranks(fetch)
    sources = on_all_ranks(
        lambda: [open_source(path, fetch_description(path, cache_dir)) for path in paths]
    )
    fingerprints = [source.meta.fingerprint for source in sources]
    for rank, others in enumerate(_gather(fingerprints)):
        if others != fingerprints:
            raise DataError(
                f"data store {list(paths)}: rank {rank} and {world.rank} see different stores"
            )
    return sources


def check_world(world: World, replication: int) -> None:
    """Refuse launches that Streaming would take for one node per rank, or would hang on."""
    if world.num_ranks > 1 and "LOCAL_WORLD_SIZE" not in os.environ:
        raise LaunchError("LOCAL_WORLD_SIZE is not set; start through calm_dist.parallel.launch")
    if world.num_ranks > 1 and not dist.is_initialized():
        raise LaunchError("the process group does not exist yet; join the world first")
    if replication < 1 or world.num_ranks % replication:
        raise LaunchError(
            f"{world.num_ranks} ranks cannot be divided into groups of {replication} that read "
            "the same blocks; launch a multiple of TP·CP·PP"
        )


def _gather(value: T) -> list[T]:
    """``value`` of every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_all_ranks(work: Callable[[], T]) -> T:
    """The result of ``work`` on this rank; a DataError on one rank is raised on every rank."""
    result: T | None = None
    failure: DataError | None = None
    try:
        result = work()
    except DataError as error:
        failure = error
    except OSError as error:
        # The other ranks may still reach the file system.
        if not is_lost_mount(error):
            raise
        failure = as_data_error(error)
    found = first_failure(_gather(failure and plain_failure(failure)))
    if found is not None:
        raise found[1]
    return result  # type: ignore[return-value]


def check_together(
    sources: Sequence[OpenedStore], weights: Sequence[Weight] | None, global_batch_size: int
) -> None:
    if not sources:
        raise DataError("data store: no path was given")
    if len({source.directory.resolve() for source in sources}) != len(sources):
        raise DataError(
            f"data stores {[source.path for source in sources]}: a store is named twice; name it "
            "once with a larger weight"
        )
    if weights is not None and (
        len(weights) != len(sources)
        or not all(weight > 0 for weight in weights if isinstance(weight, int | float))
    ):
        raise DataError(
            f"weights {list(weights)}: give a number above 0 for each of the {len(sources)} stores"
        )
    first = sources[0]
    for source in sources[1:]:
        for name, value in _COMMON.items():
            if value(source.meta) != value(first.meta):
                raise DataError(
                    f"data stores {first.path} and {source.path}: differ in {name} "
                    f"({value(first.meta)} and {value(source.meta)}); encode both the same way"
                )
    num_blocks = sum(source.meta.num_blocks for source in sources)
    if num_blocks < global_batch_size:
        raise DataError(
            f"data store {', '.join(source.path for source in sources)}: holds {num_blocks} "
            f"blocks, fewer than one global batch of {global_batch_size}; encode more text or "
            "lower training.global_batch_size"
        )
