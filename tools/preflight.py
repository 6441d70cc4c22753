#!/usr/bin/env python
"""Check everything that a training needs before it starts; slurm/launch.sh runs this first.

    python tools/preflight.py recipes/calm_m.yaml parallel.world_size=8
    srun --ntasks-per-node=1 python tools/preflight.py recipes/calm_m.yaml --node

The first command checks recipe, data and autoencoder, and prints the run directory. The second
checks each node of a job: GPUs and their memory, the compiler that their kernels need, disk, data,
and a short all-reduce over all nodes.
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
    parser.add_argument("--node", action="store_true", help="check this node")
    parser.add_argument(
        "--timeout",
        type=at_least(1),
        default=180,
        metavar="SECONDS",
        help="how long to wait for the other nodes (default 180)",
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
