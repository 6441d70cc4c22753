"""Find the files of a corpus: expands directories and globs; each file once, with a unique name."""

from __future__ import annotations

import glob
import logging
import os
import shutil
import stat
import sys
import tempfile
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import overload

from calm_dist.errors import DataError, unreadable
from calm_dist.log import NOTE
from calm_dist.text.compressed import CODECS
from calm_dist.text.formats import (
    STANDARD_INPUT_DIRECTORY,
    STANDARD_INPUT_FILE,
    SUPPORTED,
    TEXT_AND_ID,
    CorpusFile,
    Reading,
    format_of,
    holds_documents,
    unknown_format,
)
from calm_dist.text.remote_files import find_urls, is_url

_log = logging.getLogger(__name__)

_NOT_FILES = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)

# Most kinds that a summary names; the others are only counted.
_NAMED_KINDS = 40


@dataclass(frozen=True)
class CorpusFiles(Sequence[CorpusFile]):
    """The files of a corpus in a fixed order, and counts of the files left out.

    Attributes:
        files: the files, each with a unique name.
        left_out: number of files in the directories that are not read, by kind.
        directories: real paths of the searched directories, without those below them.
        globs: the patterns given.
        scratch: holds the copy of standard input, and removes it.
        given: the paths, globs and URLs that were searched.
    """

    files: tuple[CorpusFile, ...]
    left_out: Counter[str]
    directories: frozenset[str]
    globs: tuple[str, ...]
    scratch: tempfile.TemporaryDirectory[str] | None = None
    given: tuple[str, ...] = ()

    @overload
    def __getitem__(self, index: int) -> CorpusFile: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[CorpusFile]: ...
    def __getitem__(self, index: int | slice) -> CorpusFile | Sequence[CorpusFile]:
        return self.files[index]

    def __len__(self) -> int:
        return len(self.files)

    def summary(self) -> str:
        """One line: the number of files read and left out, by kind."""
        read = Counter(_kind(file.base_name) for file in self.files)
        text = f"corpus: {_counts(read)}"
        return f"{text}; left out: {_counts(self.left_out)}" if self.left_out else text

    def report(self) -> None:
        """Log the summary, unless the corpus is a single file given by its path."""
        if len(self.files) > 1 or self.left_out or self.directories or self.globs:
            _log.log(NOTE, self.summary())

    def refuse_output(self, out: str | Path, written: Iterable[str]) -> None:
        """Refuse an output directory that holds files of this corpus or is inside it.

        Otherwise the output would be read as text: now, or when the same command starts again.

        Args:
            out: a local directory, which need not exist.
            written: names, relative to ``out``, of files that will be written.

        Raises:
            DataError: they overlap; the message names the file or directory of the corpus.
        """
        place = os.path.realpath(out)
        for directory in sorted(self.directories):
            if _is_inside(place, directory):
                raise _overlap(out, f"lies inside {directory}, a directory of the corpus")
        parents: dict[str, str] = {}
        for file in self.files:
            if is_url(file.path):
                continue
            folder = os.path.dirname(file.path)
            real = parents.get(folder)
            if real is None:
                real = parents[folder] = os.path.realpath(folder)
            linked = os.path.islink(file.path)
            if _is_inside(os.path.realpath(file.path) if linked else real, place):
                raise _overlap(out, f"holds {file.path}, a file of the corpus")
        for pattern in self.globs:
            if any(_would_match(pattern, os.path.join(place, name)) for name in written):
                raise _overlap(out, f"is searched by {pattern}, a glob of the corpus")


CorpusPaths = CorpusFiles | Sequence[str | Path]
"""A corpus as given by a user, or the result of `find_files`."""


STANDARD_INPUT = "-"
"""A path that stands for lines of JSON on standard input."""


def find_files(paths: CorpusPaths, reading: Reading = TEXT_AND_ID) -> CorpusFiles:
    """The corpus files that files, directories, globs, URLs of them and ``-`` stand for.

    Directories are searched recursively, following links; hidden files are left out. Order: as
    given, and sorted within a directory or a glob. A file is named by its base name, or by its path
    relative to the directory given; if two files would have the same name, all files are named by
    their paths relative to their common directory, or by their URLs without query and password.
    Standard input is copied to a temporary file.

    Args:
        paths: the corpus; the result of an earlier call is returned as it is.
        reading: decides which .json files in directories hold documents.

    Raises:
        DataError: a path does not exist or is neither a file nor a directory, a glob matches
            nothing, a directory holds no corpus files, a file is of an unknown kind, a file is
            found twice, or two URLs differ only in their queries.
    """
    if isinstance(paths, CorpusFiles):
        return paths
    given = tuple(map(str, [paths] if isinstance(paths, str | Path) else paths))
    search = _Search(reading)
    for path in given:
        search.add(path)
    return search.result(given)


class _Search:
    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._paths: list[str] = []
        self._names: list[str] = []
        self._sizes = array("q")
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._numbers: dict[object, int] = {}
        self._left_out: Counter[str] = Counter()
        self._directories: set[str] = set()
        self._globs: list[str] = []

    def result(self, given: tuple[str, ...]) -> CorpusFiles:
        if not self._paths:
            raise DataError("corpus: no path was given; name at least one file or directory")
        self._refuse_compressed_twins()
        names = self._names
        if len(set(names)) < len(names):
            names = _names_from_common_directory(self._paths)
            self._refuse_equal(names)
        files = map(CorpusFile, self._paths, names, self._sizes)
        return CorpusFiles(
            tuple(files),
            self._left_out,
            frozenset(self._directories),
            tuple(self._globs),
            self._scratch,
            given,
        )

    def _refuse_equal(self, names: Sequence[str]) -> None:
        """Refuse URLs that only a query or a user tells apart: their documents would share ids."""
        known: dict[str, str] = {}
        for path, name in zip(self._paths, names, strict=True):
            other = known.setdefault(name, path)
            if other != path:
                shown = [CorpusFile(place, name).shown for place in (other, path)]
                raise DataError(
                    f"corpus {' and '.join(shown)}: only the query or the user of these URLs "
                    "differs, so their documents would have the same ids; give each file once, or "
                    "copies with different names"
                )

    def _refuse_compressed_twins(self) -> None:
        """Refuse a file next to its compressed copy, as `gzip -k` leaves it: its documents would be
        read twice and end up in several splits."""
        known: dict[str, str] = {}
        for path in map(_without_secrets, self._paths):
            found = format_of(os.path.basename(path))
            plain = path if found is None else path[: len(path) - len(found.compression)]
            other = known.setdefault(plain, path)
            if other != path:
                raise DataError(
                    f"corpus {other} and {path}: differ only in the compression suffix, so the "
                    "same documents would be read twice; remove one of them, or rename it if it "
                    "holds other documents"
                )

    def add(self, given: str) -> None:
        if not given:
            raise DataError("corpus: an empty path; is a variable on the command line unset?")
        if given == STANDARD_INPUT:
            self._add_standard_input()
            return
        if is_url(given):
            self._add_url(given)
            return
        path = str(Path(given))
        if os.path.lexists(path):
            self._add_path(path)
            return
        matches = sorted({Path(match) for match in _expand(given)}, key=lambda path: path.parts)
        if not matches:
            raise DataError(
                f"corpus {given}: no such file or directory; give {SUPPORTED}, or directories or "
                "globs of them"
            )
        self._globs.append(given)
        for match in matches:
            self._add_path(str(match))

    def _add_standard_input(self) -> None:
        """A corpus is read more than once, and from the middle; hence the copy."""
        if self._scratch is not None:
            raise DataError(f"corpus {STANDARD_INPUT}: is given twice; give standard input once")
        if sys.stdin is None:
            raise DataError(f"corpus {STANDARD_INPUT}: standard input is closed; send text to it")
        self._scratch = tempfile.TemporaryDirectory(prefix=STANDARD_INPUT_DIRECTORY)
        path = os.path.join(self._scratch.name, STANDARD_INPUT_FILE)
        try:
            with open(path, "wb") as copy:
                shutil.copyfileobj(sys.stdin.buffer, copy, 1 << 20)
        except OSError as error:
            raise DataError(
                f"corpus {STANDARD_INPUT}: standard input cannot be copied to {path} "
                f"({error.strerror}); set TMPDIR to a directory on a larger disk"
            ) from error
        self._add_file(path, STANDARD_INPUT_FILE, os.stat(path))

    def _add_url(self, url: str) -> None:
        before, added = Counter(self._left_out), 0
        for place, name, size, is_given in find_urls(url):
            found = format_of(CorpusFile(place, name).base_name)
            if is_given and found is None:
                raise unknown_format(CorpusFile(place, name).shown)
            if found is None or (not is_given and self._is_left_out(place, name)):
                if found is None:
                    self._left_out["hidden" if "/." in f"/{name}" else _kind(name)] += 1
                continue
            self._add(place, place, name, size)
            added += 1
        if not added:
            left = self._left_out - before
            raise DataError(
                f"corpus {CorpusFile(url, '').shown}: holds no {SUPPORTED}"
                + (f" (left out: {_counts(left)})" if left else "")
            )

    def _is_left_out(self, path: str, name: str) -> bool:
        """Whether a file of a known format in a directory is not part of the corpus; counts it."""
        found = format_of(name)
        if "/." in f"/{name}":
            self._left_out["hidden"] += 1
            return True
        if found is not None and found.kind == ".json":
            file = CorpusFile(path, name)
            if not holds_documents(file, self._reading):
                self._left_out[f"{found.suffix} (not lines of documents)"] += 1
                return True
        return False

    def _add_path(self, path: str) -> None:
        status = _status(path)
        if stat.S_ISDIR(status.st_mode):
            self._add_directory(path)
            return
        for is_kind, words in _NOT_FILES:
            if is_kind(status.st_mode):
                raise DataError(
                    f"corpus {path}: is {words}, but a corpus is read more than once; write its "
                    f"contents to a file and give that, or give {STANDARD_INPUT} and send lines of "
                    "JSON to standard input"
                )
        if format_of(os.path.basename(path)) is None:
            raise unknown_format(path)
        self._add_file(path, os.path.basename(path), status)

    def _add_directory(self, root: str) -> None:
        inside: list[tuple[str, tuple[object, int]]] = []
        before, start = Counter(self._left_out), len(os.path.join(root, ""))
        for directory, entries in _directories(root):
            if directory.is_root:
                self._directories.add(os.path.realpath(directory.path))
            for entry in entries:
                if entry.name.startswith("."):
                    self._left_out["hidden"] += 1
                elif (status := self._status_if_read(entry)) is not None:
                    inside.append((entry.path, (_identity(entry.path, status), status.st_size)))
        if not inside:
            found = self._left_out - before
            raise DataError(
                f"corpus {root}: this directory holds no {SUPPORTED}"
                + (f" (left out: {_counts(found)})" if found else "")
            )
        inside.sort(key=lambda found: found[0][start:].split(os.sep))
        for path, (identity, size) in inside:
            self._add(path.removeprefix("./"), identity, path[start:], size)

    def _status_if_read(self, entry: os.DirEntry[str]) -> os.stat_result | None:
        """The status of a file that is part of the corpus; counts others as left out."""
        found = format_of(entry.name)
        if found is None:
            if not _is_directory(entry):
                self._left_out[_kind(entry.name)] += 1
            return None
        status = _status(entry.path)
        if stat.S_ISDIR(status.st_mode):
            return None
        if not stat.S_ISREG(status.st_mode):
            self._left_out[f"{found.suffix} (not a regular file)"] += 1
            return None
        return None if self._is_left_out(entry.path, entry.name) else status

    def _add_file(self, path: str, name: str, status: os.stat_result) -> None:
        self._add(path, _identity(path, status), name, status.st_size)

    def _add(self, path: str, identity: object, name: str, size: int) -> None:
        number = self._numbers.setdefault(identity, len(self._paths))
        if number < len(self._paths):
            other = self._paths[number]
            how = "" if other == path else f": {other} is the same file, by a link or another path"
            raise DataError(f"corpus {path}: is given twice{how}; give each file once")
        self._paths.append(path)
        self._sizes.append(size)
        # A file name may hold bytes that are not text; a document id may not.
        self._names.append(name.encode("utf-8", "backslashreplace").decode())


def _identity(path: str, status: os.stat_result) -> object:
    """The same for all paths and links of one file."""
    # Some network file systems have no inode numbers.
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


@dataclass(frozen=True)
class _Directory:
    path: str
    is_root: bool
    """Whether the search starts here, or this is the target of a link."""


def _directories(root: str) -> Iterator[tuple[_Directory, list[os.DirEntry[str]]]]:
    """Each directory at and below ``root`` once, with its entries sorted by name.

    Hidden directories are left out. Targets of links come after all others, so that a link to a
    directory that is also reached directly changes nothing.
    """
    below: deque[_Directory] = deque([_Directory(root, True)])
    linked: deque[_Directory] = deque()
    seen = set()
    while below or linked:
        directory = (below or linked).popleft()
        status = _status(directory.path)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        try:
            with os.scandir(directory.path) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            what = f"corpus {directory.path}"
            message = f"{what}: cannot be read ({error.strerror})"
            raise unreadable(what, error, message) from error
        for entry in listed:
            if entry.name.startswith(".") or not _is_directory(entry):
                continue
            if entry.is_symlink():
                linked.append(_Directory(entry.path, True))
            else:
                below.append(_Directory(entry.path, False))
        yield directory, listed


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _status(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        link = "is a link whose target " if os.path.islink(path) else ""
        message = f"corpus {path}: {link}cannot be read ({error.strerror}); fix or remove it"
        raise unreadable(f"corpus {path}", error, message) from error


def _expand(pattern: str) -> set[str]:
    """The files and directories that a glob matches; ``**`` enters each directory once.

    Python's own ``**`` follows cyclic links up to the longest path that the system allows.
    """
    if not glob.has_magic(pattern):
        return set()
    parts = pattern.split(os.sep)
    if "**" not in parts:
        return set(glob.glob(pattern))
    at = parts.index("**")
    rest = os.sep.join(part for part in parts[at + 1 :] if part)
    roots = glob.glob(os.sep.join([*parts[:at], ""])) if at else ["."]
    if not rest:
        return {root for root in roots if os.path.isdir(root)}
    found: set[str] = set()
    for root in roots:
        for directory, _ in _directories(root):
            inside = os.path.join(glob.escape(directory.path), rest)
            found |= _expand(inside) if "**" in rest.split(os.sep) else set(glob.glob(inside))
    return found


def _would_match(pattern: str, path: str) -> bool:
    """Whether a glob matches a path, which need not exist, or one of its parent directories."""
    parts = pattern.split(os.sep)
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    start = os.path.realpath(os.sep.join([*parts[:fixed], ""]) or ".")
    if not _is_inside(path, start):
        return False
    names = os.path.relpath(path, start).split(os.sep)
    magic = [part for part in parts[fixed:] if part]
    return any(_match_parts(names[:depth], magic) for depth in range(len(names) + 1))


def _match_parts(names: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not names
    if pattern[0] == "**":
        return any(_match_parts(names[i:], pattern[1:]) for i in range(len(names) + 1))
    return (
        bool(names) and fnmatchcase(names[0], pattern[0]) and _match_parts(names[1:], pattern[1:])
    )


def _names_from_common_directory(paths: Sequence[str]) -> list[str]:
    if any(map(is_url, paths)):
        return [_without_secrets(path) for path in paths]
    real = {folder: os.path.realpath(folder) for folder in set(map(os.path.dirname, paths))}
    common = os.path.commonpath(real.values())
    names = [
        os.path.relpath(os.path.join(real[os.path.dirname(path)], os.path.basename(path)), common)
        for path in paths
    ]
    return [name.encode("utf-8", "backslashreplace").decode() for name in names]


def _without_secrets(path: str) -> str:
    """A path, or a URL without what changes from day to day: the signature in the query of an
    ``https`` one, and a user with a password."""
    if not is_url(path):
        return path
    scheme, _, rest = path.partition("://")
    if scheme.lower() in ("http", "https"):
        rest = rest.partition("?")[0]
    host, slash, inside = rest.partition("/")
    user, at, server = host.rpartition("@")
    # The user of an abfs URL is a container.
    host = server if ":" in user else f"{user}{at}{server}"
    return f"{scheme}://{host}{slash}{inside}"


def _is_inside(path: str, directory: str) -> bool:
    return path == directory or path.startswith(os.path.join(directory, ""))


def _overlap(out: str | Path, how: str) -> DataError:
    return DataError(
        f"--out {out}: {how}; the output would be read as text. Give another --out, or move the "
        "corpus"
    )


def _kind(name: str) -> str:
    """The suffix of a file name, or both suffixes if the second is a compression."""
    found = format_of(name)
    if found is not None:
        return found.suffix
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    if not suffixes:
        return "without suffix"
    return "".join(suffixes[-2:]) if suffixes[-1] in CODECS else suffixes[-1]


def _counts(kinds: Counter[str]) -> str:
    ordered = sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0]))
    named = [f"{number} {kind}" for kind, number in ordered[:_NAMED_KINDS]]
    others = sum(number for _, number in ordered[_NAMED_KINDS:])
    return ", ".join([*named, *([f"{others} others"] if others else [])])
