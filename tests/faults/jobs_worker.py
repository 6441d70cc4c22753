"""Several trainings in the ranks of one launch, each with a fault of `fault_worker`.

Usage: jobs_worker.py JOBS.json, a list of {"recipe": path, "overrides": [...], "fault": {...}}.
Each rank writes exit code and message of a training into RUN_DIR/end_RANK, and ends with the code
of the last one.
"""

from __future__ import annotations

import json
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import fault_worker

from calm_dist.cli.console import run


def main() -> int:
    jobs = json.loads(Path(sys.argv[-1]).read_text(encoding="utf-8"))

    import torch.distributed as dist

    from calm_dist.data import guard
    from calm_dist.parallel.launch import join_world, read_world, select_device
    from calm_dist.parallel.rank_zero import on_rank_zero
    from calm_dist.recipe import load_recipe
    from calm_dist.training import autoencoder, language_model, optimizer
    from calm_dist.training.resolve import resolve
    from calm_dist.training.session import prepare_run_directory, record_start

    world = read_world()
    world.export()
    device = select_device(world, "cpu")
    join_world(world, device, timeout_seconds=300.0)
    trainers: list[Any] = [language_model.Trainer, autoencoder.AutoencoderTrainer]
    steps = [trainer.train_step for trainer in trainers]
    clock, check_on_open = time.time, guard.CHECK_ON_OPEN_BYTES
    code = 0
    for job in jobs:
        recipe = resolve(load_recipe(job["recipe"], job["overrides"]).with_world_size(world.size))
        run_dir = Path(recipe.run.dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        on_rank_zero(partial(prepare_run_directory, recipe))
        on_rank_zero(partial(record_start, recipe, world))
        fault = dict(job["fault"])
        kind, rank = fault.pop("kind"), fault.pop("rank")
        if rank in (-1, world.rank):
            getattr(fault_worker, kind)(**fault)
        code, message = train(recipe, device)
        for trainer, step in zip(trainers, steps, strict=True):
            trainer.train_step = step
        autoencoder.math = optimizer.math = math
        time.time, guard.CHECK_ON_OPEN_BYTES = clock, check_on_open
        (run_dir / f"end_{world.rank}").write_text(f"{code}: {message}", encoding="utf-8")
    dist.destroy_process_group()
    return code


def train(recipe: Any, device: Any) -> tuple[int, str]:
    """Train as the tools do; exit code and message."""
    from calm_dist.parallel.topology import destroy_topology
    from calm_dist.training.autoencoder import AutoencoderTrainer
    from calm_dist.training.run import train_in_world

    message = "done"

    def work() -> None:
        nonlocal message
        try:
            if recipe.model.kind == "autoencoder":
                AutoencoderTrainer(recipe, device).run()
            else:
                train_in_world(recipe, device)
        except Exception as error:
            message = str(error)
            if recipe.model.kind != "autoencoder":
                destroy_topology()
            raise

    try:
        run(work)
    except SystemExit as end:
        return int(end.code or 0), message
    raise AssertionError("it exits")


if __name__ == "__main__":
    run(main)
