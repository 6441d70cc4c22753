"""The format of a data store: one MDS dataset, its ``meta.json`` and a copy of its tokenizer.

A sample is one block: ``tokens`` uint32[T] or uint16[T] and, in the variant ``fp16``, the posterior
of every patch, ``mean`` and ``log_std`` float16[P, l] with P = T/K, or int8 with ``scales``
float16[4, l]. Streaming trusts
``index.json``: it unpickles columns that the index calls pickles, writes to paths that the index
names, and skips files that it cannot read. Therefore every field of the index is checked here
first.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from calm_dist.costs.memory import UINT16_ENTRIES
from calm_dist.data.layout import INDEX, META, is_remote
from calm_dist.errors import DataError, listed, shown, unreadable
from calm_dist.files import file_sha256, read_bounded
from calm_dist.text.formats import TEXT_AND_ID, Reading

if TYPE_CHECKING:
    from calm_dist.data.download import Downloads
    from calm_dist.text.tokenizer import Tokenizer

# The hash of every shard in the index; also Streaming's name for it.
HASH = "sha256"

Variant = Literal["fp16", "tokens"]
TokenDtype = Literal["uint16", "uint32"]
Compression = Literal["zstd"]
LatentDtype = Literal["float16", "int8"]
Positive = Annotated[int, Field(gt=0, lt=2**63)]
NonNegative = Annotated[int, Field(ge=0, lt=2**63)]
_SHA256 = re.compile(r"[0-9a-f]{64}")
Sha256 = Annotated[str, Field(pattern=f"^{_SHA256.pattern}$")]

# Bytes of meta.json, which has about a thousand, and of index.json, which has 600 per shard.
_LARGEST_META, _LARGEST_INDEX = 1 << 20, 1 << 28
# MDS keeps offsets in a shard in 32 bits, and describes the columns in a header.
_LARGEST_SHARD, _LARGEST_HEADER = 1 << 32, 1 << 16

_SHARD_NAME = re.compile(r"shard\.\d{5,}\.mds")
_PACKED_NAME = re.compile(rf"{_SHARD_NAME.pattern}\.zstd")
_CHUNK_BYTES = 1 << 20


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TokenizerInfo(_Strict):
    """The tokenizer of a store; ``file`` is the name of its copy inside the store."""

    sha256: Sha256
    file: Literal["tokenizer.json", "tokenizer.model"]
    begin_id: NonNegative
    end_id: NonNegative
    pad_id: NonNegative | None
    begin_token: str | None = None
    end_token: str | None = None
    """Names of these tokens; None in stores of earlier versions, which used the tokenizer's own."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self:
        """The description of a tokenizer that is about to be copied into a store."""
        return cls(
            sha256=tokenizer.fingerprint,
            file="tokenizer.json" if tokenizer.path.suffix == ".json" else "tokenizer.model",
            begin_id=tokenizer.begin_id,
            end_id=tokenizer.end_id,
            pad_id=tokenizer.pad_id,
            begin_token=tokenizer.begin_token,
            end_token=tokenizer.end_token,
        )


class AutoencoderInfo(_Strict):
    """The autoencoder of a store: sha256 of its weights file, and its original directory."""

    sha256: Sha256
    file: str


class StorePlan(_Strict):
    """A store's description before it is written; runs with equal plans write the same store."""

    format: Literal[1] = 1
    variant: Variant
    block_size: Positive
    patch_size: Positive
    latent_size: Positive | None
    vocab_size: Positive
    """The autoencoder's vocabulary size, or the tokenizer's in the variant tokens; models use
    it."""
    tokenizer: TokenizerInfo
    autoencoder: AutoencoderInfo | None
    corpus_sha256: Sha256
    seed: NonNegative
    parts: Positive = 1
    """Number of parts that the shuffled documents were cut into; each drops the tokens after its
    last full block."""
    order: Literal[2] | None = None
    """2: the corpus has several units (`calm_dist.text.units`), each shuffled on its own, and
    corpus_sha256 covers the files' sizes and samples of them. None: all documents were shuffled
    together and all contents hashed, as of small corpora, and of any corpus in earlier versions."""
    reading: Reading = TEXT_AND_ID
    """What of the corpus became documents."""
    token_dtype: TokenDtype = "uint32"
    """Type of the stored tokens; uint16 has room for 65,536 entries."""
    compression: Compression | None = None
    """How shards of tokens are compressed; readers unpack them into their cache."""
    latent_dtype: LatentDtype = "float16"
    """Type of the stored latents; of int8, each block has its own scales (`data.int8`)."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.block_size % self.patch_size:
            raise ValueError(f"block_size is not a multiple of patch_size {self.patch_size}")
        if self.token_dtype == "uint16" and self.vocab_size > UINT16_ENTRIES:
            raise ValueError(f"token_dtype uint16 has no room for {self.vocab_size} entries")
        if self.compression is not None and self.variant != "tokens":
            raise ValueError("compression: latents do not compress")
        if self.latent_dtype != "float16" and self.variant != "fp16":
            raise ValueError("latent_dtype: the variant tokens has no latents")
        given = [value is not None for value in (self.latent_size, self.autoencoder)]
        if given != [self.variant == "fp16"] * 2:
            raise ValueError("latent_size and autoencoder are needed by the variant fp16 only")
        return self

    @property
    def num_patches(self) -> int:
        """Patches per block."""
        return self.block_size // self.patch_size

    @property
    def columns(self) -> dict[str, str]:
        """MDS encoding of each column."""
        columns = {"tokens": f"ndarray:{self.token_dtype}:{self.block_size}"}
        if self.variant == "fp16":
            shape = f"{self.num_patches},{self.latent_size}"
            columns["mean"] = columns["log_std"] = f"ndarray:{self.latent_dtype}:{shape}"
            if self.latent_dtype == "int8":
                columns["scales"] = f"ndarray:float16:4,{self.latent_size}"
        return columns

    @property
    def column_sizes(self) -> dict[str, int]:
        """Bytes of each column of one sample."""
        sizes = {"tokens": np.dtype(self.token_dtype).itemsize * self.block_size}
        if self.latent_size is not None:
            width = np.dtype(self.latent_dtype).itemsize
            sizes["mean"] = sizes["log_std"] = width * self.num_patches * self.latent_size
            if self.latent_dtype == "int8":
                sizes["scales"] = 2 * 4 * self.latent_size
        return sizes

    @property
    def sample_bytes(self) -> int:
        """Size of one sample in a shard."""
        return sum(self.column_sizes.values())

    def to_dict(self) -> dict[str, Any]:
        """As plain values, in the form of ``meta.json``."""
        values = self.model_dump(mode="json")
        for name in LATER_FIELDS:
            # Keep the fingerprint that such stores had before there was this field.
            if getattr(self, name) == StorePlan.model_fields[name].default:
                del values[name]
        for name in ("begin_token", "end_token"):
            # Absent in earlier versions, whose fingerprint covers the fields that they wrote.
            if values["tokenizer"][name] is None:
                del values["tokenizer"][name]
        return values


LATER_FIELDS = ("parts", "order", "reading", "token_dtype", "compression", "latent_dtype")
"""Fields that the first version of stores did not have; absent where they have their default."""


class StoreMeta(StorePlan):
    """``meta.json`` of a finished store."""

    num_blocks: Positive
    num_tokens: Positive
    fingerprint: Sha256
    """sha256 over the other fields and ``index.json``; pins every byte of the store."""

    @model_validator(mode="after")
    def _counts_agree(self) -> Self:
        if self.num_tokens != self.num_blocks * self.block_size:
            raise ValueError("num_tokens is not num_blocks times block_size")
        return self


def fingerprint(fields: dict[str, Any], index: bytes) -> str:
    """The fingerprint of a store with these ``meta.json`` fields and this index."""
    others = {name: value for name, value in fields.items() if name != "fingerprint"}
    digest = hashlib.sha256(json.dumps(others, sort_keys=True).encode())
    digest.update(index)
    return digest.hexdigest()


def read_meta(path: str | Path, downloads: Downloads | None = None) -> StoreMeta:
    """Read ``meta.json`` of a store in a local directory or at a URL.

    Args:
        path: the store's path or URL.
        downloads: retries and time limits for a URL; None: the defaults of recipes.

    Raises:
        DataError: there is no store, it is unfinished, or its ``meta.json`` is damaged.
            `UnreachableError` if it may be readable later.
    """
    if is_remote(path):
        # Imported here, because importing Streaming takes seconds.
        from calm_dist.data.download import DEFAULT
        from calm_dist.data.remote import fetch_meta

        with fetch_meta(str(path), downloads or DEFAULT) as directory:
            return read_meta(directory)
    path = Path(path)
    try:
        if not path.is_dir():
            raise DataError(
                f"data store {path}: no such directory; set data.path (or --data) to a store, or "
                f"write this one: python tools/encode_latents.py --out {path} --corpus PATH "
                "--tokenizer F --autoencoder CKPT (for tokens without latents: --variant tokens "
                "--patch-size K)"
            )
        text = read_bounded(path / META, _LARGEST_META)
    except OSError as error:
        message = (
            f"data store {path}: has no readable {META} ({error.strerror}); it is unfinished, not "
            "a store, or not yours to read. Run tools/encode_latents.py (again), or mend its mode"
        )
        raise unreadable(f"data store {path}", error, message) from error
    try:
        return StoreMeta.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = listed([".".join(map(str, first["loc"])) or "JSON"])
        raise DataError(
            f"{path / META}: {where}: {first['msg'][:300]}; the file is damaged or of another "
            "version; encode the corpus again"
        ) from error


class DamagedShardError(DataError):
    """A shard's file is there, but is not what the index says."""


@dataclass(frozen=True)
class StoredFile:
    """A file of a store, as described by the index."""

    path: Path
    size: int
    sha256: str

    def check_size(self) -> None:
        """Raises DataError if the file is missing or has another size."""
        found = _stat(self.path).st_size
        if found != self.size:
            raise DamagedShardError(
                f"shard {self.path}: has {found} bytes instead of {self.size}; copy or encode it "
                "again"
            )

    def check_contents(self) -> None:
        """Raises DataError if the file is missing or any byte differs."""
        self.check_size()
        found = file_sha256(self.path)
        if found != self.sha256:
            raise DamagedShardError(
                f"shard {self.path}: is damaged (sha256 {found[:12]}… instead of "
                f"{self.sha256[:12]}…); copy or encode it again"
            )


@dataclass(frozen=True)
class Shard(StoredFile):
    """The samples of one file of a store; if that is compressed, of the file that it unpacks to."""

    samples: int
    sample_bytes: int
    packed: StoredFile | None

    @property
    def stored(self) -> StoredFile:
        """The file that the store has."""
        return self if self.packed is None else self.packed

    @property
    def most_bytes(self) -> int:
        """The most that the shard takes on disk while it is read."""
        return self.size + (0 if self.packed is None else self.packed.size)

    def unpack(self, packed: Path, place: Path) -> None:
        """Unpack a compressed shard.

        Args:
            packed: the compressed file.
            place: where the samples go; appears when it is complete.

        Raises:
            DataError: the file is damaged.
        """
        import zstandard

        assert self.packed is not None
        StoredFile(packed, self.packed.size, self.packed.sha256).check_contents()
        partial = place.with_name(f"{place.name}.{secrets.token_hex(4)}.tmp")
        try:
            with (
                packed.open("rb") as source,
                partial.open("wb") as target,
                zstandard.ZstdDecompressor().stream_reader(source) as reader,
            ):
                # No more than the index says, whatever the file would unpack to.
                left = self.size + 1
                while left and (data := reader.read(min(left, _CHUNK_BYTES))):
                    target.write(data)
                    left -= len(data)
            partial.replace(place)
        except zstandard.ZstdError as error:
            raise DamagedShardError(
                f"shard {packed}: cannot be unpacked ({error}); copy or encode it again"
            ) from error
        finally:
            partial.unlink(missing_ok=True)

    def changed(self) -> int:
        """Time of the file's last change of any kind, in nanoseconds.

        Raises:
            DataError: the file is missing.
        """
        return _stat(self.path).st_ctime_ns

    def check(self) -> None:
        """Raises DataError if the unpacked file is missing or any byte differs."""
        self.check_contents()
        self._check_places()

    def _check_places(self) -> None:
        """Raises DataError unless the samples follow one another up to the end of the file.

        Streaming would read from whatever offsets the file holds.
        """
        try:
            # numpy's own reading does not tell the system's error.
            with self.path.open("rb") as stream:
                head = stream.read(4 * (self.samples + 2))
            count, *places = np.frombuffer(head, np.dtype("<u4")).tolist()
        except (OSError, ValueError) as error:
            message = f"shard {self.path}: cannot be read ({error})"
            raise unreadable(f"shard {self.path}", error, message) from error
        first = self.size - self.samples * self.sample_bytes
        wanted = list(range(first, self.size + 1, self.sample_bytes))
        if count != self.samples or places != wanted:
            raise DamagedShardError(
                f"shard {self.path}: its samples are not at the expected offsets; encode it again"
            )


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        message = f"shard {path}: is missing ({error.strerror}); copy or encode it again"
        raise unreadable(f"shard {path}", error, message) from error


def read_shards(path: str | Path, meta: StoreMeta) -> list[Shard]:
    """The shards of a store, after checking that its index matches ``meta`` exactly.

    Raises:
        DataError: the index is missing, damaged, altered, or names anything but shards of the
            store's columns inside the store's directory.
    """
    path = Path(path)
    file = path / INDEX
    try:
        raw = read_bounded(file, _LARGEST_INDEX)
    except OSError as error:
        message = f"{file}: cannot be read ({error.strerror}); copy it again"
        raise unreadable(file, error, message) from error
    if fingerprint(meta.to_dict(), raw) != meta.fingerprint:
        raise DataError(
            f"{file}: does not belong to {path / META} (fingerprints differ); one of them was "
            "changed or is damaged; copy or encode the store again"
        )
    # The fingerprint proves consistency, not trustworthiness: the author of both files chose it.
    try:
        index = json.loads(raw)
        _check_keys("index", index, ("shards", "version"))
        if index["version"] != 2:
            raise ValueError(f"version {shown(index['version'])} instead of 2")
        shards = [_shard(path, meta, entry) for entry in index["shards"]]
        if len({shard.path for shard in shards}) != len(shards):
            raise ValueError("shard names repeat")
        if sum(shard.samples for shard in shards) != meta.num_blocks:
            raise ValueError(f"samples do not add up to {meta.num_blocks}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error)[:300]
        raise DataError(f"{file}: is not the index of a data store: {reason}") from error
    return shards


def has_index(path: Path) -> bool:
    """Whether a directory holds the description of a store, whose two files fit together."""
    try:
        meta = read_meta(path)
        raw = read_bounded(path / INDEX, _LARGEST_INDEX)
    except (DataError, OSError):
        return False
    return fingerprint(meta.to_dict(), raw) == meta.fingerprint


def _check_keys(what: str, found: Any, wanted: Iterable[str]) -> None:
    """Raises ValueError unless the keys are those wanted: Streaming passes every key as an argument
    to its readers."""
    if not isinstance(found, dict):
        raise ValueError(f"{what} is {shown(found)} instead of an object")
    if others := sorted(found.keys() ^ set(wanted)):
        raise ValueError(f"{what} has missing or unknown keys: {listed(others)}")


def _shard(path: Path, meta: StoreMeta, entry: dict[str, Any]) -> Shard:
    names = sorted(meta.columns)
    expected = {
        "version": 2,
        "format": "mds",
        "compression": meta.compression,
        "hashes": [HASH],
        "column_names": names,
        "column_encodings": [meta.columns[name] for name in names],
        "column_sizes": [meta.column_sizes[name] for name in names],
    }
    _check_keys("shard", entry, [*expected, "raw_data", "zip_data", "samples", "size_limit"])
    for key, value in expected.items():
        if entry[key] != value:
            raise ValueError(f"shard {key} {shown(entry[key])} instead of {shown(value)}")
    raw, samples, limit = entry["raw_data"], entry["samples"], entry["size_limit"]
    stored = _stored(path, "raw_data", raw, _SHARD_NAME)
    packed = None
    if meta.compression is None:
        if entry["zip_data"] is not None:
            raise ValueError(f"shard zip_data {shown(entry['zip_data'])} instead of None")
    else:
        packed = _stored(path, "zip_data", entry["zip_data"], _PACKED_NAME)
        if packed.path.name != f"{stored.path.name}.{meta.compression}":
            raise ValueError(f"shard name {shown(packed.path.name)}")
    size, name = stored.size, stored.path.name
    if limit is not None and not (type(limit) is int and limit > 0):
        raise ValueError(f"size_limit {shown(limit)} of {name}")
    if not (type(samples) is int and samples > 0):
        raise ValueError(f"{shown(samples)} samples")
    # Before the samples: their number, their offsets, the end of the last one, and a header.
    header = size - samples * meta.sample_bytes - 4 * (samples + 2)
    if not 0 <= header <= _LARGEST_HEADER:
        raise ValueError(f"{samples} samples of {meta.sample_bytes} bytes in {size} bytes")
    return Shard(stored.path, size, stored.sha256, samples, meta.sample_bytes, packed)


def _stored(path: Path, what: str, entry: Any, names: re.Pattern[str]) -> StoredFile:
    _check_keys(what, entry, ("basename", "bytes", "hashes"))
    _check_keys("hashes", entry["hashes"], (HASH,))
    name, size, sha256 = entry["basename"], entry["bytes"], entry["hashes"][HASH]
    if not (isinstance(name, str) and names.fullmatch(name)):
        raise ValueError(f"shard name {shown(name)}")
    if not (isinstance(sha256, str) and _SHA256.fullmatch(sha256)):
        raise ValueError(f"{HASH} {shown(sha256)} of {name}")
    if not (type(size) is int and 0 <= size < _LARGEST_SHARD):
        raise ValueError(f"{shown(size)} bytes of {name}")
    return StoredFile(path / name, size, sha256)
