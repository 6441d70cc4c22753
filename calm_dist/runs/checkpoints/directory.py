"""Checkpoint directories: written under a temporary name and renamed, so never partial.

``checkpoints/step_00000100/`` holds the files that a trainer writes, and ``manifest.json`` with the
size and sha256 of each. A directory without a manifest that matches its files is not a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from calm_dist.errors import CheckpointError, DataError, UserError, shown
from calm_dist.files import file_sha256
from calm_dist.log import NOTE
from calm_dist.recipe import RECIPE_FILE, load_recipe
from calm_dist.runs.checkpoints.run_state import STATE_FILE, RunState

_log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
LATEST = "latest"
TENSORS = "tensors"
"""Megatron's distributed checkpoint of a language model."""
AUTOENCODER_FILES = ("config.json", "model.safetensors")
OPTIMIZER_FILE = "optimizer.safetensors"
_STEP_NAME = re.compile(r"step_([0-9]{1,18})")
# A rank's description of the files that it wrote; merged into the manifest.
_PART_OF_MANIFEST = "manifest_{rank}.part"

Described = dict[str, dict[str, int | str]]


def step_directory(run_dir: Path, step: int) -> Path:
    """The directory of a step's checkpoint."""
    return run_dir / CHECKPOINTS / f"step_{step:08d}"


def begin(run_dir: Path, step: int) -> Path:
    """Make an empty directory for writing the checkpoint of ``step``."""
    temporary = step_directory(run_dir, step).with_suffix(".tmp")
    remove(temporary)
    temporary.mkdir(parents=True)
    return temporary


def describe_files(temporary: Path, files: list[Path], rank: int) -> None:
    """Hash files that a rank has written and synced, so that `publish` need not do so."""
    text = json.dumps(_describe_all(temporary, files))
    (temporary / _PART_OF_MANIFEST.format(rank=rank)).write_text(text, encoding="utf-8")


def publish(temporary: Path) -> Path:
    """Make a written directory a checkpoint: manifest, sync, rename."""
    described: Described = {}
    for part in sorted(temporary.glob(_PART_OF_MANIFEST.format(rank="*"))):
        # It may be truncated by a full disk; then its files are hashed again.
        with contextlib.suppress(ValueError):
            described |= json.loads(part.read_text(encoding="utf-8"))
        part.unlink()
    others = [f for f in _files(temporary) if str(f.relative_to(temporary)) not in described]
    for file in others:
        _sync(file)
    manifest = described | _describe_all(temporary, others)
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    _sync(temporary / MANIFEST)
    final = temporary.with_suffix("")
    # The same step may have been reached before, if the run then continued from an older one.
    remove(final)
    os.replace(temporary, final)
    _sync(final.parent)
    return final


def set_aside(directories: list[Path], suffix: str = ".damaged") -> None:
    """Rename checkpoints that were passed over, so that they neither count nor are tried again."""
    for directory in directories:
        aside = directory.with_suffix(suffix)
        remove(aside)
        os.replace(directory, aside)


def verify(directory: Path, part: int = 0, parts: int = 1) -> None:
    """Check the description of a checkpoint, and its files against its manifest.

    Args:
        part: number of this process among ``parts`` processes that share the reading; each checks
            all sizes, and the contents of its share of the files.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged; the message names file and fault.
    """
    manifest = _read_manifest(directory)
    for number, (name, expected) in enumerate(sorted(manifest.items())):
        _verify_file(directory / name, expected, read=number % parts == part)
    for name in _read_by_a_load(directory):
        if name not in manifest:
            raise CheckpointError(
                f"{directory / MANIFEST}: damaged; it does not list {name}, which is part of it"
            )


def verify_description(directory: Path) -> None:
    """Check only the description of a checkpoint, recipe and state, against its manifest.

    Raises:
        CheckpointError: a file is missing or damaged; the message names file and fault.
    """
    manifest = _read_manifest(directory)
    for name in (STATE_FILE, RECIPE_FILE):
        _verify_file(directory / name, manifest[name], read=True)


def _verify_file(file: Path, expected: dict[str, int | str], read: bool) -> None:
    # Not Path.is_file, which raises for invalid file names.
    if not os.path.isfile(file):
        raise CheckpointError(f"{file}: missing, although the manifest lists it")
    size = file.stat().st_size
    if size != expected.get("bytes"):
        raise CheckpointError(f"{file}: has {size} bytes, the manifest says {shown(expected)}")
    if read and (sha256 := _hash(file)) != expected.get("sha256"):
        raise CheckpointError(
            f"{file}: damaged; sha256 {sha256}, the manifest says {shown(expected)}"
        )


def _read_manifest(directory: Path) -> Described:
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: missing or damaged; not a finished checkpoint") from error
    if not isinstance(manifest, dict) or not {STATE_FILE, RECIPE_FILE} <= manifest.keys():
        raise CheckpointError(f"{path}: damaged; it does not list {STATE_FILE} and {RECIPE_FILE}")
    for name, expected in manifest.items():
        inside = not Path(name).is_absolute() and ".." not in Path(name).parts
        if not inside or not isinstance(expected, dict):
            raise CheckpointError(
                f"{path}: damaged; its entry {shown(name)}: {shown(expected)} is invalid"
            )
    return manifest


def _read_by_a_load(directory: Path) -> list[str]:
    """Files of a checkpoint according to its own description: the manifest may list fewer.

    Raises:
        CheckpointError: the description is damaged or wrong.
    """
    state = RunState.read(directory)
    if (step := step_of(directory)) is not None and state.step != step:
        raise CheckpointError(
            f"{directory / STATE_FILE}: is of step {state.step}, not of the step in the "
            "directory's name"
        )
    try:
        recipe = load_recipe(directory / RECIPE_FILE)
    except UserError as error:
        raise CheckpointError(str(error)) from error
    if recipe.model.kind == "autoencoder":
        return [*AUTOENCODER_FILES, OPTIMIZER_FILE]

    # Imported here, because it imports torch, which listing directories does not need.
    from calm_dist.runs.checkpoints.trusted import tensor_files

    return [f"{TENSORS}/{name}" for name in sorted(tensor_files(directory / TENSORS))]


def newest_valid(run_dir: Path) -> Path | None:
    """The newest intact checkpoint of a run; logs why newer ones are passed over."""
    return next(filter(_is_valid, step_directories(run_dir)), None)


def pass_over(reason: str) -> None:
    """Log why a checkpoint is not used."""
    _log.log(NOTE, f"checkpoint passed over: {reason}")


def _is_valid(directory: Path) -> bool:
    try:
        verify(directory)
    except Exception as error:  # damage may raise anything, and must not end a restart
        pass_over(str(error))
        return False
    return True


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that ``path`` stands for: itself, or the newest valid one of a run directory.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory; give a run directory or a checkpoint")
    if (path / MANIFEST).is_file():
        verify(path)
        say_what_is_used(path, [path])
        return path
    run_dir = path.parent if path.name == CHECKPOINTS else path
    directories = step_directories(run_dir)
    found = next(filter(_is_valid, sound_first(directories)), None)
    if found is None:
        raise CheckpointError(f"{path}: holds no valid checkpoint; train first, or give another")
    say_what_is_used(found, directories)
    return found


def sound_first(found: list[Path]) -> list[Path]:
    """Checkpoints, newest first, but those written amid skipped steps come last: their weights may
    be damaged."""
    return sorted(found, key=lambda directory: skipped_note(directory) is not None)


def skipped_note(directory: Path) -> str | None:
    """A warning for a checkpoint whose last steps were skipped; None for any other."""
    state = RunState.read_if_whole(directory)
    if state is None or not state.skipped_in_a_row:
        return None
    return (
        f"{directory}: its last {state.skipped_in_a_row} steps were skipped because loss or "
        "gradient was not finite; the weights may be damaged"
    )


def say_what_is_used(used: Path, of: list[Path]) -> None:
    """Warn if ``used`` was written amid skipped steps; otherwise log the newer ones among the
    candidates ``of`` that `sound_first` has moved behind it for that reason."""
    if (note := skipped_note(used)) is not None:
        _log.warning(note)
        return
    for directory in of:
        if directory.name > used.name and (note := skipped_note(directory)) is not None:
            pass_over(f"{note}; using {used.name}; to use the other one, give its path")


def candidates(path: str | Path, name: str) -> list[Path]:
    """The checkpoints that ``path`` may stand for, newest first: itself, or those of a run
    directory.

    Args:
        name: the field that holds the path, for messages.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(
            f"{name}: {path}: no such directory; give a run directory or a checkpoint"
        )
    if (path / MANIFEST).is_file():
        return [path]
    found = step_directories(path.parent if path.name == CHECKPOINTS else path)
    if not found:
        raise CheckpointError(f"{name}: {path}: holds no checkpoint; give another")
    return sound_first(found)


def has_only_weights(directory: Path) -> bool:
    """Whether a checkpoint has weights, but no state of optimizer and data to continue from."""
    state = RunState.read_if_whole(directory)
    return state is not None and state.weights_only


def run_directory(directory: Path) -> Path | None:
    """The run directory of a checkpoint, or None if it is in none."""
    checkpoints = directory.absolute().parent
    return checkpoints.parent if checkpoints.name == CHECKPOINTS else None


def all_checkpoints(run_dir: str | Path) -> list[Path]:
    """The valid checkpoints of a run, oldest first; logs why others are left out."""
    return [directory for directory in reversed(step_directories(run_dir)) if _is_valid(directory)]


def step_directories(run_dir: str | Path) -> list[Path]:
    """Committed step directories of a run, newest first."""
    checkpoints = Path(run_dir) / CHECKPOINTS
    if not checkpoints.is_dir():
        return []
    steps = {
        step: entry
        for entry in checkpoints.iterdir()
        if (step := step_of(entry)) is not None and entry.is_dir()
    }
    return [steps[step] for step in sorted(steps, reverse=True)]


def clean(run_dir: Path) -> None:
    """Remove half-written checkpoints of killed runs; only the run that holds the lock on
    ``run_dir`` may do so."""
    for temporary in (run_dir / CHECKPOINTS).glob("step_*.tmp"):
        remove(temporary)


def step_of(directory: Path) -> int | None:
    """The step of a directory that is named exactly as by `step_directory`; otherwise None."""
    match = _STEP_NAME.fullmatch(directory.name)
    if match is None or directory.name != step_directory(Path(), int(match[1])).name:
        return None
    return int(match[1])


def remove(path: Path) -> None:
    """Remove a directory, file or link, if it exists."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _files(directory: Path) -> Iterator[Path]:
    return (file for file in sorted(directory.rglob("*")) if file.is_file())


def _hash(file: Path) -> str:
    try:
        return file_sha256(file)
    except DataError as error:
        raise CheckpointError(str(error)) from error


def _describe_all(directory: Path, files: list[Path]) -> Described:
    return {
        str(file.relative_to(directory)): {
            "bytes": file.stat().st_size,
            "sha256": _hash(file),
        }
        for file in files
    }


def _sync(path: Path) -> None:
    """Make a file or directory entry survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
