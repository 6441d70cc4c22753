"""A store while it is written: shards under ``OUT/.parts``, which are merged into the store.

    .parts/plan.json        the plan of the store; appears together with the directory
    .parts/manifest.json    what each part reads of the corpus; see `manifest`
    .parts/report.00003.json  what part 3 read and left out
    .parts/00003/00017/     shard 17 of part 3 and its index; appears atomically
    .parts/00003.json       the index entries of all shards of part 3; marks it as complete

Any number of processes, on any nodes, write here at once, and each may die at any moment. Hence
there are no locks, which a dead process might hold: each file or directory is made under a random
name and renamed once it is complete. A step that another process has completed is skipped.
``meta.json`` is written last, and ``.parts`` is removed only after it: if ``.parts`` is gone, the
store is finished.
"""

from __future__ import annotations

import errno
import json
import re
import secrets
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from calm_dist.data.existing import (
    BLOCKS,
    PARTS,
    PLAN,
    begun_plan,
    damaged,
    plan_of_unfinished,
    refuse_other_plan,
)
from calm_dist.data.layout import INDEX, META
from calm_dist.data.manifest import (
    MANIFEST,
    BegunCorpus,
    can_continue_without,
    write_manifest,
)
from calm_dist.data.store import (
    HASH,
    StoreMeta,
    StorePlan,
    fingerprint,
)
from calm_dist.errors import DataError
from calm_dist.text.corpus_files import CorpusFiles
from calm_dist.text.reports import REPORT, merged_report
from calm_dist.text.tokenizer import Tokenizer

# There while a store is being removed, which may be interrupted.
_BEING_REMOVED = ".being_removed"

# MDS counts the bytes of a shard in 32 bits and overflows silently. Every sample has an offset of
# 4 bytes; a header needs at most the rest.
_MDS_BYTES = 2**32 - 1
_MDS_HEADER_BYTES = 1 << 16
_MDS_OFFSET_BYTES = 4


def blocks_in_shard(plan: StorePlan, shard_bytes: int) -> int:
    """Number of blocks in a shard of this size; at least one.

    Raises:
        DataError: such a shard, or a single block, is larger than MDS can describe.
    """
    most = (_MDS_BYTES - _MDS_HEADER_BYTES) // (plan.sample_bytes + _MDS_OFFSET_BYTES)
    if not most:
        raise DataError(
            f"block size {plan.block_size}: one block takes {plan.sample_bytes} bytes in the "
            "store, but a shard must be smaller than 4 GiB; give a smaller --block-size"
        )
    if shard_bytes < 1:
        raise DataError(f"shard size {shard_bytes} bytes: must be positive")
    blocks = max(1, shard_bytes // plan.sample_bytes)
    if blocks > most:
        raise DataError(
            f"shard size {shard_bytes / 2**20:.16g} MiB: a shard of such blocks must be smaller "
            f"than 4 GiB; give --shard-mib {most * plan.sample_bytes >> 20} or less"
        )
    return blocks


def begin(
    out: Path,
    plan: StorePlan,
    blocks_per_shard: int,
    corpus: CorpusFiles | BegunCorpus | None = None,
    *,
    skip_faults: bool = False,
) -> None:
    """Begin this store in ``out``, unless it has been begun there already.

    Args:
        out, plan: directory and description of the store.
        blocks_per_shard: from `blocks_in_shard`.
        corpus: its files; or from `begun_corpus`, if the store has been begun; None: blocks that
            are made without a corpus, and need no manifest.
        skip_faults: accept damaged tables, which those who read the parts count.

    Raises:
        DataError: another store was begun there, or this one with another shard size or by an
            earlier version, or the unfinished store is damaged.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = None if isinstance(corpus, BegunCorpus) else corpus
    if not isinstance(corpus, BegunCorpus) and begun_plan(out) is None:
        scratch = out / f"{PARTS}.{_random_name()}"
        scratch.mkdir()
        try:
            if files is not None:
                write_manifest(scratch, files, plan, skip=skip_faults)
            described = {**plan.to_dict(), BLOCKS: blocks_per_shard}
            (scratch / PLAN).write_text(json.dumps(described, indent=2), encoding="utf-8")
            _put(scratch, out / PARTS)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    present = plan_of_unfinished(out)
    refuse_other_plan(out, present, plan)
    found = present.get(BLOCKS)
    if found != blocks_per_shard:
        raise DataError(
            f"--out {out}: was begun with shards of another size ({found} blocks there, "
            f"{blocks_per_shard} now); give the same size, or --overwrite"
        )
    if corpus is not None and not (out / PARTS / MANIFEST).is_file():
        plan_of_unfinished(out)
        if files is None or not can_continue_without(files, plan):
            raise DataError(
                f"--out {out}: was begun by an earlier version, which read the corpus in another "
                "order; finish it with that version, or write it again with --overwrite"
            )
        write_manifest(out / PARTS, files, plan, skip=skip_faults)


def is_complete(out: Path, part: int) -> bool:
    """Whether all shards of a part have been written."""
    return _marker(out, part).is_file()


def has_shard(out: Path, part: int, shard: int) -> bool:
    """Whether this shard of a part has been written."""
    return _shard_directory(out, part, shard).is_dir()


def write_shard(
    out: Path, part: int, shard: int, plan: StorePlan, samples: Iterable[dict[str, np.ndarray]]
) -> None:
    """Write one shard of a part.

    Raises:
        OSError: the disk is full or fails; or other workers have written this part too and merged
            the store.
    """
    from calm_dist.compat.streaming import MDSWriter

    if (out / META).is_file():
        raise FileExistsError(errno.EEXIST, "the store is finished", str(out / META))
    place = _shard_directory(out, part, shard)
    place.parent.mkdir(exist_ok=True)
    scratch = place.parent / f"{shard:05}.{_random_name()}"
    scratch.mkdir()
    try:
        with MDSWriter(
            out=str(scratch),
            columns=plan.columns,
            compression=plan.compression,
            hashes=[HASH],
            size_limit=None,
        ) as mds:
            for sample in samples:
                mds.write(sample)
        _put(scratch, place)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def complete_part(
    out: Path, part: int, num_shards: int, report: dict[str, Any] | None = None
) -> None:
    """Mark a part as complete: all its shards exist. A part may have none.

    ``report`` is what `calm_dist.text.reports` merges.
    """
    entries = []
    for shard in range(num_shards):
        index = _shard_directory(out, part, shard) / INDEX
        try:
            (entry,) = json.loads(index.read_text(encoding="utf-8"))["shards"]
            _check_entry(entry)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise damaged(out, index, error) from error
        entries.append(entry)
    if report is not None:
        _write(out, _report(out, part), json.dumps(report).encode())
    _write(out, _marker(out, part), json.dumps(entries).encode())


def merge(out: Path, tokenizer: Tokenizer) -> list[int]:
    """Make the finished store from all parts, if they are complete.

    Two processes may do this at once, and one may continue where another died: each shard is moved
    once, by either of them, and both write everything else from the same markers.

    Returns:
        The parts that are not complete yet; empty if the store is finished.

    Raises:
        DataError: the corpus holds less than one block.
        OSError: the disk is full or fails; or another process was faster, and ``.parts`` is gone.
    """
    # Not the caller's plan: the path of the autoencoder may differ between workers, and all must
    # write the same meta.json.
    fields = plan_of_unfinished(out)
    fields.pop(BLOCKS, None)
    plan = StorePlan.model_validate(fields)
    # On NFS, our own marker, written just before, makes those of other nodes visible here. So the
    # last two workers cannot both miss each other's.
    missing = [part for part in range(plan.parts) if not is_complete(out, part)]
    if missing:
        return [] if (out / META).is_file() else missing
    shards = [shard for part in range(plan.parts) for shard in _shards_of(out, part)]
    if not shards:
        raise DataError(
            f"corpus: holds less than one block of {plan.block_size} tokens"
            f"{' in each part' if plan.parts > 1 else ''}; give more text"
            f"{', fewer --parts' if plan.parts > 1 else ''} or a smaller --block-size"
        )
    entries = []
    for number, (file, entry) in enumerate(shards):
        name = f"shard.{number:05}.mds"
        moved = {**entry, "raw_data": {**entry["raw_data"], "basename": name}}
        if entry["zip_data"] is not None:
            packed = f"{name}{file.name.removeprefix(entry['raw_data']['basename'])}"
            moved["zip_data"] = {**entry["zip_data"], "basename": packed}
        _move(file, out / (moved["zip_data"] or moved["raw_data"])["basename"])
        entries.append(moved)
    if (report := _merged_report(out, plan.parts)) is not None:
        _write(out, out / REPORT, (json.dumps(report, indent=2) + "\n").encode())
    index = json.dumps({"version": 2, "shards": entries}, sort_keys=True).encode()
    _write(out, out / INDEX, index)
    _write(out, out / plan.tokenizer.file, tokenizer.path.read_bytes())
    num_blocks = sum(entry["samples"] for entry in entries)
    fields |= {"num_blocks": num_blocks, "num_tokens": num_blocks * plan.block_size}
    fields["fingerprint"] = fingerprint(fields, index)
    meta = StoreMeta.model_validate(fields)
    _write(out, out / META, (json.dumps(meta.to_dict(), indent=2) + "\n").encode())
    return []


def _merged_report(out: Path, parts: int) -> dict[str, Any] | None:
    """The report of all parts; None if an earlier version wrote one of them."""
    tallies = []
    for part in range(parts):
        file = _report(out, part)
        try:
            tallies.append(json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            if (out / META).is_file():
                raise
            return None
        except (ValueError, RecursionError) as error:
            raise damaged(out, file, error) from error
    try:
        return merged_report(tallies)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(out, out / PARTS, error) from error


def _shards_of(out: Path, part: int) -> list[tuple[Path, dict[str, Any]]]:
    """Shard files (at the paths where they were written) and index entries of a complete part."""
    marker = _marker(out, part)
    try:
        entries = json.loads(marker.read_text(encoding="utf-8"))
        if not isinstance(entries, list):
            raise ValueError(f"a {type(entries).__name__} instead of a list")
        for entry in entries:
            _check_entry(entry)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(out, marker, error) from error
    return [
        (_shard_directory(out, part, shard) / _stored_name(entry), entry)
        for shard, entry in enumerate(entries)
    ]


def _stored_name(entry: dict[str, Any]) -> str:
    """The file of a shard: the compressed one, if there is one."""
    return str((entry["zip_data"] or entry["raw_data"])["basename"])


def _check_entry(entry: Any) -> None:
    """Raises ValueError, KeyError or TypeError unless this is the entry of a shard of a store."""
    name, samples = entry["raw_data"]["basename"], entry["samples"]
    if entry["zip_data"] is not None and entry["zip_data"]["basename"] != f"{name}.zstd":
        raise ValueError(f"shard name {entry['zip_data']['basename']!r}")
    if not isinstance(name, str) or not re.fullmatch(r"shard\.\d{5,}\.mds", name):
        raise ValueError(f"shard name {name!r}")
    if type(samples) is not int or samples < 1:
        raise ValueError(f"{samples!r} samples")


def _move(file: Path, place: Path) -> None:
    try:
        file.replace(place)
    except FileNotFoundError:
        # Already moved, by another process or before a kill.
        if not place.is_file():
            raise


def remove_parts(out: Path) -> None:
    """Remove the ``.parts`` that a finished store no longer needs."""
    # The rename takes it out of the way of processes that still write there.
    with suppress(OSError):
        (out / PARTS).rename(out / f"{PARTS}.{_random_name()}")
    for leftover in out.glob(f"{PARTS}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def remove_store(out: Path) -> None:
    """Remove the files of a store, finished or not, and nothing else."""
    # The plan's existence shows that this is a store: even a damaged one is replaced.
    known_by = (out / META, out / PARTS / PLAN, out / _BEING_REMOVED)
    if not any(file.is_file() for file in known_by):
        return
    (out / _BEING_REMOVED).touch()
    (out / META).unlink(missing_ok=True)
    remove_parts(out)
    for pattern in (
        INDEX,
        REPORT,
        "shard.*.mds",
        "shard.*.mds.zstd",
        "tokenizer.json",
        "tokenizer.model",
    ):
        for file in out.glob(pattern):
            file.unlink()
    (out / _BEING_REMOVED).unlink()


def _marker(out: Path, part: int) -> Path:
    return out / PARTS / f"{part:05}.json"


def _report(out: Path, part: int) -> Path:
    return out / PARTS / f"report.{part:05}.json"


def _shard_directory(out: Path, part: int, shard: int) -> Path:
    return out / PARTS / f"{part:05}" / f"{shard:05}"


def _random_name() -> str:
    """Name for a file or directory that only this process knows."""
    return f"{secrets.token_hex(4)}.tmp"


def _put(directory: Path, place: Path) -> None:
    """Move a directory to its place, unless another process has put the same one there."""
    try:
        directory.rename(place)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


def _write(out: Path, file: Path, data: bytes) -> None:
    """Write a file atomically; needs ``.parts`` for the temporary file."""
    partial = out / PARTS / f"{file.name}.{_random_name()}"
    partial.write_bytes(data)
    partial.replace(file)
