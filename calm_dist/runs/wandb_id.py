"""Which wandb run a run directory belongs to: its own, also after it was moved; not that of the
directory that it was copied from."""

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
    """The id of the directory's wandb run, drawn where it has none yet.

    The file holds the id and, in a second line, where the directory was when it was last used:
    its path and inode. A directory that was renamed keeps its inode. One that has another path
    and inode is a copy if the original is still there, or if both would lie on one file system, on
    which moving keeps the inode; a copy gets a new id, and a line says so.
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
            f"{run_dir}: was copied from {before['path']}, which keeps the wandb run {old}; logs "
            f"into a new one, {name}"
        )
    replace_text(file, f"{name}\n{json.dumps(place)}\n")
    return name


def _draw() -> str:
    return uuid.uuid4().hex[:8]


def _place(run_dir: Path) -> dict[str, Any]:
    status = run_dir.stat()
    return {"path": str(run_dir.resolve()), "device": status.st_dev, "inode": status.st_ino}


def _read(file: Path) -> tuple[str, dict[str, Any] | None]:
    """Id and place; earlier versions wrote no place.

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
        # Also where the original has been moved into, or is seen through, another path.
        original = Path(before["path"])
        if _read(original / ID_FILE)[0] == name:
            return not original.samefile(place["path"])
    except (OSError, ValueError, DataError):
        pass
    return bool(place["device"] == before["device"] and place["inode"] != before["inode"])
