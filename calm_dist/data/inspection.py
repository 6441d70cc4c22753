"""What is in a store: every byte checked, and single blocks shown beside what a decoder makes of
them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calm_dist.data.int8 import dequantize
from calm_dist.data.layout import INDEX, META, is_remote
from calm_dist.data.store import Shard, StoreMeta, StorePlan, read_meta, read_shards
from calm_dist.data.store_plan import describe_autoencoder
from calm_dist.errors import DataError, UnreachableError
from calm_dist.files import file_sha256
from calm_dist.progress import progress
from calm_dist.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from calm_dist.models.autoencoder import Autoencoder

# fp16 latents of a trained autoencoder are far from this; exp(12) is a standard deviation of 10^5.
_LARGEST_LOG_STD = 12.0
_ROWS_BYTES = 64 << 20
_DECODED_PATCHES = 256

Decode = Callable[[np.ndarray], np.ndarray]
"""From means float16[P, l] to the most likely tokens int64[P * K]."""


@dataclass
class StoreCheck:
    """The result of `check_store`.

    Attributes:
        meta: the store's description.
        shards, blocks, tokens, bytes: what was read.
        documents: end tokens found, each of which ends a document; None if one token both begins
            and ends documents.
        problems: what is wrong, a sentence each.
    """

    meta: StoreMeta
    shards: int = 0
    blocks: int = 0
    tokens: int = 0
    bytes: int = 0
    documents: int | None = None
    problems: list[str] = field(default_factory=list)


@contextmanager
def store_files(path: str) -> Iterator[tuple[Path, Callable[[str], None], Callable[[Path], None]]]:
    """A directory with a store's description, and functions that fetch a file into it and drop it.

    Both do nothing for a local store. A remote store is thus read shard by shard.

    Raises:
        DataError: a download failed.
    """
    if not is_remote(path):
        yield Path(path), lambda name: None, lambda file: None
        return
    from calm_dist.data.download import DEFAULT
    from calm_dist.data.remote import fetch_file

    with tempfile.TemporaryDirectory(prefix="calm_dist_store_") as scratch:
        directory = Path(scratch)
        for name in (META, INDEX):
            fetch_file(path, name, directory, DEFAULT)
        yield directory, lambda name: fetch_file(path, name, directory, DEFAULT), Path.unlink


@contextmanager
def unpacked(shard: Shard) -> Iterator[Shard]:
    """A shard whose samples can be read: itself, or its unpacked form in a temporary directory.

    Raises:
        DataError: it is missing or damaged.
    """
    if shard.packed is None:
        yield shard
        return
    with tempfile.TemporaryDirectory(prefix="calm_dist_shard_") as scratch:
        place = Path(scratch) / shard.path.name
        shard.unpack(shard.packed.path, place)
        yield replace(shard, path=place)


def check_store(path: str) -> StoreCheck:
    """Check every byte of a store: hashes, counts, token ids, and latents.

    Args:
        path: directory or URL.

    Raises:
        DataError: it has no valid ``meta.json`` or ``index.json``, or a download failed.
    """
    with store_files(path) as (directory, fetch, drop):
        meta = read_meta(directory)
        shards = read_shards(directory, meta)
        result = StoreCheck(meta)
        if meta.tokenizer.begin_id != meta.tokenizer.end_id:
            result.documents = 0
        for shard in progress(shards, len(shards), label="check", unit="shards"):
            try:
                fetch(shard.stored.path.name)
                with unpacked(shard) as samples:
                    _check_shard(samples, result)
                drop(shard.stored.path)
            except UnreachableError:
                raise
            except DataError as error:
                result.problems.append(str(error))
        if result.blocks != meta.num_blocks and not result.problems:
            result.problems.append(
                f"{META} has {meta.num_blocks} blocks, the shards {result.blocks}"
            )
        try:
            fetch(meta.tokenizer.file)
            if file_sha256(directory / meta.tokenizer.file) != meta.tokenizer.sha256:
                result.problems.append(
                    f"{meta.tokenizer.file}: is not the tokenizer of the store; copy it again"
                )
        except UnreachableError:
            raise
        except DataError as error:
            result.problems.append(str(error))
    return result


def _check_shard(shard: Shard, result: StoreCheck) -> None:
    meta = result.meta
    shard.check()
    result.shards += 1
    result.bytes += shard.stored.size
    for first, columns in _rows(shard, meta):
        tokens = columns["tokens"]
        result.blocks += len(tokens)
        result.tokens += tokens.size
        if result.documents is not None:
            result.documents += int((tokens == meta.tokenizer.end_id).sum())
        if (most := int(tokens.max())) >= meta.vocab_size:
            row = first + int((tokens >= meta.vocab_size).any(axis=1).argmax())
            result.problems.append(
                f"shard {shard.path}: block {row} of it has the token {most}, but there are only "
                f"{meta.vocab_size}; encode the corpus again"
            )
        for name, values in dequantize(columns).items():
            if name == "tokens":
                continue
            if not np.isfinite(values).all() or (
                name == "log_std" and float(values.max()) > _LARGEST_LOG_STD
            ):
                result.problems.append(
                    f"shard {shard.path}: its {name} has values that no trained autoencoder gives; "
                    "encode the corpus again"
                )


def _rows(shard: Shard, meta: StoreMeta) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """The columns of a checked shard in groups of rows, and the number of their first row."""
    start = shard.size - shard.samples * shard.sample_bytes
    whole = np.memmap(shard.path, np.uint8, "r", start, (shard.samples, shard.sample_bytes))
    step = max(1, _ROWS_BYTES // shard.sample_bytes)
    for first in range(0, shard.samples, step):
        yield first, _columns(np.array(whole[first : first + step]), meta)


def _columns(rows: np.ndarray, meta: StoreMeta) -> dict[str, np.ndarray]:
    """Raw samples uint8[N, bytes] as columns; MDS stores them in the order of their names."""
    columns, place = {}, 0
    for name in sorted(meta.columns):
        _, dtype, shape = meta.columns[name].split(":")
        size = meta.column_sizes[name]
        raw = np.ascontiguousarray(rows[:, place : place + size])
        columns[name] = raw.view(dtype).reshape(len(rows), *map(int, shape.split(",")))
        place += size
    return columns


def read_block(path: str, number: int) -> dict[str, np.ndarray]:
    """The columns of one block, after checking the shard that holds it; int8 latents as float32.

    Raises:
        DataError: the block does not exist, or its shard is damaged.
    """
    with store_files(path) as (directory, fetch, _):
        meta = read_meta(directory)
        _check_number(path, meta, number)
        for shard in read_shards(directory, meta):
            if number < shard.samples:
                fetch(shard.stored.path.name)
                with unpacked(shard) as samples:
                    samples.check()
                    for first, columns in _rows(samples, meta):
                        if number < first + len(columns["tokens"]):
                            block = {n: column[number - first] for n, column in columns.items()}
                            return dequantize(block)
            number -= shard.samples
    raise AssertionError("read_shards has checked the number of blocks")


def check_request(path: str, number: int, autoencoder: Path | None) -> None:
    """Check that a store has a block and was encoded by ``autoencoder``, if one is given.

    Raises:
        DataError: it does not, or was not.
    """
    with store_files(path) as (directory, _, _):
        meta = read_meta(directory)
    _check_number(path, meta, number)
    find_autoencoder(meta, autoencoder)


def _check_number(path: str, meta: StoreMeta, number: int) -> None:
    if not 0 <= number < meta.num_blocks:
        raise DataError(f"block {number}: {path} has the blocks 0 to {meta.num_blocks - 1}")


def tokenizer_of(path: str) -> tuple[StoreMeta, Tokenizer]:
    """A store's description and its tokenizer.

    Raises:
        DataError: one of them is missing or damaged.
    """
    with store_files(path) as (directory, fetch, _):
        meta = read_meta(directory)
        fetch(meta.tokenizer.file)
        names = (meta.tokenizer.begin_token, meta.tokenizer.end_token)
        return meta, load_tokenizer(directory / meta.tokenizer.file, *names)


def settings_of(store: str, out: str) -> dict[str, Any]:
    """The options of ``tools/encode_latents.py`` for a store ``out`` that fits a local one.

    Raises:
        DataError: there is no store, it is ``out``, or its autoencoder is not where it was.
    """
    if is_remote(store):
        raise DataError(f"--append-to {store}: give a local copy of the store")
    if Path(store).resolve() == Path(out).resolve():
        raise DataError(
            f"--out {out}: is the store of --append-to, which is not changed; give a directory for "
            "the new text, and both to a training: data.path=[…, …]"
        )
    meta = read_meta(store)
    autoencoder = find_autoencoder(meta, None)
    if meta.autoencoder is not None and autoencoder is None:
        raise DataError(
            f"--append-to {store}: its autoencoder is not in {meta.autoencoder.file} any more; "
            "put it there"
        )
    return {
        "tokenizer": str(Path(store) / meta.tokenizer.file),
        "begin_token": meta.tokenizer.begin_token,
        "end_token": meta.tokenizer.end_token,
        "variant": meta.variant,
        "block_size": meta.block_size,
        "patch_size": meta.patch_size,
        "autoencoder": None if autoencoder is None else str(autoencoder),
        "token_dtype": meta.token_dtype,
        "compression": meta.compression,
        "latent_dtype": meta.latent_dtype,
    }


def refuse_same_text(store: str, plan: StorePlan) -> None:
    """Raises DataError if a planned store holds the text of another one."""
    meta = read_meta(store)
    if plan.corpus_sha256 == meta.corpus_sha256 and plan.reading == meta.reading:
        raise DataError(
            f"--append-to {store}: --corpus is the text of this store; give the text to be added"
        )


def find_autoencoder(meta: StoreMeta, given: Path | None) -> Path | None:
    """The directory of the autoencoder that encoded a store.

    Args:
        meta: the store's description.
        given: where it is; None: where it was.

    Returns:
        None if the store has no latents, or the autoencoder is not there any more.

    Raises:
        DataError: ``given`` is another autoencoder, or the store has no latents.
    """
    if meta.autoencoder is None:
        if given is not None:
            raise DataError("--autoencoder: the store has tokens only; leave it out")
        return None
    directory = given or Path(meta.autoencoder.file)
    try:
        _, info = describe_autoencoder(directory)
    except DataError:
        if given is not None:
            raise
        return None
    if info.sha256 == meta.autoencoder.sha256:
        return directory
    if given is None:
        return None
    raise DataError(
        f"--autoencoder {given}: has sha256 {info.sha256[:12]}…, the store was encoded by "
        f"{meta.autoencoder.sha256[:12]}… ({meta.autoencoder.file}); give that one"
    )


def decoder(autoencoder: Autoencoder) -> Decode:
    """The most likely tokens for the means of patches."""
    import torch

    device = next(autoencoder.parameters()).device

    def decode(mean: np.ndarray) -> np.ndarray:
        found = []
        # The logits of a block with a large vocabulary take gigabytes.
        for start in range(0, len(mean), _DECODED_PATCHES):
            some = torch.from_numpy(mean[start : start + _DECODED_PATCHES].astype(np.float32))
            with torch.no_grad():
                found.append(autoencoder.decode(some[None].to(device)).argmax(-1)[0].cpu().numpy())
        return np.concatenate(found)

    return decode


def describe_block(
    block: dict[str, np.ndarray], meta: StoreMeta, tokenizer: Tokenizer, decode: Decode | None
) -> dict[str, Any]:
    """A block as plain values: tokens, text, and each patch with its posterior.

    Args:
        block: from `read_block`.
        meta, tokenizer: from `tokenizer_of`.
        decode: from `decoder`; None: the patches are not decoded.

    Returns:
        ``tokens``, ``text``, ``patches`` and, for stores of latents, ``mean_std`` (the mean of all
        standard deviations), ``unused_dimensions`` (those whose posterior equals the prior:
        KL below 0.01) and, if decoded, ``token_accuracy`` and ``decoded_text``.
    """
    tokens = block["tokens"].tolist()
    decoded = None if decode is None else decode(block["mean"]).tolist()
    patches = []
    for i in range(meta.num_patches):
        own = slice(i * meta.patch_size, (i + 1) * meta.patch_size)
        patch: dict[str, Any] = {"tokens": tokens[own], "text": _text(tokenizer, meta, tokens[own])}
        if "mean" in block:
            mean, std = block["mean"][i].astype(float), np.exp(block["log_std"][i].astype(float))
            patch |= {"mean_norm": float(np.linalg.norm(mean)), "std": float(std.mean()),
                      "std_min": float(std.min()), "std_max": float(std.max())}  # fmt: skip
        if decoded is not None:
            patch["decoded"] = decoded[own]
            patch["decoded_text"] = _text(tokenizer, meta, decoded[own])
        patches.append(patch)
    result: dict[str, Any] = {"tokens": tokens, "text": _text(tokenizer, meta, tokens)}
    if "mean" in block:
        mean, log_std = block["mean"].astype(float), block["log_std"].astype(float)
        divergence = ((mean**2 + np.exp(2 * log_std) - 1) / 2 - log_std).mean(axis=0)
        result["mean_std"] = float(np.exp(log_std).mean())
        result["unused_dimensions"] = int((divergence < 0.01).sum())
    if decoded is not None:
        result["token_accuracy"] = float(np.mean(np.array(decoded) == np.array(tokens)))
        result["decoded_text"] = _text(tokenizer, meta, decoded)
    return {**result, "patches": patches}


def _text(tokenizer: Tokenizer, meta: StoreMeta, tokens: list[int]) -> str:
    """Text of tokens, with begin and end tokens by name."""
    names = {
        meta.tokenizer.begin_id: tokenizer.begin_token,
        meta.tokenizer.end_id: tokenizer.end_token,
    }
    parts: list[str] = []
    waiting: list[int] = []
    for token in tokens:
        if token in names:
            parts += [tokenizer.decode(waiting), names[token]]
            waiting = []
        elif token < tokenizer.vocab_size:
            waiting.append(token)
        else:
            parts += [tokenizer.decode(waiting), f"<{token}>"]
            waiting = []
    return "".join([*parts, tokenizer.decode(waiting)])
