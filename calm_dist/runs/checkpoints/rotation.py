"""Decides which checkpoints of a run are kept, and which one it returns to after diverging.

A checkpoint is *proven* once a step after it was finite. Weights ruined by a bad step are saved
like any others, so the newest proven checkpoint is kept, whatever ``checkpoint.keep`` is, until a
newer one is proven. A checkpoint whose last step was skipped has no new weights and does not
displace another.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from calm_dist.errors import DataError
from calm_dist.files import file_sha256, replace_text
from calm_dist.recipe import Checkpoint
from calm_dist.runs.checkpoints import directory as directories_of
from calm_dist.runs.checkpoints.directory import (
    CHECKPOINTS,
    LATEST,
    MANIFEST,
    step_directories,
)
from calm_dist.runs.checkpoints.run_state import RunState
from calm_dist.runs.run_progress import RunProgress

_log = logging.getLogger(__name__)

DIVERGED = ".diverged"
"""Suffix of checkpoints that no finite step followed, after their run has given up."""
TRIED = "tried"
"""File naming the checkpoint that a run without a proven one tries once more."""
PROVEN = "proven"
"""File naming the checkpoint that a run went back to, which a step had proven before."""


def commit(
    temporary: Path, keep: int, keep_every: int | None = None, updates: int | None = None
) -> Path:
    """Make a written directory a checkpoint, and remove old checkpoints.

    Args:
        keep: number of newest checkpoints to keep.
        keep_every: also keep checkpoints of steps that are multiples of this.
        updates: updates that the optimizers have made since the run began, including those after
            the checkpoint; None: the checkpoint's own number.
    """
    final = directories_of.publish(temporary)
    run_dir = final.parent.parent
    try:
        replace_text(final.parent / LATEST, final.name + "\n")
        # Later steps, reached before the run went back to an older checkpoint.
        later = step_directories(run_dir)
        directories_of.set_aside(later[: later.index(final)])
        if updates is None:
            state = RunState.read_if_whole(final)
            updates = 0 if state is None else state.adam_steps
        make_room(run_dir, keep, keep_every, updates)
    except OSError as error:
        # The new checkpoint exists, whatever happens to the others.
        _warn(run_dir, error)
    return final


def make_room(run_dir: Path, keep: int, keep_every: int | None, updates: int) -> None:
    """Remove the checkpoints that neither `commit`'s arguments nor the module's rule keep."""
    found = step_directories(run_dir)
    stay = _staying(found, keep, updates)
    for old in found:
        step = directories_of.step_of(old)
        if old in stay or (keep_every is not None and step is not None and step % keep_every == 0):
            continue
        # The rename removes it as a checkpoint at once; a thread deletes its many bytes.
        gone = old.with_suffix(".tmp")
        directories_of.remove(gone)
        os.replace(old, gone)
        threading.Thread(target=shutil.rmtree, args=(gone, True), name="remove").start()


def _staying(found: Sequence[Path], keep: int, updates: int) -> set[Path]:
    """The checkpoints of ``found``, newest first, to keep besides multiples of ``keep_every``."""
    states = {directory: RunState.read_if_whole(directory) for directory in found}
    # Skipped steps change no weights: of these, only the newest is needed, for the run's progress.
    skipping = [
        d for d, s in states.items() if s and s.skipped_in_a_row and s.adam_steps >= updates
    ]
    others = [d for d in found if d not in skipping]
    proven = [d for d in others if (s := states[d]) is not None and s.adam_steps < updates]
    return {*skipping[:1], *others[:keep], *proven[:1]}


class Rotation:
    """`commit` for a run; keeps track of which checkpoints are proven during training.

    Only on rank 0; `commit` may run in a thread concurrently with `step_taken`.
    """

    def __init__(self, run_dir: Path, settings: Checkpoint) -> None:
        self._run_dir, self._settings = run_dir, settings
        self._updates = 0
        self._unproven: int | None = None
        self._lock = threading.Lock()

    def commit(self, temporary: Path) -> None:
        """See the module's `commit`."""
        with self._lock:
            keep, every = self._settings.keep, self._settings.keep_every
            state = RunState.read_if_whole(temporary)
            self._updates = max(self._updates, state.adam_steps if state is not None else 0)
            commit(temporary, keep, every, self._updates)
            self._unproven = state.adam_steps if state is not None else None

    def step_taken(self, updates: int) -> None:
        """Call after each step: once the newest checkpoint is proven, remove those it replaces."""
        self._updates = updates
        if self._unproven is None or updates <= self._unproven:
            return
        # If the next one is being committed, try again after the next step.
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._unproven = None
            make_room(self._run_dir, self._settings.keep, self._settings.keep_every, updates)
        except OSError as error:
            _warn(self._run_dir, error)
        finally:
            self._lock.release()


def go_back(run_dir: Path, progress: RunProgress) -> str:
    """Set aside, as ``.diverged``, the checkpoints that no finite step followed, if there is a
    proven one to go back to; nothing is removed.

    Returns:
        Advice for the user: where the next start continues from, and what to do before it.
    """
    found = step_directories(run_dir)
    remedy = _remedy(run_dir, progress)
    if not found:
        return f"There is no checkpoint: the next start begins with the first step. {remedy}"
    good = _newest_proven(found, progress.adam_steps)
    if good is None:
        return f"{_without_proven(run_dir, found)} {remedy}"
    position = found.index(good)
    set_aside = ""
    if doubtful := found[:position]:
        directories_of.set_aside(doubtful, DIVERGED)
        checkpoints = run_dir / CHECKPOINTS
        replace_text(checkpoints / PROVEN, f"{_identity(good)}\n")
        replace_text(checkpoints / LATEST, good.name + "\n")
        names = ", ".join(directory.name + DIVERGED for directory in doubtful)
        set_aside = f"No finite step followed the newest checkpoints, now named {names}. "
    advice = f"{set_aside}The next start continues from {good}. {remedy}"
    state = RunState.read_if_whole(good)
    if state is not None and state.adam_steps >= progress.adam_steps:
        # This start began from that checkpoint and has made no update.
        older = found[position + 1].name if position + 1 < len(found) else "the first step"
        advice += (
            " If its first steps are skipped again, its weights are damaged: move it away to "
            f"continue from {older}."
        )
    return advice


def _without_proven(run_dir: Path, found: list[Path]) -> str:
    """Set aside the checkpoints of skipped steps. The one before them, whose weights may be good,
    is tried once more and then also set aside.

    Returns:
        Advice for the user: where the next start begins.
    """
    checkpoints = run_dir / CHECKPOINTS
    state = RunState.read_if_whole(found[-1])
    sound = [d for d in found if (s := RunState.read_if_whole(d)) is None or not s.skipped_in_a_row]
    start = sound[0] if sound else None
    with suppress(FileNotFoundError):
        if start and (checkpoints / TRIED).read_text(encoding="utf-8").strip() == _identity(start):
            start = None
    doubtful = [d for d in found if start is None or d not in sound]
    directories_of.set_aside(doubtful, DIVERGED)
    text = f"No finite step followed {found[-1]}, the oldest checkpoint."
    if doubtful:
        text += f" Set aside as {', '.join(d.name + DIVERGED for d in doubtful)}."
    if start is None:
        (checkpoints / LATEST).unlink(missing_ok=True)
        text += " The next start begins with the first step."
    else:
        replace_text(checkpoints / TRIED, f"{_identity(start)}\n")
        replace_text(checkpoints / LATEST, start.name + "\n")
        text += (
            f" The next start tries {start} once more, and the one after it begins with the first "
            "step."
        )
    if state is not None and state.continued_from is not None:
        text += (
            f" The weights come from {state.continued_from}: if none of its steps is finite, give "
            "run.continue_from an older checkpoint."
        )
    return text


def _newest_proven(found: Sequence[Path], updates: int) -> Path | None:
    """The newest of ``found`` that was followed by an update, in this start or in an earlier one
    that went back to it."""
    known = [state.adam_steps for d in found if (state := RunState.read_if_whole(d)) is not None]
    updates = max([updates, *known])
    gone_back_to = None
    with suppress(FileNotFoundError):
        gone_back_to = (found[0].parent / PROVEN).read_text(encoding="utf-8").strip()
    for directory in found:
        state = RunState.read_if_whole(directory)
        if state is not None and state.adam_steps < updates:
            return directory
        if gone_back_to is not None and _identity(directory) == gone_back_to:
            return directory
    return None


def _identity(directory: Path) -> str | None:
    """Distinguishes a checkpoint from another one of the same step; None if it is damaged."""
    with suppress(DataError):
        return f"{directory.name} {file_sha256(directory / MANIFEST)}"
    return None


def _remedy(run_dir: Path, progress: RunProgress) -> str:
    first = progress.step - progress.skipped_in_a_row + 1
    return (
        f"Before the next start, lower training.learning_rate. If instead the data of steps "
        f"{first} to {progress.step} is bad, raise health.max_skipped_steps so that they are "
        f"skipped, or train on other data in another run.dir with run.continue_from={run_dir}."
    )


def doubt(run_dir: Path, progress: RunProgress) -> str | None:
    """A warning for a run that ends while it skips steps; None if it does not."""
    if not progress.skipped_in_a_row:
        return None
    found = step_directories(run_dir)
    good = _newest_proven(found, progress.adam_steps) if found else None
    text = (
        f"the last {progress.skipped_in_a_row} steps up to step {progress.step} were "
        "skipped because loss or gradient was not finite; the weights may be damaged"
    )
    if good is None:
        return f"{text}, and no older checkpoint is known to be good"
    return (
        f"{text}. {good} is the newest checkpoint that a finite step followed: to go back to "
        "it, move the newer ones away and start again with a lower training.learning_rate"
    )


def _warn(run_dir: Path, error: OSError) -> None:
    _log.warning(f"{run_dir / CHECKPOINTS}: old checkpoints cannot be moved or removed ({error})")
