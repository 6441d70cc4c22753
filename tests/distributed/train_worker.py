"""Several trainings, one after the other, in the ranks of one launch (imports cost most of it).

Usage: train_worker.py JOBS.json, a list of {"recipe": path, "overrides": [...]} and optionally
"poisoned": a step whose batch holds a NaN on the last rank, or "omitted": a step that is not taken.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from world import joined_world

from calm_dist.cli.console import run


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with joined_world() as (world, device):
        for job in jobs:
            train(job, world, device)
            # Gloo keeps the threads of every group that something still refers to.
            gc.collect()


def train(job: dict[str, Any], world: Any, device: Any) -> None:
    """What tools/train.py does, in ranks that are connected already."""
    from calm_dist.parallel.rank_zero import on_rank_zero
    from calm_dist.parallel.topology import build_topology, destroy_topology
    from calm_dist.recipe import LanguageModelRecipe, load_recipe
    from calm_dist.runs.directory import release_lock
    from calm_dist.training.language_model import Trainer
    from calm_dist.training.resolve import resolve
    from calm_dist.training.session import prepare_run_directory, record_start

    recipe = resolve(load_recipe(job["recipe"], job["overrides"]).with_world_size(world.size))
    assert isinstance(recipe, LanguageModelRecipe)
    Path(recipe.run.dir).mkdir(parents=True, exist_ok=True)
    lock = on_rank_zero(partial(prepare_run_directory, recipe))
    topology = build_topology(recipe, device)
    begin = partial(on_rank_zero, partial(record_start, recipe, world))
    trainer = Trainer(recipe, topology, begin=begin)
    disturb(trainer, job)
    with reduced_elements(topology.head_group) as reduced:
        trainer.run()
    check_state(trainer)
    check_reductions(trainer, sum(reduced))
    if trainer.parts.head is not None:
        trainer.parts.head.close()
    destroy_topology(topology)
    if world.rank == 0:
        release_lock(lock)


@contextmanager
def reduced_elements(group: Any) -> Iterator[list[int]]:
    """Sizes of the tensors that are summed over a group's ranks."""
    import torch.distributed as dist

    sizes, all_reduce = [], dist.all_reduce

    def counted(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("group") is group:
            sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        yield sizes
    finally:
        dist.all_reduce = all_reduce


def check_reductions(trainer: Any, elements: int) -> None:
    """ZeRO-1 and 2 reduce the head's gradient once a step, however many micro-batches it has."""
    head, stage = trainer.parts.head, trainer.recipe.parallel.zero_stage
    if head is None or stage == 3 or len(trainer.topology.head_ranks) == 1:
        return
    parameters = sum(p.numel() for p in head.module.parameters())
    made = elements / parameters / trainer.steps_taken
    assert 1 <= made < 1.1, f"{made:.2f} reductions of the head's gradient a step"


def disturb(trainer: Any, job: dict[str, Any]) -> None:
    """Make one step of a CALM run a step that has to be skipped, or leave it out altogether."""
    from calm_dist.training.engine import StepResult

    take_step, topology = trainer.train_step, trainer.topology

    trainer.steps_taken = 0

    def train_step(batch: dict[str, Any]) -> StepResult:
        if trainer.progress.step == job.get("omitted"):
            trainer._batches.read()
            nan = float("nan")
            return StepResult(nan, nan, 0.0, skipped=True, stop=False, data_failed=False)
        if (
            trainer.progress.step == job.get("poisoned")
            and topology.rank == topology.world_size - 1
        ):
            # A position of the last quarter, which is the last rank's in every layout.
            batch = {**batch, "mean": batch["mean"].clone()}
            batch["mean"][0, -2, 0] = float("nan")
        trainer.steps_taken += 1
        return take_step(batch)

    trainer.train_step = train_step


def check_state(trainer: Any) -> None:
    """Every optimizer counts the updates that were made, and ZeRO-3 has partitioned the head."""
    parts, made = trainer.parts, trainer.progress.adam_steps
    optimizers = [part.optimizer for part in parts.optimizer.chained_optimizers]
    if parts.head is not None:
        optimizers.append(parts.head._zero.optimizer)
    for optimizer in optimizers:
        assert {int(moments["step"]) for moments in optimizer.state.values()} <= {made}
    assert any(optimizer.state for optimizer in optimizers)
    if parts.head is not None and trainer.recipe.parallel.zero_stage == 3:
        matrices = [p for p in parts.head.module.parameters() if len(p.ds_shape) > 1]
        assert matrices and not any(p.numel() for p in matrices)


if __name__ == "__main__":
    run(main)
