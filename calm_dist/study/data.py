"""Tokenizer and stores of tokens that the runs of a study share."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from calm_dist.errors import DataError
from calm_dist.text.corpus import iter_documents
from calm_dist.text.tokenizer import train_tokenizer

SPLITS = ("train", "valid", "test")
TOOLS = Path(__file__).parents[2] / "tools"
# Enough for a vocabulary of some thousand words, in seconds.
_TOKENIZER_CHARACTERS = 20_000_000


def find_splits(corpus: Path) -> dict[str, Path]:
    """The file of each split in a directory: train, valid and test with any suffix.

    Raises:
        DataError: one is missing, or there are several.
    """
    found = {}
    for split in SPLITS:
        files = sorted(corpus.glob(f"{split}.*"))
        if len(files) != 1:
            raise DataError(
                f"--corpus {corpus}: {len(files)} files {split}.*; give a directory with one file "
                f"for each of {', '.join(SPLITS)}"
            )
        found[split] = files[0]
    return found


def make_tokenizer(
    out: Path, splits: dict[str, Path], vocabulary: int | None, given: Path | None
) -> Path:
    """Copy the given tokenizer, or train a BPE on the training split.

    Raises:
        DataError: neither a tokenizer nor a vocabulary size is given, or both are.
    """
    if (vocabulary is None) == (given is None):
        raise DataError(
            f"--tokenizer {given}: the plan's vocabulary is {vocabulary}; give exactly one of them"
        )
    if given is not None:
        target = out / f"tokenizer{given.suffix}"
        if not target.is_file():
            shutil.copyfile(given, target)
        elif target.read_bytes() != given.read_bytes():
            raise DataError(f"--tokenizer {given}: differs from {target}; use another --out")
        return target
    target = out / "tokenizer.json"
    if not target.is_file():
        assert vocabulary is not None
        train_tokenizer(_beginning(splits["train"]), vocabulary, target)
    return target


def _beginning(file: Path) -> Iterator[str]:
    """The first documents of a file, enough to train a tokenizer."""
    characters = 0
    for document in iter_documents([str(file)]):
        yield document.text
        characters += len(document.text)
        if characters > _TOKENIZER_CHARACTERS:
            return


def encode(
    out: Path, splits: dict[str, Path], tokenizer: Path, patch_size: int, block_size: int
) -> None:
    """Encode stores of tokens in patches of K tokens with tools/encode_latents.py; does nothing if
    they exist.

    Raises:
        DataError: a split cannot be encoded.
    """
    for split, file in splits.items():
        target = store(out, patch_size, split)
        command = [
            sys.executable, str(TOOLS / "encode_latents.py"), "--variant", "tokens",
            "--patch-size", str(patch_size), "--block-size", str(block_size),
            "--tokenizer", str(tokenizer), "--corpus", str(file), "--out", str(target),
        ]  # fmt: skip
        if subprocess.run(command, check=False).returncode != 0:
            raise DataError(f"{target}: was not encoded; see the output above")


def store(out: Path, patch_size: int, split: str) -> Path:
    """The store of a split's tokens."""
    return out / "data" / f"patches_of_{patch_size}" / split
