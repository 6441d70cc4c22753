"""From raw text to split documents and a tokenizer; used by ``tools/prepare_corpus.py``."""

from __future__ import annotations

import filecmp
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from calm_dist.errors import DataError
from calm_dist.files import file_sha256, replace_text
from calm_dist.log import NOTE
from calm_dist.progress import progress
from calm_dist.text.corpus import (
    SPLITS,
    CorpusFiles,
    corpus_sha256,
    find_files,
    iter_documents,
)
from calm_dist.text.corpus_files import CorpusPaths
from calm_dist.text.formats import TEXT_AND_ID, Reading
from calm_dist.text.reports import REPORT, missing_id_key, summary
from calm_dist.text.splitting import split_corpus
from calm_dist.text.tokenizer import check_vocab_size, load_tokenizer, train_tokenizer
from calm_dist.text.tokenizing import cores

_log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
# There from before the first file is written until the manifest is, so that files without a
# manifest are known to be our own. Hidden: it is not part of a corpus.
_UNFINISHED = ".unfinished"


def prepare_corpus(
    out: str | Path,
    paths: CorpusPaths = (),
    *,
    tokenizer: str | Path | None = None,
    begin_token: str | None = None,
    end_token: str | None = None,
    vocab_size: int = 512,
    seed: int = 0,
    reading: Reading = TEXT_AND_ID,
    skip_faults: bool = False,
    processes: int | None = None,
) -> bool:
    """Write ``out/corpus/{train,valid,test}.jsonl``, their manifest, and ``out/tokenizer.json``.

    Args:
        out: directory to write into.
        paths: corpus files, directories and globs, none of which may contain ``out`` or be inside
            it; empty: Python's standard library on disk.
        tokenizer: a tokenizer file to copy; None: a BPE is trained on the train split.
        begin_token, end_token: its tokens around a document, as for `load_tokenizer`; the manifest
            records them, and `encode_latents` must be given the same.
        vocab_size: entries of a trained BPE.
        seed: decides the split of each document.
        reading: what of the corpus becomes documents.
        skip_faults: leave out damaged files and anything that is not a document, and count them in
            ``corpus/report.json``; otherwise the first such fault is an error.
        processes: how many read and write, of a corpus of more than one unit; the files do not
            depend on it; None: one for each core.

    Returns:
        True if files were written; False if all existed already and are intact.

    Raises:
        DataError: the input is faulty, or ``out`` holds files made from another input or by
            something else.
    """
    out = Path(out)
    given = {"begin_token": begin_token, "end_token": end_token}
    names = {role: name for role, name in given.items() if name is not None}
    if names and tokenizer is None:
        raise DataError(
            "--begin-token, --end-token: need a tokenizer given with --tokenizer; a trained one "
            "has its own tokens"
        )
    if tokenizer is None:
        check_vocab_size(vocab_size)
    manifest_path = out / "corpus" / MANIFEST
    files = find_files(paths, reading) if paths else None
    if files is not None:
        files.report()
        files.refuse_output(out, _written())
    made_from = {**_describe_input(files, tokenizer, names, vocab_size, seed), **names}
    if reading != TEXT_AND_ID:
        made_from["reading"] = reading.model_dump(mode="json")
    present = _read_manifest(manifest_path)
    if present is not None:
        _refuse_other_input(manifest_path, present["made_from"], made_from)
        if _intact(out, present):
            return False
        _log.warning("%s: files are missing or changed; writing them again", out / "corpus")

    source = None if tokenizer is None else load_tokenizer(tokenizer, **names).path
    if present is None:
        _refuse_foreign_files(out, source)
    splits, report = split_corpus(
        out / "corpus",
        files,
        seed,
        reading,
        skip=skip_faults,
        processes=cores() if processes is None else processes,
        before_writing=partial(_mark_unfinished, out),
    )
    for note in (summary(report), missing_id_key(report, reading)):
        if note is not None:
            _log.log(NOTE, note)
    replace_text(out / "corpus" / REPORT, json.dumps(report, indent=2) + "\n")
    tokenizer_file = _make_tokenizer(out, source, vocab_size, splits["train"]["documents"])
    manifest = {
        "made_from": made_from,
        "splits": splits,
        "tokenizer": {"file": tokenizer_file.name, "sha256": file_sha256(tokenizer_file)},
        "report": {"sha256": file_sha256(out / "corpus" / REPORT)},
    }
    # The manifest comes last: if it exists, everything else is complete.
    replace_text(manifest_path, json.dumps(manifest, indent=2) + "\n")
    (out / "corpus" / _UNFINISHED).unlink(missing_ok=True)
    return True


def _mark_unfinished(out: Path) -> None:
    (out / "corpus").mkdir(parents=True, exist_ok=True)
    (out / "corpus" / _UNFINISHED).touch()


def _written() -> list[str]:
    """Names of the files written into ``out``."""
    return [
        *(f"corpus/{split}.jsonl" for split in SPLITS),
        f"corpus/{REPORT}",
        f"corpus/{MANIFEST}",
        *_TOKENIZER_FILES,
    ]


def _describe_input(
    files: CorpusFiles | None,
    tokenizer: str | Path | None,
    token_names: dict[str, str],
    vocab_size: int,
    seed: int,
) -> dict[str, Any]:
    if files is not None:
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
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        _check_manifest(manifest)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); fix or remove it") from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: is damaged ({error}); remove {path.parent} and the tokenizer beside it, or "
            "give another --out"
        ) from error
    return manifest


def _check_manifest(manifest: Any) -> None:
    """Raises ValueError unless a manifest has the form that `prepare_corpus` writes."""
    if not isinstance(manifest, dict):
        raise ValueError(f"a {type(manifest).__name__} instead of an object")
    for name in ("made_from", "splits", "tokenizer"):
        if not isinstance(manifest.get(name), dict):
            raise ValueError(f"no object {name}")
    for split in SPLITS:
        entry = manifest["splits"].get(split)
        if not (isinstance(entry, dict) and isinstance(entry.get("sha256"), str)):
            raise ValueError(f"no sha256 of the split {split}")
        for count in ("documents", "characters"):
            if type(entry.get(count)) is not int or entry[count] < 0:
                raise ValueError(f"no number of {count} of the split {split}")
    if manifest["tokenizer"].get("file") not in _TOKENIZER_FILES:
        raise ValueError("no name of a tokenizer")
    if not isinstance(manifest["tokenizer"].get("sha256"), str):
        raise ValueError("no sha256 of the tokenizer")
    if "report" in manifest:
        report = manifest["report"]
        if not (isinstance(report, dict) and isinstance(report.get("sha256"), str)):
            raise ValueError("no sha256 of the report")


def _refuse_other_input(path: Path, present: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key in {**present, **wanted}:
        if present.get(key) != wanted.get(key):
            raise DataError(
                f"{path.parent}: was made from another input ({key}: {present.get(key)} there, "
                f"{wanted.get(key)} now); give another --out, or remove that directory and the "
                "tokenizer beside it"
            )


def _refuse_foreign_files(out: Path, tokenizer: Path | None) -> None:
    """Refuse to replace files in ``out``, which has no manifest, unless an earlier run that was
    killed wrote them. A copy of the given ``tokenizer`` may be there."""
    if (out / "corpus" / _UNFINISHED).exists():
        return
    replaced = [out / "corpus" / f"{split}.jsonl" for split in SPLITS]
    replaced.append(out / "corpus" / REPORT)
    target = _tokenizer_target(out, tokenizer)
    if tokenizer is None or (target.is_file() and not filecmp.cmp(tokenizer, target, False)):
        replaced.append(target)
    found = [str(path.relative_to(out)) for path in replaced if os.path.lexists(path)]
    if found:
        raise DataError(
            f"--out {out}: holds {', '.join(found)}, but no corpus/{MANIFEST}, so another program "
            "may have written them; give another --out, or move or remove them"
        )


def _tokenizer_target(out: Path, source: Path | None) -> Path:
    """Where the tokenizer goes: the suffix of a given file tells its kind and is therefore kept."""
    return out / f"tokenizer{'.json' if source is None or source.suffix == '.json' else '.model'}"


def _intact(out: Path, manifest: dict[str, Any]) -> bool:
    files = {out / "corpus" / f"{split}.jsonl": manifest["splits"][split] for split in SPLITS}
    files[out / manifest["tokenizer"]["file"]] = manifest["tokenizer"]
    # Earlier versions did not record their report, and the first ones wrote none.
    if "report" in manifest:
        files[out / "corpus" / REPORT] = manifest["report"]
    return all(
        path.is_file() and file_sha256(path) == entry["sha256"] for path, entry in files.items()
    )


def _make_tokenizer(out: Path, source: Path | None, vocab_size: int, train_documents: int) -> Path:
    if source is None:
        return _train(out, vocab_size, train_documents)
    target = _tokenizer_target(out, source)
    if not (target.exists() and target.samefile(source)):
        shutil.copyfile(source, target)
    return target


def _train(out: Path, vocab_size: int, num_documents: int) -> Path:
    """Train a BPE on the train split. Merging, after the last document, shows progress only on a
    terminal."""
    _log.log(NOTE, f"training a tokenizer of {vocab_size} entries on {num_documents} documents")
    texts: Iterator[str] = (
        document.text for document in iter_documents([out / "corpus" / "train.jsonl"])
    )
    bars = sys.stderr.isatty()
    if not bars:
        texts = progress(texts, num_documents, label="read for the tokenizer", unit="documents")
    return train_tokenizer(texts, vocab_size, out / "tokenizer.json", show_progress=bars).path
