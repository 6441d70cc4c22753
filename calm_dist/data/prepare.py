"""From raw text to split documents and a tokenizer: what ``tools/prepare_corpus.py`` does."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from calm_dist.data.corpus import (
    SPLITS,
    Document,
    corpus_sha256,
    find_files,
    iter_documents,
    split_documents,
    standard_library_documents,
)
from calm_dist.data.progress import progress
from calm_dist.data.tokenizer import load_tokenizer, train_tokenizer
from calm_dist.errors import DataError
from calm_dist.files import file_sha256, replace_text

MANIFEST = "manifest.json"

logger = logging.getLogger(__name__)


def prepare_corpus(
    out: str | Path,
    paths: Sequence[str | Path] = (),
    *,
    tokenizer: str | Path | None = None,
    begin_token: str | None = None,
    end_token: str | None = None,
    vocab_size: int = 512,
    seed: int = 0,
) -> bool:
    """Write ``out/corpus/{train,valid,test}.jsonl``, their manifest, and ``out/tokenizer.json``.

    Args:
        out: directory to write into.
        paths: corpus files, directories and globs; none: Python's standard library on disk.
        tokenizer: a tokenizer file to copy; None: a BPE is trained on the train split.
        begin_token, end_token: its tokens around a document, as for `load_tokenizer`; the manifest
            keeps them, and `encode_latents` is given them again.
        vocab_size: entries of a trained BPE.
        seed: decides which document goes to which split.

    Returns:
        False where everything was there already and is intact, else True.

    Raises:
        DataError: a fault of the input, or ``out`` holds what was made from another input.
    """
    out = Path(out)
    given = {"begin_token": begin_token, "end_token": end_token}
    names = {role: name for role, name in given.items() if name is not None}
    if names and tokenizer is None:
        raise DataError(
            "--begin-token, --end-token: name tokens of a tokenizer that is given with "
            "--tokenizer; a trained one has its own"
        )
    manifest_path = out / "corpus" / MANIFEST
    made_from = {**_describe_input(paths, tokenizer, names, vocab_size, seed), **names}
    present = _read_manifest(manifest_path)
    if present is not None:
        _refuse_other_input(manifest_path, present.get("made_from", {}), made_from)
        if _intact(out, present):
            return False
        logger.warning("%s: files are missing or changed; writing them again", out / "corpus")

    documents = _document_source(paths)
    manifest_path.parent.mkdir(parents=True, exist_ok=True)
    splits = _write_splits(out / "corpus", documents, seed)
    source = None if tokenizer is None else load_tokenizer(tokenizer, **names).path
    tokenizer_file = _make_tokenizer(out, source, vocab_size, splits["train"]["documents"])
    manifest = {
        "made_from": made_from,
        "splits": splits,
        "tokenizer": {"file": tokenizer_file.name, "sha256": file_sha256(tokenizer_file)},
    }
    # The manifest comes last: with it, all else is complete.
    replace_text(manifest_path, json.dumps(manifest, indent=2) + "\n")
    return True


def _describe_input(
    paths: Sequence[str | Path],
    tokenizer: str | Path | None,
    token_names: dict[str, str],
    vocab_size: int,
    seed: int,
) -> dict[str, Any]:
    if paths:
        files = find_files(paths)
        corpus: dict[str, Any] = {
            "corpus": [file.name for file in files],
            "corpus_sha256": corpus_sha256(files),
        }
    else:
        corpus = {"corpus": f"standard library of Python {sys.version.split()[0]}"}
    if tokenizer is None:
        return {**corpus, "seed": seed, "tokenizer": f"BPE with {vocab_size} entries"}
    given = load_tokenizer(tokenizer, **token_names)
    return {**corpus, "seed": seed, "tokenizer": f"{given.path.name} {given.fingerprint}"}


def _read_manifest(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: is damaged ({error}); remove {path.parent}") from error
    if not isinstance(manifest, dict):
        raise DataError(f"{path}: is damaged (not an object); remove {path.parent}")
    return manifest


def _refuse_other_input(path: Path, present: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key in {**present, **wanted}:
        if present.get(key) != wanted.get(key):
            raise DataError(
                f"{path.parent}: was made from another input ({key}: {present.get(key)} there, "
                f"{wanted.get(key)} now); give another --out or remove that directory"
            )


def _intact(out: Path, manifest: dict[str, Any]) -> bool:
    files = {out / "corpus" / f"{split}.jsonl": manifest["splits"][split] for split in SPLITS}
    files[out / manifest["tokenizer"]["file"]] = manifest["tokenizer"]
    return all(
        path.is_file() and file_sha256(path) == entry["sha256"] for path, entry in files.items()
    )


def _document_source(paths: Sequence[str | Path]) -> Callable[[], Iterable[Document]]:
    """A function that starts a pass over the documents; files are read anew by each pass."""
    if paths:
        return lambda: iter_documents(paths)
    documents = standard_library_documents()
    return lambda: documents


def _write_splits(
    folder: Path, documents: Callable[[], Iterable[Document]], seed: int
) -> dict[str, dict[str, Any]]:
    read = progress(documents(), None, label="read the corpus", unit="documents")
    ids = [document.id for document in read]
    positions = split_documents(ids, seed)
    split_at = {position: split for split, held in positions.items() for position in held}
    counts = {split: {"documents": 0, "characters": 0} for split in SPLITS}
    streams = {
        split: (folder / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n")
        for split in SPLITS
    }
    try:
        read = progress(documents(), len(ids), label="split", unit="documents")
        for position, document in enumerate(read):
            split = split_at[position]
            record = {"id": document.id, "text": document.text}
            streams[split].write(json.dumps(record, ensure_ascii=False) + "\n")
            counts[split]["documents"] += 1
            counts[split]["characters"] += len(document.text)
    finally:
        for stream in streams.values():
            stream.close()
    return {
        split: {**counts[split], "sha256": file_sha256(folder / f"{split}.jsonl")}
        for split in SPLITS
    }


def _make_tokenizer(out: Path, source: Path | None, vocab_size: int, train_documents: int) -> Path:
    if source is None:
        return _train(out, vocab_size, train_documents)
    # The kind of a tokenizer file is told by its suffix, which is therefore kept.
    target = out / f"tokenizer{'.json' if source.suffix == '.json' else '.model'}"
    if not (target.exists() and target.samefile(source)):
        shutil.copyfile(source, target)
    return target


def _train(out: Path, vocab_size: int, num_documents: int) -> Path:
    """A BPE of the train split. Merging comes after the last document, and has bars on terminals
    only."""
    print(
        f"training a tokenizer of {vocab_size} entries on {num_documents} documents",
        file=sys.stderr,
        flush=True,
    )
    texts: Iterator[str] = (
        document.text for document in iter_documents([out / "corpus" / "train.jsonl"])
    )
    bars = sys.stderr.isatty()
    if not bars:
        texts = progress(texts, num_documents, label="read for the tokenizer", unit="documents")
    return train_tokenizer(texts, vocab_size, out / "tokenizer.json", show_progress=bars).path
