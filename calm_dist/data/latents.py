"""Write data stores: pack a corpus into blocks and encode them with a frozen autoencoder.

A store is written shard by shard. Each finished shard is kept under ``OUT/.parts`` until all are
there; then they move into place and ``meta.json`` ends the work. A run that was killed goes on
after its last finished shard, and since no batch of the encoder reaches over the end of a shard,
the result is the same to the byte as without the kill.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calm_dist.data.corpus import (
    ShuffledDocuments,
    corpus_sha256,
    find_files,
    pack_blocks,
)
from calm_dist.data.layout import INDEX, META, is_remote
from calm_dist.data.progress import progress
from calm_dist.data.store import (
    HASH,
    AutoencoderInfo,
    StoreMeta,
    StorePlan,
    TokenizerInfo,
    Variant,
    fingerprint,
    read_meta,
    read_shards,
)
from calm_dist.data.tokenizer import Tokenizer
from calm_dist.errors import DataError
from calm_dist.files import file_sha256, replace_text

if TYPE_CHECKING:
    from calm_dist.models.autoencoder import Autoencoder

__all__ = ["StoreMeta", "StorePlan", "finished_store", "plan_store", "read_meta", "write_store"]

SHARD_BYTES = 64 << 20
_PARTS = ".parts"
_PLAN = "plan.json"


def plan_store(
    corpus: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    variant: Variant,
    block_size: int,
    patch_size: int | None = None,
    autoencoder: str | Path | None = None,
    seed: int = 0,
) -> StorePlan:
    """Say what store these inputs make, without torch and without encoding anything.

    Args:
        corpus: files, directories and globs.
        tokenizer: as `load_tokenizer` gives it.
        variant: ``fp16`` (tokens and latents) or ``tokens``.
        block_size: tokens per block.
        patch_size: tokens per patch K; for ``fp16`` it is the autoencoder's.
        autoencoder: directory with ``config.json`` and a weights file; for ``fp16`` only.
        seed: of the order of documents and the number of begin tokens.

    Raises:
        DataError: inputs that are missing or do not fit each other.
    """
    latent_size, info, vocab_size = None, None, tokenizer.vocab_size
    if variant == "fp16":
        if autoencoder is None:
            raise DataError("variant fp16: needs an autoencoder; give --autoencoder CKPT, or use "
                            "--variant tokens")  # fmt: skip
        config, info = _describe_autoencoder(Path(autoencoder))
        latent_size = config["latent_size"]
        if patch_size not in (None, config["patch_size"]):
            raise DataError(
                f"patch size {patch_size}: the autoencoder {autoencoder} has "
                f"{config['patch_size']}; leave --patch-size out"
            )
        patch_size = config["patch_size"]
        # It may have more: the released ones have a padding token that is not in Llama 3's file.
        vocab_size = config["vocab_size"]
        if tokenizer.vocab_size > vocab_size:
            raise DataError(
                f"tokenizer {tokenizer.path}: has {tokenizer.vocab_size} entries, more than the "
                f"{vocab_size} of the autoencoder {autoencoder}; use its own tokenizer"
            )
        check_tokenizer(Path(autoencoder), tokenizer.fingerprint, f"tokenizer {tokenizer.path}")
    elif autoencoder is not None:
        raise DataError("variant tokens: uses no autoencoder; leave --autoencoder out")
    if patch_size is None:
        raise DataError("variant tokens: give --patch-size, the tokens per patch of the model")
    if block_size <= 0 or patch_size <= 0 or block_size % patch_size:
        raise DataError(
            f"block size {block_size}: must be a positive multiple of the patch size {patch_size}"
        )
    return StorePlan(
        variant=variant,
        block_size=block_size,
        patch_size=patch_size,
        latent_size=latent_size,
        vocab_size=vocab_size,
        tokenizer=TokenizerInfo(
            sha256=tokenizer.fingerprint,
            file="tokenizer.json" if tokenizer.path.suffix == ".json" else "tokenizer.model",
            begin_id=tokenizer.begin_id,
            end_id=tokenizer.end_id,
            pad_id=tokenizer.pad_id,
        ),
        autoencoder=info,
        corpus_sha256=corpus_sha256(find_files(corpus)),
        seed=seed,
    )


def _describe_autoencoder(directory: Path) -> tuple[dict[str, int], AutoencoderInfo]:
    """Sizes and identity of an autoencoder, from its files alone."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        sizes = {name: config[name] for name in ("patch_size", "latent_size", "vocab_size")}
        if not all(type(size) is int and size > 0 for size in sizes.values()):
            raise ValueError(f"sizes {sizes}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"autoencoder {directory / 'config.json'}: is not the configuration of an autoencoder "
            f"({error}); give the directory of its checkpoint"
        ) from error
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (directory / name).is_file():
            sha256 = file_sha256(directory / name)
            return sizes, AutoencoderInfo(sha256=sha256, file=str(directory.resolve()))
    raise DataError(f"autoencoder {directory}: holds no model.safetensors or pytorch_model.bin")


def check_tokenizer(autoencoder: Path, tokenizer_sha256: str, source: str) -> None:
    """Refuse a tokenizer that an autoencoder was not trained with.

    Two tokenizers of one size still give a token different numbers. Autoencoders in the released
    layout do not say which one they were trained with.

    Raises:
        DataError: naming ``source``, where the tokenizer comes from.
    """
    try:
        state = json.loads((autoencoder / "state.json").read_text(encoding="utf-8"))
        trained_with = state.get("tokenizer_sha256")
    except (OSError, ValueError, AttributeError, RecursionError):
        return
    if trained_with not in (None, tokenizer_sha256):
        raise DataError(
            f"{source}: the tokenizer has sha256 {tokenizer_sha256[:12]}…, the "
            f"autoencoder {autoencoder} was trained with {trained_with[:12]}…; use its own "
            "tokenizer, or train an autoencoder with this one"
        )


def finished_store(out: str | Path, plan: StorePlan) -> StoreMeta | None:
    """The finished store in ``out``, if it is there, complete, and what ``plan`` would write.

    Sizes of shards are compared here, their contents by every reader.

    Raises:
        DataError: ``out`` holds a store of another plan, finished or begun, or other files.
    """
    if is_remote(out):
        try:
            meta = read_meta(out)
        except DataError:
            return None
        _refuse_other_plan(out, meta.to_dict(), plan)
        return meta
    out = Path(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if (out / META).is_file():
        meta = read_meta(out)
        _refuse_other_plan(out, meta.to_dict(), plan)
        for shard in read_shards(out, meta):
            shard.check_size()
        return meta
    begun = out / _PARTS / _PLAN
    if not begun.is_file():
        raise DataError(f"--out {out}: exists and is no data store; give an empty or new directory")
    _refuse_other_plan(out, json.loads(begun.read_text(encoding="utf-8")), plan)
    return None


def _refuse_other_plan(out: str | Path, present: dict[str, Any], plan: StorePlan) -> None:
    for key, wanted in plan.to_dict().items():
        found = present.get(key)
        if key == "autoencoder" and found and wanted:
            # The same weights at another path are the same autoencoder.
            found, wanted = found["sha256"], wanted["sha256"]
        if found != wanted:
            raise DataError(
                f"--out {out}: holds a store with another {key} ({found} there, {wanted} now); "
                "give another --out, or --overwrite to replace it"
            )


def write_store(
    out: str | Path,
    corpus: Sequence[str | Path],
    tokenizer: Tokenizer,
    plan: StorePlan,
    *,
    autoencoder: Autoencoder | None = None,
    batch_size: int = 16,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> StoreMeta:
    """Write the store of ``plan``, or what is still missing of it.

    Args:
        out: directory of the store, or a URL that it is uploaded to from a scratch directory
            (``TMPDIR`` chooses the disk).
        corpus, tokenizer: what ``plan`` was made from.
        plan: as `plan_store` gives it.
        autoencoder: in eval mode and fp32; it encodes on the device where its weights are.
        batch_size: blocks per call of the encoder.
        shard_bytes: size of a shard; large corpora want 512 MiB.
        overwrite: remove another store in ``out`` first.

    Raises:
        DataError: as `finished_store` without ``overwrite``; a corpus shorter than one block;
            latents that fp16 cannot hold.
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
        )
    out = Path(out)
    if overwrite and ((out / META).is_file() or (out / _PARTS / _PLAN).is_file()):
        _remove_store(out)
    finished = finished_store(out, plan)
    if finished is not None:
        return finished
    parts = out / _PARTS
    parts.mkdir(parents=True, exist_ok=True)
    replace_text(parts / _PLAN, json.dumps(plan.to_dict(), indent=2))

    documents = ShuffledDocuments(corpus, plan.seed)
    shown = progress(documents, len(documents), label=str(out), unit="documents")
    blocks = pack_blocks(shown, tokenizer, plan.block_size, plan.patch_size, plan.seed)
    blocks_per_shard = max(1, shard_bytes // plan.sample_bytes)
    encode = _encoder(plan, autoencoder, batch_size)
    for part in (parts / f"{number:05}" for number in count()):
        of_part = list(islice(blocks, blocks_per_shard))
        if not of_part:
            break
        # Blocks of shards that an earlier run finished are packed again, but not encoded.
        if not part.is_dir():
            _write_part(part, plan, of_part, encode)
        elif _samples(part) != len(of_part):
            raise DataError(
                f"--out {out}: was begun with shards of another size ({_samples(part)} blocks "
                f"there, {len(of_part)} now); give the same size, or --overwrite"
            )
    return _finish(out, tokenizer, plan)


def _write_remote(
    url: str,
    corpus: Sequence[str | Path],
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
    shards = [shard.path.name for shard in read_shards(staging, meta)]
    upload_store(staging, [*shards, meta.tokenizer.file], url)
    shutil.rmtree(staging)
    return meta


def _encoder(
    plan: StorePlan, autoencoder: Autoencoder | None, batch_size: int
) -> Callable[[np.ndarray], Iterator[dict[str, np.ndarray]]]:
    """A function from blocks uint32[N, T] to the N samples of the store."""
    if plan.variant == "tokens":
        return lambda blocks: ({"tokens": block} for block in blocks)
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
            mean, log_std = (value.to(torch.float16).cpu().numpy() for value in encoded)
            if not (np.isfinite(mean).all() and np.isfinite(log_std).all()):
                raise DataError(
                    "autoencoder: gives latents that are not finite in fp16; it is damaged or was "
                    "not trained far enough"
                )
            for i, tokens in enumerate(batch):
                yield {"tokens": tokens, "mean": mean[i], "log_std": log_std[i]}

    return encode


def _write_part(
    part: Path,
    plan: StorePlan,
    blocks: list[np.ndarray],
    encode: Callable[[np.ndarray], Iterator[dict[str, np.ndarray]]],
) -> None:
    """One shard and its index in a directory that appears when both are complete."""
    from streaming.base import MDSWriter

    partial = part.with_suffix(".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    with MDSWriter(out=str(partial), columns=plan.columns, hashes=[HASH], size_limit=None) as mds:
        for sample in encode(np.stack(blocks)):
            mds.write(sample)
    partial.rename(part)


def _part_index(part: Path) -> dict[str, Any]:
    index = json.loads((part / INDEX).read_text(encoding="utf-8"))
    return index["shards"][0]


def _samples(part: Path) -> int:
    return _part_index(part)["samples"]


def _finish(out: Path, tokenizer: Tokenizer, plan: StorePlan) -> StoreMeta:
    """Move all shards into place and write index, tokenizer and, last, ``meta.json``."""
    shards = []
    for number in count():
        part = out / _PARTS / f"{number:05}"
        if not part.is_dir():
            break
        entry = _part_index(part)
        written = part / entry["raw_data"]["basename"]
        entry["raw_data"]["basename"] = f"shard.{number:05}.mds"
        if written.exists():
            written.replace(out / entry["raw_data"]["basename"])
        shards.append(entry)
    if not shards:
        raise DataError(
            f"corpus: holds less than one block of {plan.block_size} tokens; give more text or a "
            "smaller --block-size"
        )
    index = json.dumps({"version": 2, "shards": shards}, sort_keys=True)
    replace_text(out / INDEX, index)
    shutil.copyfile(tokenizer.path, out / plan.tokenizer.file)
    num_blocks = sum(entry["samples"] for entry in shards)
    fields = {
        **plan.to_dict(),
        "num_blocks": num_blocks,
        "num_tokens": num_blocks * plan.block_size,
    }
    fields["fingerprint"] = fingerprint(fields, index.encode())
    meta = StoreMeta.model_validate(fields)
    replace_text(out / META, json.dumps(meta.to_dict(), indent=2) + "\n")
    shutil.rmtree(out / _PARTS)
    return meta


def _remove_store(out: Path) -> None:
    """Remove the files of a store, and nothing else."""
    (out / META).unlink(missing_ok=True)
    shutil.rmtree(out / _PARTS, ignore_errors=True)
    for pattern in (INDEX, "shard.*.mds", "tokenizer.json", "tokenizer.model"):
        for file in out.glob(pattern):
            file.unlink()
