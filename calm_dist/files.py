"""Small helpers for files."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calm_dist.errors import DataError, UserError, unreadable

NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
"""Errors of `flock` on a file system that does not support it."""
FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a write to a full disk."""


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes.

    Raises:
        DataError: the file cannot be read; `UnreachableError` if it may be readable later.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        message = f"{path}: cannot be read ({error.strerror})"
        raise unreadable(path, error, message) from error


def read_bounded(path: Path, limit: int, error_type: type[UserError] = DataError) -> bytes:
    """All bytes of a file of at most ``limit`` bytes.

    Raises:
        OSError: the file cannot be opened or read; callers add their own context.
        UserError: of ``error_type``; it is larger, or is not a regular file: a pipe or a device
            might never end.
    """
    # Without O_NONBLOCK, opening a pipe would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if stat.S_ISDIR(status.st_mode):
        os.close(descriptor)
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(status.st_mode):
            raise error_type(f"{path}: is a pipe or a device; give a file")
        if status.st_size > limit:
            raise error_type(
                f"{path}: has {status.st_size:,} bytes, more than the {limit:,} that such a file "
                "can have; it is damaged, or the wrong file"
            )
        return stream.read()


def on_one_line(text: str) -> str:
    """Text with its line breaks escaped, so that the shell's ``printf %b`` restores it."""
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def finite(value: Any) -> Any:
    """Plain values with numbers that are not finite replaced by None: JSON cannot hold them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return value


def follow_umask(path: Path) -> None:
    """Give a file the mode that any new file in its directory gets.

    safetensors 0.8 creates files that only their owner can read.
    """
    fresh = path.with_name(path.name + ".mode")
    fresh.touch()
    path.chmod(stat.S_IMODE(fresh.stat().st_mode))
    fresh.unlink()


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically: a reader finds the old text or all of the new one, also after
    a crash of the machine."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def process_started(pid: int) -> int | None:
    """Start time of a process on this machine, in ticks since the boot; None if there is no such
    process or it is a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The process name before it may hold spaces and parentheses.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def check_file_is_writable(path: str | Path) -> None:
    """Check before long work that its result can be written to a file; leaves no trace.

    Missing parent directories count as created.

    Raises:
        OSError: it cannot.
    """
    # Resolved, so that a dangling link is judged by its target.
    path = Path(os.path.realpath(path))
    if not path.exists():
        check_directory_is_writable(path.parent)
    elif path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    elif path.is_file():
        path.open("r+b").close()
        try:
            check_directory_is_writable(path.parent)
        except OSError as error:
            # A file may be writable although its directory is not; on a full disk it would be lost.
            if error.errno in FULL:
                raise
    elif not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def check_directory_is_writable(path: str | Path) -> None:
    """Check before long work that files can be written below a directory, which need not exist
    yet; leaves no trace.

    Raises:
        OSError: they cannot.
    """
    path = Path(os.path.realpath(path))
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    # Permission bits say nothing about read-only mounts, full disks and network file systems.
    with tempfile.TemporaryFile(dir=path) as file:
        file.write(bytes(4096))
        file.flush()
