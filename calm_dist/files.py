"""Small things that are done to files everywhere."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calm_dist.errors import DataError, UserError


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def read_bounded(path: Path, limit: int, error_type: type[UserError] = DataError) -> bytes:
    """All bytes of a file of at most ``limit`` bytes.

    Raises:
        OSError: the file cannot be opened or read; callers say what it means to them.
        UserError: of ``error_type``; it is larger, or no file: a pipe or a device might never end.
    """
    # Opening a pipe would otherwise wait for somebody to write into it.
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
                "can have; it is damaged, or another file"
            )
        return stream.read()


def on_one_line(text: str) -> str:
    """Text with its line breaks escaped, for ``printf %b`` of the shell, which gives it back."""
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def finite(value: Any) -> Any:
    """Plain values with null for numbers that are not finite, of which JSON has none."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return value


def replace_text(path: Path, text: str) -> None:
    """Write a text file so that whoever looks finds the old text or all of the new one."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
