"""Write data stores: pack a corpus into blocks and encode them with a frozen autoencoder.

The corpus is cut into parts, which any number of workers read, pack and encode, shard by shard; a
worker that finds all of them complete merges them (``parts.py``). A run that was killed
continues after its last finished shard. No encoder batch spans two shards, so the result is
identical to the byte without the kill, and regardless of which worker wrote which part.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calm_dist.data.existing import PARTS, finished_store
from calm_dist.data.int8 import quantize
from calm_dist.data.layout import INDEX, META, is_remote
from calm_dist.data.manifest import BegunCorpus, moved_paths, read_shares
from calm_dist.data.parts import (
    begin,
    blocks_in_shard,
    complete_part,
    has_shard,
    is_complete,
    merge,
    remove_parts,
    remove_store,
    write_shard,
)
from calm_dist.data.store import (
    StoreMeta,
    StorePlan,
    read_meta,
    read_shards,
)
from calm_dist.data.store_plan import plan_store
from calm_dist.errors import DataError
from calm_dist.progress import progress
from calm_dist.text.corpus import find_files, pack_blocks
from calm_dist.text.corpus_files import CorpusFiles, CorpusPaths
from calm_dist.text.dedup import Repetitions
from calm_dist.text.formats import Document
from calm_dist.text.reading import Tally, shuffled_documents
from calm_dist.text.reports import REPORT
from calm_dist.text.tokenizer import Tokenizer
from calm_dist.text.units import Share, units_of

if TYPE_CHECKING:
    from calm_dist.models.autoencoder import Autoencoder

__all__ = [
    "StoreMeta",
    "StorePlan",
    "finished_store",
    "plan_store",
    "read_meta",
    "write_parts",
    "write_store",
]

SHARD_BYTES = 64 << 20

Encoder = Callable[[np.ndarray], Iterator[dict[str, np.ndarray]]]


def write_store(
    out: str | Path,
    corpus: CorpusPaths | BegunCorpus,
    tokenizer: Tokenizer,
    plan: StorePlan,
    *,
    autoencoder: Autoencoder | None = None,
    batch_size: int = 16,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    skip_faults: bool = False,
) -> StoreMeta:
    """Write the store of ``plan``, or the part of it that is still missing.

    Args:
        out: directory of the store, or a URL to which it is uploaded from a scratch directory
            (``TMPDIR`` chooses the disk).
        corpus, tokenizer: the inputs that ``plan`` was made from.
        plan: from `plan_store`.
        autoencoder: in eval mode and fp32; encodes on the device of its weights.
        batch_size: blocks per call of the encoder.
        shard_bytes: size of a shard; use 512 MiB for large corpora.
        overwrite: first remove another store in ``out``; not with `begun_corpus`.
        skip_faults: leave out damaged files and anything that is not a document, and count them in
            ``report.json``; otherwise the first such fault is an error.

    Raises:
        DataError: as `finished_store`, without ``overwrite``; the corpus is shorter than one
            block; fp16 cannot hold the latents.
    """
    if is_remote(out):
        return _write_remote(
            str(out),
            corpus,
            tokenizer,
            plan,
            autoencoder=autoencoder,
            batch_size=batch_size,
            shard_bytes=shard_bytes,
            overwrite=overwrite,
            skip_faults=skip_faults,
        )
    out = Path(out)
    if overwrite and not isinstance(corpus, BegunCorpus):
        # Check corpus and options before anything is removed.
        blocks_in_shard(plan, shard_bytes)
        if tokenizer.path.resolve().parent == out.resolve():
            raise DataError(
                f"--tokenizer {tokenizer.path}: is a file of the store that --overwrite removes; "
                "copy it to another directory first"
            )
        corpus = find_files(corpus, plan.reading)
        refuse_corpus_in_store(out, corpus)
        _check_beginning(corpus, plan, skip_faults)
        remove_store(out)
    write_parts(
        out,
        corpus,
        tokenizer,
        plan,
        autoencoder=autoencoder,
        batch_size=batch_size,
        shard_bytes=shard_bytes,
        skip_faults=skip_faults,
    )
    return read_meta(out)


def _check_beginning(corpus: CorpusFiles, plan: StorePlan, skip_faults: bool) -> None:
    """Read the first unit, to find a fault that ends the writing at once."""
    unit = units_of(corpus[:1], plan.reading, skip=skip_faults)[0]
    tally = Tally(skip_faults)
    next(shuffled_documents([Share(0, unit.spans)], plan.seed, plan.reading, tally), None)


def write_parts(
    out: Path,
    corpus: CorpusPaths | BegunCorpus,
    tokenizer: Tokenizer,
    plan: StorePlan,
    *,
    worker: tuple[int, int] = (0, 1),
    autoencoder: Autoencoder | None = None,
    batch_size: int = 16,
    shard_bytes: int = SHARD_BYTES,
    skip_faults: bool = False,
) -> list[int]:
    """Write a worker's parts of a store, then merge all parts if they are complete.

    Workers may run at once, be killed and be restarted, even with another number of workers. If
    two workers write the same part, the first to finish a shard provides it.

    Args:
        out: directory of the store, visible to all workers.
        corpus: as for `write_store`; or from `begun_corpus`, if the store has been begun.
        tokenizer, plan, autoencoder, batch_size, shard_bytes, skip_faults: as for `write_store`,
            the same for all workers.
        worker: (I, W): writes the parts I, I + W, I + 2 W, …

    Returns:
        The parts that other workers have not finished; empty if the store is finished.

    Raises:
        DataError: as `write_store`.
    """
    if finished_store(out, plan) is not None:
        return []
    blocks_per_shard = blocks_in_shard(plan, shard_bytes)
    encode = _encoder(plan, autoencoder, batch_size)
    if not isinstance(corpus, BegunCorpus):
        corpus = find_files(corpus, plan.reading)
        refuse_corpus_in_store(out, corpus)
    try:
        begin(out, plan, blocks_per_shard, corpus, skip_faults=skip_faults)
        paths = None
        if not isinstance(corpus, BegunCorpus):
            paths = moved_paths(out / PARTS, corpus)
        shares_of = partial(read_shares, out / PARTS, paths=paths)
        documents_of = _reader(out, plan, worker, shares_of, skip_faults=skip_faults)
        for part in range(worker[0], plan.parts, worker[1]):
            if not is_complete(out, part):
                tally, counts = Tally(skip_faults), Counter[str]()
                blocks = _blocks(out, part, documents_of(part, tally), tokenizer, plan, counts)
                shards = _write_shards(out, part, blocks, plan, blocks_per_shard, encode)
                complete_part(out, part, shards, {**tally.to_dict(), **counts})
        missing = merge(out, tokenizer)
    except OSError as error:
        # Another process may have finished the store and removed the parts.
        if finished_store(out, plan) is None:
            # The error of a full disk has no file name.
            error.filename = error.filename or str(out)
            raise
        missing = []
    if not missing:
        remove_parts(out)
    return missing


def _reader(
    out: Path,
    plan: StorePlan,
    worker: tuple[int, int],
    shares_of: Callable[[int], list[Share]],
    *,
    skip_faults: bool,
) -> Callable[[int, Tally], Iterator[Document]]:
    """A function that reads the documents of a part and counts them."""
    found = Repetitions(out / PARTS / "dedup", plan.parts, worker) if plan.reading.dedup else None

    def documents_of(part: int, tally: Tally) -> Iterator[Document]:
        repeated = None
        if found is not None:
            # Once; the other parts find everything there.
            found.find(shares_of, plan.reading, skip=skip_faults)
            repeated = found.of_unit
        return shuffled_documents(shares_of(part), plan.seed, plan.reading, tally, repeated)

    return documents_of


def _blocks(
    out: Path,
    part: int,
    documents: Iterator[Document],
    tokenizer: Tokenizer,
    plan: StorePlan,
    counts: Counter[str],
) -> Iterator[np.ndarray]:
    """The blocks of a part; see `pack_blocks`."""
    label = f"encode {'/'.join(out.parts[-2:])}"
    if plan.parts > 1:
        label += f" part {part} of {plan.parts}"
    shown = progress(documents, None, label=label, unit="documents")
    return pack_blocks(shown, tokenizer, plan.block_size, plan.patch_size, plan.seed, counts)


def _write_shards(
    out: Path,
    part: int,
    blocks: Iterator[np.ndarray],
    plan: StorePlan,
    blocks_per_shard: int,
    encode: Encoder,
) -> int:
    """Write the shards of a part that are missing, and return the number of all."""
    shard = 0
    while of_shard := list(islice(blocks, blocks_per_shard)):
        # Blocks of shards that an earlier run finished are packed again but not encoded.
        if not has_shard(out, part, shard):
            write_shard(out, part, shard, plan, encode(np.stack(of_shard)))
        shard += 1
    return shard


def refuse_corpus_in_store(out: str | Path, corpus: CorpusPaths) -> None:
    """Refuse a local store that is inside a directory of its corpus, or holds files of it.

    Raises:
        DataError: it is; the message names both.
    """
    if not is_remote(out):
        find_files(corpus).refuse_output(
            out, (META, INDEX, REPORT, "shard.00000.mds", "tokenizer.json", "tokenizer.model")
        )


def check_worker(
    out: str | Path, worker: tuple[int, int], parts: int, *, overwrite: bool = False
) -> None:
    """Refuse options that conflict with ``worker`` (I, W) of ``parts``, before any work is done.

    Raises:
        DataError: a remote ``out``, ``overwrite``, or more workers than parts.
    """
    number, workers = worker
    if is_remote(out):
        raise DataError(
            f"--out {out}: workers need a directory that all of them can see; give one, or leave "
            "--worker out"
        )
    if overwrite:
        raise DataError(
            "--overwrite: a worker must not remove the work of others; remove the old store "
            f"({out}) before the first worker starts, and leave --overwrite out"
        )
    if workers > parts:
        raise DataError(
            f"--worker {number}/{workers}: {workers} workers cannot share {parts} "
            f"part{'s' if parts > 1 else ''}; give --parts {workers} or more to all of them"
        )


def _write_remote(
    url: str,
    corpus: CorpusPaths | BegunCorpus,
    tokenizer: Tokenizer,
    plan: StorePlan,
    *,
    overwrite: bool,
    **options: Any,
) -> StoreMeta:
    from calm_dist.data.remote import staging_directory, upload_store

    finished = None if overwrite else finished_store(url, plan)
    if finished is not None:
        return finished
    staging = staging_directory(url)
    meta = write_store(staging, corpus, tokenizer, plan, overwrite=overwrite, **options)
    shards = [shard.stored.path.name for shard in read_shards(staging, meta)]
    others = [meta.tokenizer.file, *([REPORT] if (staging / REPORT).is_file() else [])]
    upload_store(staging, [*shards, *others], url)
    shutil.rmtree(staging)
    return meta


def _encoder(plan: StorePlan, autoencoder: Autoencoder | None, batch_size: int) -> Encoder:
    """A function from blocks uint32[N, T] to the N samples of the store."""
    if plan.variant == "tokens":
        return lambda blocks: ({"tokens": block} for block in blocks.astype(plan.token_dtype))
    if autoencoder is None:
        raise DataError("variant fp16: needs an autoencoder")
    import torch

    model = autoencoder.eval()
    device = next(model.parameters()).device

    def encode(blocks: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(blocks), batch_size):
            batch = blocks[start : start + batch_size]
            with torch.no_grad():
                encoded = model.encode(torch.from_numpy(batch.astype(np.int64)).to(device))
            exact = [value.float().cpu().numpy() for value in encoded]
            mean, log_std = (value.to(torch.float16).cpu().numpy() for value in encoded)
            if not (np.isfinite(mean).all() and np.isfinite(log_std).all()):
                raise DataError(
                    "autoencoder: its latents are not finite in fp16; it is damaged or was not "
                    "trained long enough"
                )
            for i, tokens in enumerate(batch.astype(plan.token_dtype)):
                if plan.latent_dtype == "int8":
                    yield {"tokens": tokens, **quantize(exact[0][i], exact[1][i])}
                else:
                    yield {"tokens": tokens, "mean": mean[i], "log_std": log_std[i]}

    return encode
