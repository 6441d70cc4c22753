#!/usr/bin/env python
"""Look at everything that a training needs before it starts; what slurm/launch.sh runs first.

    python tools/preflight.py recipes/calm_m.yaml parallel.world_size=8
    srun --ntasks-per-node=1 python tools/preflight.py recipes/calm_m.yaml --node

The first looks at recipe, data and autoencoder, and prints the run directory. The second looks at
each node of a job: GPUs and their memory, disk, data, and a short all-reduce over all nodes.
"""

from __future__ import annotations

import argparse
import os

from calm_dist.cli.console import at_least, run
from calm_dist.files import on_one_line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="recipe file, see recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="training.steps=20 …")
    parser.add_argument("--node", action="store_true", help="look at this node, too")
    parser.add_argument(
        "--timeout",
        type=at_least(1),
        default=180,
        metavar="SECONDS",
        help="for the other nodes to come (default 180)",
    )
    arguments = parser.parse_intermixed_args()

    from calm_dist.recipe import load_recipe
    from calm_dist.training.resolve import resolve

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if not arguments.node:
        resolve(recipe)
        print(on_one_line(os.path.abspath(recipe.run.dir)))
        return

    from calm_dist.parallel.launch import read_world
    from calm_dist.training.preflight import check_node

    print(f"preflight: {check_node(recipe, read_world(), arguments.timeout)}", flush=True)


if __name__ == "__main__":
    run(main)
