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

from calm_dist.errors import DataError

NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
"""What `flock` says where a file system does not have it."""


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


def finite(value: Any) -> Any:
    """Plain values with null for numbers that are not finite, of which JSON has none."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return value


def follow_umask(path: Path) -> None:
    """Give a file the mode of any new file beside it.

    safetensors 0.8 makes files that only their owner can read.
    """
    fresh = path.with_name(path.name + ".mode")
    fresh.touch()
    path.chmod(stat.S_IMODE(fresh.stat().st_mode))
    fresh.unlink()


def replace_text(path: Path, text: str) -> None:
    """Write a text file so that whoever looks finds the old text or all of the new one."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def process_started(pid: int) -> int | None:
    """When a process of this machine began, in ticks since the boot; None where there is none, or
    only what is left of a dead one."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name before may hold spaces and parentheses.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])
