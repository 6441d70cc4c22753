"""Several trainings, one after the other, in the ranks of one launch (imports cost most of it).

Usage: train_worker.py JOBS.json, a list of {"recipe": path, "overrides": [...]}.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

from calm_dist.cli import run


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))

    import torch.distributed as dist

    from calm_dist.parallel.launch import join_world, read_world, select_device
    from calm_dist.parallel.rank_zero import on_rank_zero
    from calm_dist.recipe import load_recipe
    from calm_dist.training.resolve import resolve
    from calm_dist.training.run import train_in_world
    from calm_dist.training.session import prepare_run_directory

    world = read_world()
    world.export()
    device = select_device(world, "auto")
    join_world(world, device, timeout_seconds=120.0)
    for job in jobs:
        recipe = load_recipe(job["recipe"], job["overrides"]).with_world_size(world.size)
        recipe = resolve(recipe)
        Path(recipe.run.dir).mkdir(parents=True, exist_ok=True)
        on_rank_zero(partial(prepare_run_directory, recipe, world))
        train_in_world(recipe, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
