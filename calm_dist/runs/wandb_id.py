"""The wandb run of a run directory: a moved directory keeps its run, a copy gets a new one."""

from __future__ import annotations

import json
import logging
import re
import uuid
from pathlib import Path
from typing import Any

from calm_dist.errors import DataError
from calm_dist.files import read_bounded, replace_text

_log = logging.getLogger(__name__)

ID_FILE = "wandb_id"
_LARGEST_FILE = 10_000


def wandb_id(run_dir: Path) -> str:
    """The id of the directory's wandb run, drawn at random if it has none yet.

    The file holds the id and, in a second line, the directory's place at its last use: path and
    inode. A renamed directory keeps its inode. A directory with another path and inode is a copy if
    the original still exists, or if both places are on the same file system, where moving keeps the
    inode. A copy gets a new id, and a log line says so.
    """
    file = run_dir / ID_FILE
    place = _place(run_dir)
    try:
        name, before = _read(file)
    except (OSError, ValueError, DataError):
        name, before = _draw(), place
    if before is not None and _is_copy(place, before, name):
        old, name = name, _draw()
        _log.info(
            f"{run_dir}: was copied from {before['path']}, which keeps the wandb run {old}; "
            f"logging to a new one, {name}"
        )
    replace_text(file, f"{name}\n{json.dumps(place)}\n")
    return name


def _draw() -> str:
    return uuid.uuid4().hex[:8]


def _place(run_dir: Path) -> dict[str, Any]:
    status = run_dir.stat()
    return {"path": str(run_dir.resolve()), "device": status.st_dev, "inode": status.st_ino}


def _read(file: Path) -> tuple[str, dict[str, Any] | None]:
    """Id and place; the place is None in files of earlier versions.

    Raises:
        ValueError: the file holds no id.
    """
    name, *rest = read_bounded(file, _LARGEST_FILE).decode().split("\n", 1)
    if not re.fullmatch(r"[0-9a-zA-Z_-]{1,128}", name.strip()):
        raise ValueError(f"{file}: holds no id")
    try:
        place = json.loads(rest[0])
        known = isinstance(place["path"], str) and {"device", "inode"} <= place.keys()
    except (LookupError, ValueError, TypeError):
        return name.strip(), None
    return name.strip(), place if known else None


def _is_copy(place: dict[str, Any], before: dict[str, Any], name: str) -> bool:
    if place["path"] == before["path"]:
        return False
    try:
        # The original's old path may also lead to this directory, for example through a link.
        original = Path(before["path"])
        if _read(original / ID_FILE)[0] == name:
            return not original.samefile(place["path"])
    except (OSError, ValueError, DataError):
        pass
    return bool(place["device"] == before["device"] and place["inode"] != before["inode"])
