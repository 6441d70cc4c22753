"""Several trainings in the ranks of one launch, each with a fault of `fault_worker`.

Usage: jobs_worker.py RECIPE JOBS.json, a list of {"overrides": [...], "fault": {...}}. Each rank
writes how a training ended into RUN_DIR/end_RANK; the error of the last one ends the process.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path

import fault_worker

from calm_dist.cli import run


def main() -> None:
    jobs = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))

    import torch.distributed as dist

    from calm_dist.errors import DataError, TrainingDivergedError
    from calm_dist.parallel.launch import join_world, read_world, select_device
    from calm_dist.parallel.rank_zero import on_rank_zero
    from calm_dist.parallel.topology import destroy_topology
    from calm_dist.recipe import load_recipe
    from calm_dist.training import optimizer
    from calm_dist.training.loop import Trainer
    from calm_dist.training.resolve import resolve
    from calm_dist.training.run import train_in_world
    from calm_dist.training.session import prepare_run_directory

    world = read_world()
    world.export()
    device = select_device(world, "cpu")
    join_world(world, device, timeout_seconds=300.0)
    whole, math, clock = Trainer.train_step, optimizer.math, time.time
    for number, job in enumerate(jobs):
        recipe = resolve(load_recipe(sys.argv[1], job["overrides"]).with_world_size(world.size))
        run_dir = Path(recipe.run.dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        on_rank_zero(partial(prepare_run_directory, recipe, world))
        fault = dict(job["fault"])
        kind, rank = fault.pop("kind"), fault.pop("rank")
        if rank in (-1, world.rank):
            getattr(fault_worker, kind)(**fault)
        end = "done"
        try:
            train_in_world(recipe, device)
        except (DataError, TrainingDivergedError) as error:
            end = str(error)
            if number == len(jobs) - 1:
                raise
            destroy_topology()
        finally:
            Trainer.train_step, optimizer.math = whole, math  # type: ignore[method-assign]
            time.time = clock
            (run_dir / f"end_{world.rank}").write_text(end, encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
