#!/usr/bin/env python
"""Train the autoencoder that packs K tokens into one latent.

    python tools/train_autoencoder.py recipes/autoencoder_tiny.yaml training.steps=200
    torchrun --nproc_per_node 8 tools/train_autoencoder.py recipes/autoencoder.yaml

Starting the same command again goes on from the newest valid checkpoint of run.dir.
"""

from __future__ import annotations

import argparse

from calm_dist.cli import run, write_json
from calm_dist.recipe import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="recipe file, see recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="training.steps=200 …")
    parser.add_argument(
        "--dry-run", action="store_true", help="print sizes, memory and layout; no run"
    )
    parser.add_argument("--json", metavar="F", help="with --dry-run: write it as JSON (- = stdout)")
    # The deepspeed launcher adds it; the environment says the same.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.dry_run:
        from calm_dist.reports.plan import format_plan, plan
        from calm_dist.training.resolve import resolve

        values = plan(resolve(recipe, missing_stores=True))
        if arguments.json:
            write_json(values, arguments.json)
        if arguments.json != "-":
            print(format_plan(values))
        return
    from calm_dist.training.autoencoder import train_autoencoder

    train_autoencoder(recipe)


if __name__ == "__main__":
    run(main)
