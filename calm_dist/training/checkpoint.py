"""Checkpoint directories: written aside, checked by a manifest, renamed, never half there.

``checkpoints/step_00000100/`` holds whatever a trainer writes, and ``manifest.json`` with the size
and sha256 of every file. A directory without a manifest that holds is not a checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from calm_dist.errors import CheckpointError
from calm_dist.files import file_sha256, replace_text

CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
LATEST = "latest"
STATE_FILE = "state.json"
RECIPE_FILE = "recipe.yaml"
WEIGHTS_ONLY = "weights_only"
"""Key of the state of a checkpoint that no optimizer has written, such as an import."""
_STEP_NAME = re.compile(r"step_(\d+)")


def step_directory(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_dir / CHECKPOINTS / f"step_{step:08d}"


def begin(run_dir: Path, step: int) -> Path:
    """An empty directory to write the checkpoint of ``step`` into."""
    temporary = step_directory(run_dir, step).with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def commit(temporary: Path, keep: int) -> Path:
    """Make a written directory a checkpoint: manifest, sync, rename, ``latest``, old ones away."""
    manifest = {str(file.relative_to(temporary)): _describe(file) for file in _files(temporary)}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for file in _files(temporary):
        _sync(file)
    final = temporary.with_suffix("")
    if final.exists():
        # The same step was reached again after a resume from an older one.
        shutil.rmtree(final)
    os.replace(temporary, final)
    _sync(final.parent)
    replace_text(final.parent / LATEST, final.name + "\n")
    _make_room(final, keep)
    return final


def _make_room(final: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints up to ``final``.

    Those of later steps were passed over as damaged when the run went on from an earlier one.
    They are set aside: they must neither count nor be met again.
    """
    directories = _step_directories(final.parent)
    newest = directories.index(final)
    for later in directories[:newest]:
        aside = later.with_suffix(".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(later, aside)
    for old in directories[newest + keep :]:
        shutil.rmtree(old, ignore_errors=True)


def newest_recipe(run_dir: Path) -> Path | None:
    """The recipe in a run's newest checkpoint that has one, whether the rest is whole or not."""
    recipes = (directory / RECIPE_FILE for directory in _step_directories(run_dir / CHECKPOINTS))
    return next(filter(Path.is_file, recipes), None)


def verify(directory: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: with the file and what is wrong with it.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: missing or damaged; not a finished checkpoint") from error
    if not isinstance(manifest, dict) or not {STATE_FILE, RECIPE_FILE} <= manifest.keys():
        raise CheckpointError(f"{path}: damaged; it does not list {STATE_FILE} and {RECIPE_FILE}")
    for name, expected in manifest.items():
        file = directory / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing, although the manifest lists it")
        found = _describe(file)
        if found != expected:
            raise CheckpointError(f"{file}: manifest says {expected}, found {found}")


def newest_valid(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run; says on stderr why newer ones are passed over."""
    return next(filter(_is_valid, _step_directories(run_dir / CHECKPOINTS)), None)


def _is_valid(directory: Path) -> bool:
    try:
        verify(directory)
    except CheckpointError as error:
        print(f"checkpoint passed over: {error}", file=sys.stderr, flush=True)
        return False
    return True


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that ``path`` means: itself, or the newest valid one of a run directory.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory; give a run directory or a checkpoint")
    if (path / MANIFEST).is_file():
        verify(path)
        return path
    run_dir = path.parent if path.name == CHECKPOINTS else path
    found = newest_valid(run_dir)
    if found is None:
        raise CheckpointError(f"{path}: holds no valid checkpoint; train first, or give another")
    return found


def has_only_weights(directory: Path) -> bool:
    """Whether a checkpoint has weights, but no state of optimizer and data to go on from."""
    try:
        state = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # Damaged: whoever loads it will say so.
        return False
    return isinstance(state, dict) and bool(state.get(WEIGHTS_ONLY))


def run_directory(directory: Path) -> Path | None:
    """The run directory of a checkpoint, or None where it stands alone."""
    checkpoints = directory.absolute().parent
    return checkpoints.parent if checkpoints.name == CHECKPOINTS else None


def all_checkpoints(run_dir: str | Path) -> list[Path]:
    """The valid checkpoints of a run, oldest first; says on stderr why others are left out."""
    directories = _step_directories(Path(run_dir) / CHECKPOINTS)
    return [directory for directory in reversed(directories) if _is_valid(directory)]


def _step_directories(checkpoints: Path) -> list[Path]:
    """Committed step directories, newest first."""
    if not checkpoints.is_dir():
        return []
    steps = {
        int(match[1]): entry
        for entry in checkpoints.iterdir()
        if (match := _STEP_NAME.fullmatch(entry.name)) and entry.is_dir()
    }
    return [steps[step] for step in sorted(steps, reverse=True)]


def _files(directory: Path) -> Iterator[Path]:
    return (file for file in sorted(directory.rglob("*")) if file.is_file())


def _describe(file: Path) -> dict[str, int | str]:
    return {"bytes": file.stat().st_size, "sha256": file_sha256(file)}


def _sync(path: Path) -> None:
    """Make sure that a file or directory entry survives a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
