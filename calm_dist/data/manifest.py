"""The manifest of a store while it is written: which part reads what of the corpus.

    .parts/manifest.json     what was given as the corpus, and where each part's lines begin in
    .parts/manifest.jsonl    one line per share of a unit, part after part, with the size and the
                             fingerprint of each file

It is made once, by the first worker, and appears together with the plan. So a worker that joins
neither searches the corpus nor reads more of the manifest than the lines of its own parts. Before
it reads a part, it compares the files with their fingerprints: a file that was replaced meanwhile
would give a store of two corpora under the fingerprint of the first.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calm_dist.data.store import StorePlan
from calm_dist.errors import DataError
from calm_dist.log import NOTE
from calm_dist.text.corpus_files import STANDARD_INPUT, CorpusFiles
from calm_dist.text.formats import CorpusFile, cannot_be_read, format_of_file
from calm_dist.text.remote_files import is_url
from calm_dist.text.units import (
    Share,
    Span,
    file_fingerprint,
    in_threads,
    sampled_sha256,
    shuffled_shares,
    units_of,
)

_log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_SHARES = "manifest.jsonl"


@dataclass(frozen=True)
class BegunCorpus:
    """The corpus of a store that has been begun, which need not be searched again.

    Attributes:
        sha256: its fingerprint, as in the plan.
        order: as in the plan.
    """

    sha256: str
    order: Any


def write_manifest(
    directory: Path, files: CorpusFiles, plan: StorePlan, *, skip: bool = False
) -> None:
    """Write the manifest of a store into its directory of parts; ``manifest.json`` comes last.

    ``skip`` is that of `units_of`.

    Raises:
        DataError: as `units_of`; the corpus is no longer that of the plan.
    """
    units = units_of(files, plan.reading, skip=skip)
    fingerprints = {file.name: found for file, found in in_threads(file_fingerprint, files)}
    # Without an order, the plan's fingerprint is that of all contents.
    if plan.order is not None and sampled_sha256(fingerprints) != plan.corpus_sha256:
        raise DataError(
            f"corpus {files[0].shown}{' ...' * (len(files) > 1)}: was changed while it "
            "was used; start again"
        )
    shares = shuffled_shares(units, plan.seed, plan.parts)
    offsets, divided = [0], Counter[str]()
    # Several workers may do this at once.
    scratch = directory / f"{MANIFEST}.{secrets.token_hex(4)}.tmp"
    with scratch.open("wb") as stream:
        for of_part in shares:
            for share in of_part:
                stream.write(json.dumps(_to_list(share, fingerprints)).encode() + b"\n")
                file = share.spans[0].file
                if not share.is_whole and format_of_file(file).compression:
                    divided[file.name] += 1
            offsets.append(stream.tell())
    scratch.replace(directory / _SHARES)
    described = {"given": _from_anywhere(files.given), "offsets": offsets}
    scratch.write_text(json.dumps(described), encoding="utf-8")
    scratch.replace(directory / MANIFEST)
    if divided:
        ((name, number),) = divided.most_common(1)
        others = f", and {len(divided) - 1} other files likewise" if len(divided) > 1 else ""
        _log.log(
            NOTE,
            f"corpus: {name} is compressed and can only be read from its start: {number} parts "
            f"read all of it{others}; smaller files share the work better",
        )


def begun_corpus(directory: Path, given: Sequence[str]) -> BegunCorpus | None:
    """The corpus of the store with this directory of parts, if it was begun from these paths.

    None if there is none, if it was made from other paths, or from standard input.
    """
    if STANDARD_INPUT in given:
        return None
    try:
        described = _read(directory / MANIFEST)
        plan = json.loads((directory / "plan.json").read_text(encoding="utf-8"))
        if described["given"] != _from_anywhere(given):
            return None
        begun = BegunCorpus(plan["corpus_sha256"], plan.get("order"))
    except (OSError, ValueError, KeyError, TypeError, DataError):
        # Whoever continues it reports what is wrong.
        return None
    _log.log(
        NOTE,
        f"corpus: its files as they were found when {directory.parent} was begun; files that were "
        "added later are not read",
    )
    return begun


def read_shares(directory: Path, part: int, paths: Mapping[str, str] | None = None) -> list[Share]:
    """The shares of a part.

    Args:
        directory: the store's directory of parts.
        part: its number.
        paths: where the files are now, by name; None: where they were.

    Raises:
        FileNotFoundError: there is no manifest.
        DataError: it is damaged, or a file of the part was changed after it was made.
    """
    described = _read(directory / MANIFEST)
    try:
        start, end = described["offsets"][part : part + 2]
        with (directory / _SHARES).open("rb") as stream:
            stream.seek(start)
            lines = stream.read(end - start).splitlines()
        fingerprints: dict[CorpusFile, str] = {}
        shares = [_from_list(json.loads(line), paths, fingerprints) for line in lines]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise _damaged(directory / _SHARES, error) from error
    _refuse_changed(directory.parent, fingerprints)
    return shares


def _refuse_changed(out: Path, fingerprints: Mapping[CorpusFile, str]) -> None:
    def change(file: CorpusFile) -> str | None:
        if not is_url(file.path):
            try:
                size = os.stat(file.path).st_size
            except OSError as error:
                raise cannot_be_read(file, error) from error
            if size != file.size:
                return f"it had {file.size} bytes, now {size}"
        return None if file_fingerprint(file) == fingerprints[file] else "it has other contents"

    for file, how in in_threads(change, list(fingerprints)):
        if how is not None:
            raise DataError(
                f"corpus {file.shown}: was changed after the store in {out} was begun with it "
                f"({how}); write the store again with --overwrite, or bring the old file back"
            )


def _read(file: Path) -> dict[str, Any]:
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(described["given"], list) or not isinstance(described["offsets"], list):
            raise ValueError("fields of other types")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(file, error) from error
    return dict(described)


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(
        f"{file}: is damaged ({str(error)[:200]}); the store in {file.parent.parent} is not "
        "finished: write it again with --overwrite"
    )


def moved_paths(directory: Path, files: CorpusFiles) -> dict[str, str] | None:
    """Where the files of a begun store are now, by name, if they were found at other paths."""
    if files.scratch is None and _read(directory / MANIFEST)["given"] == _from_anywhere(
        files.given
    ):
        return None
    return {file.name: file.path for file in files}


def can_continue_without(files: Iterable[CorpusFile], plan: StorePlan) -> bool:
    """Whether a store that an earlier version began, without a manifest, can be continued: that
    version shuffled all documents of a corpus together."""
    return plan.order is None and not any(format_of_file(file).compression for file in files)


def _from_anywhere(paths: Iterable[str]) -> list[str]:
    """Paths that mean the same in any working directory."""
    return [path if is_url(path) else os.path.abspath(path) for path in paths]


def _to_list(share: Share, fingerprints: Mapping[str, str]) -> list[Any]:
    spans = [
        [
            *(span.file.name, *_from_anywhere([span.file.path]), span.file.size),
            *(span.start, span.end, fingerprints[span.file.name]),
        ]
        for span in share.spans
    ]
    return [share.unit, share.first, share.last, share.of, spans]


def _from_list(
    values: list[Any], paths: Mapping[str, str] | None, fingerprints: dict[CorpusFile, str]
) -> Share:
    """A share; adds the fingerprints of its files."""
    unit, first, last, of, spans = values
    found = []
    for name, path, size, start, end, *more in spans:
        file = CorpusFile(path if paths is None else paths.get(name, path), name, size)
        # Earlier versions wrote none.
        if more:
            fingerprints[file] = more[0]
        found.append(Span(file, start, end))
    return Share(unit, tuple(found), first, last, of)
