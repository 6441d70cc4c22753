"""What a start looks at: the checkpoint that it goes on from, and room for the next one."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import torch.distributed as dist

from calm_dist import flops
from calm_dist.errors import CheckpointError
from calm_dist.parallel.rank_zero import on_rank_zero
from calm_dist.recipe import Recipe
from calm_dist.training import checkpoint


def newest_valid_for_all(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, each rank reading its share of the files.

    Says on stderr why newer ones are passed over, renames those ``.damaged``, and removes what
    killed runs left half-written. A collective of the world.

    Raises:
        CheckpointError: there are checkpoints, and none is whole; on every rank.
    """

    def candidates() -> list[Path]:
        (run_dir / checkpoint.CHECKPOINTS).mkdir(exist_ok=True)
        checkpoint.clean(run_dir)
        return checkpoint.step_directories(run_dir)

    rank, size = dist.get_rank(), dist.get_world_size()
    passed_over: list[Path] = []
    for directory in on_rank_zero(candidates):
        problem = None
        try:
            checkpoint.verify(directory, rank, size)
        except Exception as error:  # damage has no end of forms, and none may end a restart
            problem = str(error) or type(error).__name__
        problems: list[str | None] = [None] * size
        dist.all_gather_object(problems, problem)
        found = [text for text in problems if text is not None]
        if not found:
            on_rank_zero(partial(checkpoint.set_aside, passed_over))
            return directory
        passed_over.append(directory)
        if rank == 0:
            checkpoint.pass_over(found[0])
    if passed_over:
        refusal = CheckpointError(
            f"{run_dir / checkpoint.CHECKPOINTS}: none of {len(passed_over)} checkpoints is whole, "
            "see above; mend them, or remove them to start from the beginning"
        )
        refusal.reported = True  # type: ignore[attr-defined]
        raise refusal
    return None


def room(recipe: Recipe) -> int:
    """Free bytes in the run directory, as this process sees it.

    Raises:
        CheckpointError: too few for even one checkpoint.
    """
    # Weights and Adam's moments in fp32, and a bf16 body's own weights.
    per_parameter = 12 if recipe.precision == "fp32" else 14
    needed = per_parameter * flops.count(recipe, tokens=0).parameters
    free = shutil.disk_usage(recipe.run.dir).free
    if free < needed:
        raise CheckpointError(
            f"run.dir: {recipe.run.dir} has {free / 1e9:.1f} GB free, a checkpoint takes "
            f"about {needed / 1e9:.1f} GB; make room, or use another run.dir"
        )
    return free


def check_room(recipe: Recipe) -> None:
    """Look at the disk before the training starts; a collective of the world.

    Raises:
        CheckpointError: there is no `room` for even one checkpoint, on every rank.
    """
    on_rank_zero(lambda: room(recipe))
