"""Checks at a start: the checkpoint to continue from, and disk space for the next one."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch.distributed as dist

from calm_dist.costs import flops
from calm_dist.errors import CheckpointError
from calm_dist.parallel.rank_zero import on_rank_zero
from calm_dist.recipe import Recipe
from calm_dist.runs import checkpoints
from calm_dist.runs.checkpoints.run_state import RunState


def newest_valid_for_all(run_dir: Path) -> Path | None:
    """The newest intact checkpoint of a run; each rank reads its share of the files.

    Logs why newer ones are passed over, but changes nothing, since the start may still be refused.
    A collective of the world.

    Raises:
        CheckpointError: there are checkpoints, but none is intact; on every rank.
    """
    directory, passed_over = _first_whole(
        on_rank_zero(lambda: checkpoints.step_directories(run_dir))
    )
    if directory is None and passed_over:
        refusal = CheckpointError(
            f"{run_dir / checkpoints.CHECKPOINTS}: none of {passed_over} checkpoints is intact, "
            "see above; repair them, or remove them to start from the beginning"
        )
        refusal.reported = True  # type: ignore[attr-defined]
        raise refusal
    return directory


def source_for_all(path: str, name: str = "run.continue_from") -> Path:
    """The checkpoint that a field of the recipe stands for: itself, or the newest intact one of a
    run; nothing is changed there. A collective of the world.

    Raises:
        CheckpointError: there is none; on every rank.
    """
    found = on_rank_zero(lambda: checkpoints.candidates(path, name))
    directory, passed_over = _first_whole(found)
    if directory is None:
        refusal = CheckpointError(
            f"{name}: {path}: none of {passed_over} checkpoints is intact, see above; give another"
        )
        refusal.reported = True  # type: ignore[attr-defined]
        raise refusal
    if dist.get_rank() == 0:
        checkpoints.say_what_is_used(directory, found)
    return directory


def taken_over(directory: Path, state: RunState) -> str:
    """The log line of a run that begins with another one's weights and optimizer state."""
    return (
        f"continuing from {directory} (step {state.step}) with its weights, optimizer state "
        f"and count of {state.adam_steps} updates; data, step counter and learning-rate schedule "
        "start from the beginning"
    )


def _first_whole(candidates: list[Path]) -> tuple[Path | None, int]:
    """The first intact checkpoint, and the number of those passed over before it; each rank reads
    its share of the files."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for number, directory in enumerate(candidates):
        problem = None
        try:
            checkpoints.verify(directory, rank, size)
        except Exception as error:  # damage may raise anything, and must not end a restart
            problem = str(error) or type(error).__name__
        problems: list[str | None] = [None] * size
        dist.all_gather_object(problems, problem)
        found = [text for text in problems if text is not None]
        if not found:
            return directory, number
        if rank == 0:
            checkpoints.pass_over(found[0])
    return None, len(candidates)


def tidy(run_dir: Path, start: Path | None) -> None:
    """Once a training really starts, remove half-written checkpoints of killed runs, and rename
    those passed over before ``start`` to ``.damaged``; a collective of the world."""

    def work() -> None:
        (run_dir / checkpoints.CHECKPOINTS).mkdir(exist_ok=True)
        checkpoints.clean(run_dir)
        found = checkpoints.step_directories(run_dir)
        checkpoints.set_aside(found[: found.index(start)] if start is not None else [])

    on_rank_zero(work)


def free_space(recipe: Recipe) -> int:
    """Free bytes in the run directory, as this process sees it.

    Raises:
        CheckpointError: too few for even one checkpoint.
    """
    # Weights and optimizer state in fp32, and a bf16 backbone's own weights.
    weights = 4 if recipe.precision == "fp32" else 6
    per_parameter = weights + recipe.training.optimizer_spec.state_bytes
    needed = per_parameter * flops.count(recipe, tokens=0).parameters
    # Half-written checkpoints of killed runs are removed before the first step.
    left = Path(recipe.run.dir).glob(f"{checkpoints.CHECKPOINTS}/step_*.tmp/**/*")
    free = shutil.disk_usage(recipe.run.dir).free + sum(f.stat().st_size for f in left)
    if free < needed:
        raise CheckpointError(
            f"run.dir: {recipe.run.dir} has {free / 1e9:.1f} GB free, a checkpoint takes "
            f"about {needed / 1e9:.1f} GB; make room, or use another run.dir"
        )
    return free


def check_checkpoint_room(recipe: Recipe) -> None:
    """Check the free disk space before the training starts; a collective of the world.

    Raises:
        CheckpointError: there is no room for even one checkpoint; on every rank.
    """
    on_rank_zero(lambda: free_space(recipe))
