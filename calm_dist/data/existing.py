"""What an output directory already holds: a finished store, one that was begun, or other files.

A store that is there is continued or kept only if it was made from the same plan.
"""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from calm_dist.data.download import MissingError
from calm_dist.data.layout import META, is_remote
from calm_dist.data.store import (
    LATER_FIELDS,
    StoreMeta,
    StorePlan,
    TokenDtype,
    read_meta,
    read_shards,
)
from calm_dist.errors import DataError, unreadable
from calm_dist.text.formats import TEXT_AND_ID

PARTS = ".parts"
PLAN = "plan.json"
BLOCKS = "blocks_per_shard"

_TOKEN_NAMES = ("begin_token", "end_token")
_DEFAULTS = {
    "parts": 1,
    "order": None,
    "reading": TEXT_AND_ID.model_dump(mode="json"),
    "token_dtype": "uint32",
    "compression": None,
    "latent_dtype": "float16",
}


def finished_store(out: str | Path, plan: StorePlan) -> StoreMeta | None:
    """The finished store in ``out``, if it exists, is complete and agrees with ``plan``.

    Only the sizes of shards are checked here; every reader checks their contents.

    Raises:
        DataError: ``out`` holds a store of another plan, finished or not, or other files.
    """
    if is_remote(out):
        try:
            meta = read_meta(out)
        except MissingError:
            return None
        refuse_other_plan(out, meta.to_dict(), plan)
        return meta
    out = Path(out)
    if not out.exists():
        return None
    # In this order, since another process may finish meanwhile: there are shards only together
    # with the plan or, later, meta.json.
    others = not out.is_dir() or any(not file.name.startswith(PARTS) for file in out.iterdir())
    try:
        begun = begun_plan(out)
    except DataError:
        # A leftover plan in a finished store does no harm.
        if not (out / META).is_file():
            raise
        begun = None
    if (out / META).is_file():
        meta = read_meta(out)
        refuse_other_plan(out, meta.to_dict(), plan)
        for shard in read_shards(out, meta):
            shard.stored.check_size()
        return meta
    if begun is not None:
        refuse_other_plan(out, begun, plan)
    elif others:
        raise DataError(
            f"--out {out}: exists and is not a data store; give an empty or new directory"
        )
    return None


def token_dtype_of(out: str | Path) -> TokenDtype | None:
    """The type of tokens of the store in ``out``, finished or begun; None if there is none."""
    try:
        return read_meta(out).token_dtype
    except DataError:
        if is_remote(out):
            return None
    with suppress(DataError):
        begun = begun_plan(Path(out))
        return None if begun is None else begun.get("token_dtype", "uint32")
    return None


def begun_plan(out: Path) -> dict[str, Any] | None:
    """The plan of the unfinished store in ``out``, and the blocks of its shards; None without one.

    Raises:
        DataError: the plan is damaged, of another version, or cannot be read.
    """
    file = out / PARTS / PLAN
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(described, dict):
            raise ValueError(f"a {type(described).__name__} instead of an object")
        fields = {key: value for key, value in described.items() if key != BLOCKS}
        StorePlan.model_validate(fields)
        if type(blocks := described.get(BLOCKS, 1)) is not int or blocks < 1:
            raise ValueError(f"{BLOCKS} {blocks!r}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        message = f"{file}: cannot be read ({error.strerror}); fix or remove it"
        raise unreadable(file, error, message) from error
    except (ValueError, RecursionError) as error:
        raise damaged(out, file, error) from error
    return described


def plan_of_unfinished(out: Path) -> dict[str, Any]:
    """The plan of an unfinished store; FileNotFoundError if another process finished it."""
    present = begun_plan(out)
    if present is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(out / PARTS / PLAN))
    return present


def damaged(out: Path, file: Path, error: Exception) -> DataError:
    """The error for a file of an unfinished store that does not hold what belongs there."""
    reason = str(error).partition("\n")[0] if not isinstance(error, KeyError) else f"no {error}"
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return DataError(
        f"{file}: is damaged, or of another version ({reason}); the store in {out} is not "
        "finished: write it again with --overwrite"
    )


def refuse_other_plan(out: str | Path, present: dict[str, Any], plan: StorePlan) -> None:
    """DataError, naming a field, if ``out`` holds a store that was not made from ``plan``."""
    for key, wanted in plan.model_dump(mode="json").items():
        found = present.get(key)
        if found is None and key in LATER_FIELDS:
            found = _DEFAULTS[key]
        if key == "autoencoder" and found and wanted:
            # The same weights at another path are the same autoencoder.
            found, wanted = found["sha256"], wanted["sha256"]
        if key == "tokenizer" and isinstance(found, dict):
            # Compare the ids of its tokens; earlier versions did not write their names.
            found = {name: found.get(name) for name in wanted if name not in _TOKEN_NAMES}
            wanted = {name: wanted[name] for name in found}
        if found != wanted and key == "reading" and isinstance(found, dict):
            key = next(name for name in wanted if found.get(name) != wanted[name])
            found, wanted = found.get(key), wanted[key]
        if found != wanted:
            raise DataError(
                f"--out {out}: holds a store with another {key} ({found} there, {wanted} now); "
                "give another --out, or --overwrite to replace it"
            )
