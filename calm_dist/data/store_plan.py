"""Describe a data store before it is written: its plan, from corpus, tokenizer and autoencoder.

Needs no torch. Runs with equal plans write the same store (`latents.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from calm_dist.costs.memory import UINT16_ENTRIES
from calm_dist.data.existing import token_dtype_of
from calm_dist.data.manifest import BegunCorpus
from calm_dist.data.store import (
    AutoencoderInfo,
    Compression,
    LatentDtype,
    StorePlan,
    TokenDtype,
    TokenizerInfo,
    Variant,
    read_meta,
)
from calm_dist.errors import DataError
from calm_dist.files import file_sha256
from calm_dist.text.corpus import corpus_sha256, describe_corpus, find_files
from calm_dist.text.corpus_files import CorpusPaths
from calm_dist.text.formats import TEXT_AND_ID, Reading
from calm_dist.text.tokenizer import Tokenizer


def plan_store(
    corpus: CorpusPaths | BegunCorpus,
    tokenizer: Tokenizer,
    *,
    variant: Variant,
    block_size: int,
    patch_size: int | None = None,
    autoencoder: str | Path | None = None,
    seed: int = 0,
    parts: int = 1,
    reading: Reading = TEXT_AND_ID,
    token_dtype: TokenDtype | Literal["auto"] = "uint32",
    compression: Compression | None = None,
    latent_dtype: LatentDtype = "float16",
    out: str | Path | None = None,
    skip_faults: bool = False,
) -> StorePlan:
    """Describe the store that these inputs make, without torch and without encoding anything.

    Args:
        corpus: files, directories and globs, or the result of `find_files` or `begun_corpus` for
            them.
        tokenizer: from `load_tokenizer`.
        variant: ``fp16`` (tokens and latents) or ``tokens``.
        block_size: tokens per block.
        patch_size: tokens per patch, K; for ``fp16`` None or the autoencoder's.
        autoencoder: directory with ``config.json`` and a weights file; only for ``fp16``.
        seed: seed of the order of documents and of the numbers of begin tokens.
        parts: number of parts, of about the same size, that the corpus is cut into; each is packed
            into blocks of its own.
        reading: what of the corpus becomes documents.
        token_dtype: type of the stored tokens; auto: that of the store in ``out``, if there is one,
            or the smallest type that fits the vocabulary.
        compression: of the shards; only for ``tokens``.
        latent_dtype: type of the stored latents.
        out: where the store may be finished already. An earlier version, which hashed all contents
            of a corpus, may have written it.
        skip_faults: as for `write_store`; otherwise a damaged table is an error here.

    Raises:
        DataError: an input is missing, or the inputs do not fit each other.
    """
    _check_variant(variant, autoencoder, compression, latent_dtype)
    latent_size, info, vocab_size = None, None, tokenizer.vocab_size
    if autoencoder is not None:
        sizes, info = _fitting_autoencoder(Path(autoencoder), tokenizer, patch_size)
        patch_size, latent_size = sizes["patch_size"], sizes["latent_size"]
        vocab_size = sizes["vocab_size"]
    if patch_size is None:
        raise DataError("variant tokens: give --patch-size, the model's tokens per patch")
    if block_size <= 0 or patch_size <= 0 or block_size % patch_size:
        raise DataError(
            f"block size {block_size}: must be a positive multiple of the patch size {patch_size}"
        )
    if token_dtype == "auto":
        found = None if out is None else token_dtype_of(out)
        token_dtype = found or ("uint16" if vocab_size <= UINT16_ENTRIES else "uint32")
    sha256, order = _describe(corpus, reading, out, skip_faults=skip_faults)
    return StorePlan(
        variant=variant,
        block_size=block_size,
        patch_size=patch_size,
        latent_size=latent_size,
        vocab_size=vocab_size,
        tokenizer=TokenizerInfo.of(tokenizer),
        autoencoder=info,
        corpus_sha256=sha256,
        seed=seed,
        parts=parts,
        order=order,
        reading=reading,
        token_dtype=token_dtype,
        compression=compression,
        latent_dtype=latent_dtype,
    )


def _check_variant(
    variant: Variant,
    autoencoder: str | Path | None,
    compression: Compression | None,
    latent_dtype: LatentDtype,
) -> None:
    """Refuse options that the variant does not have."""
    if compression is not None and variant != "tokens":
        raise DataError(
            f"--compression {compression}: saves little on latents, and takes time; leave it out"
        )
    if latent_dtype != "float16" and variant != "fp16":
        raise DataError(f"--latent-dtype {latent_dtype}: --variant tokens has no latents")
    if variant == "fp16" and autoencoder is None:
        raise DataError(
            "variant fp16: needs an autoencoder; give --autoencoder CKPT, or use --variant tokens"
        )
    if variant == "tokens" and autoencoder is not None:
        raise DataError("variant tokens: uses no autoencoder; leave --autoencoder out")


def _fitting_autoencoder(
    autoencoder: Path, tokenizer: Tokenizer, patch_size: int | None
) -> tuple[dict[str, int], AutoencoderInfo]:
    """Sizes and identity of an autoencoder; refuses another patch size and other tokenizers."""
    sizes, info = describe_autoencoder(autoencoder)
    if patch_size not in (None, sizes["patch_size"]):
        raise DataError(
            f"patch size {patch_size}: the autoencoder {autoencoder} has {sizes['patch_size']}; "
            "leave --patch-size out"
        )
    # The autoencoder may have more entries than the tokenizer: the released ones have a padding
    # token that is not in Llama 3's file.
    if tokenizer.vocab_size > sizes["vocab_size"]:
        raise DataError(
            f"tokenizer {tokenizer.path}: has {tokenizer.vocab_size} entries, more than the "
            f"{sizes['vocab_size']} of the autoencoder {autoencoder}; use its own tokenizer"
        )
    check_autoencoder_tokenizer(autoencoder, tokenizer.fingerprint, f"tokenizer {tokenizer.path}")
    return sizes, info


def _describe(
    corpus: CorpusPaths | BegunCorpus,
    reading: Reading,
    out: str | Path | None,
    *,
    skip_faults: bool,
) -> tuple[str, Literal[2] | None]:
    """``corpus_sha256`` and ``order`` of a plan."""
    if isinstance(corpus, BegunCorpus):
        return corpus.sha256, corpus.order
    files = find_files(corpus, reading)
    sha256, is_one_unit = describe_corpus(files, reading, skip=skip_faults)
    if is_one_unit:
        return sha256, None
    if out is not None and _finished_by_earlier_version(out):
        return corpus_sha256(files), None
    return sha256, 2


def _finished_by_earlier_version(out: str | Path) -> bool:
    try:
        return read_meta(out).order is None
    except DataError:
        return False


def describe_autoencoder(directory: Path) -> tuple[dict[str, int], AutoencoderInfo]:
    """Sizes and identity of an autoencoder, read from its files without torch."""
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


def check_autoencoder_tokenizer(autoencoder: Path, tokenizer_sha256: str, source: str) -> None:
    """Refuse a tokenizer that the autoencoder was not trained with.

    Tokenizers of the same size still number tokens differently. Autoencoders in the released
    layout do not record their tokenizer and are accepted.

    Raises:
        DataError: the tokenizer is another one; the message names ``source``, its origin.
    """
    try:
        state = json.loads((autoencoder / "state.json").read_text(encoding="utf-8"))
        trained_with = state.get("tokenizer_sha256")
    except (OSError, ValueError, AttributeError, RecursionError):
        return
    if trained_with not in (None, tokenizer_sha256):
        raise DataError(
            f"{source}: the tokenizer has sha256 {tokenizer_sha256[:12]}…, the "
            f"autoencoder {autoencoder} was trained with {str(trained_with)[:12]}…; use its own "
            "tokenizer, or train an autoencoder with this one"
        )
