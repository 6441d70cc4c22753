"""Walks directories, links followed and cycles left out, and expands globs."""

from __future__ import annotations

import glob
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from calm_dist.errors import unreadable


@dataclass(frozen=True)
class Directory:
    """A directory of a search."""

    path: str
    is_root: bool
    """Whether the search starts here, or this is the target of a link."""


def directories(root: str) -> Iterator[tuple[Directory, list[os.DirEntry[str]]]]:
    """Each directory at and below ``root`` once, with its entries sorted by name.

    Hidden directories are left out. Targets of links come after all others, so that a link to a
    directory that is also reached directly changes nothing.
    """
    below: deque[Directory] = deque([Directory(root, True)])
    linked: deque[Directory] = deque()
    seen = set()
    while below or linked:
        directory = (below or linked).popleft()
        status = status_of(directory.path)
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
            if entry.name.startswith(".") or not is_directory(entry):
                continue
            if entry.is_symlink():
                linked.append(Directory(entry.path, True))
            else:
                below.append(Directory(entry.path, False))
        yield directory, listed


def is_directory(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a directory, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def status_of(path: str) -> os.stat_result:
    """Of a file or directory, links followed.

    Raises:
        DataError: it cannot be read, such as a link without a target.
    """
    try:
        return os.stat(path)
    except OSError as error:
        link = "is a link whose target " if os.path.islink(path) else ""
        message = f"corpus {path}: {link}cannot be read ({error.strerror}); fix or remove it"
        raise unreadable(f"corpus {path}", error, message) from error


def expand(pattern: str) -> set[str]:
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
        for directory, _ in directories(root):
            inside = os.path.join(glob.escape(directory.path), rest)
            found |= expand(inside) if "**" in rest.split(os.sep) else set(glob.glob(inside))
    return found


def would_match(pattern: str, path: str) -> bool:
    """Whether a glob matches a path, which need not exist, or one of its parent directories."""
    parts = pattern.split(os.sep)
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    start = os.path.realpath(os.sep.join([*parts[:fixed], ""]) or ".")
    if not is_inside(path, start):
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


def is_inside(path: str, directory: str) -> bool:
    """Whether a real path is a directory or below it."""
    return path == directory or path.startswith(os.path.join(directory, ""))
