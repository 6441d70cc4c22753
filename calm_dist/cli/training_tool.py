"""The command line that both training tools share."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from calm_dist.cli.console import add_json, write_json
from calm_dist.errors import RecipeError, UserError
from calm_dist.log import outlive_console
from calm_dist.parallel.processes import die_with_launcher
from calm_dist.recipe import Recipe, load_recipe


def run_training_tool(description: str | None, train: Callable[[Recipe], None]) -> None:
    """Parse ``RECIPE [key=value ...] [--dry-run]`` and train, or show the plan of the training.

    Args:
        description: the tool's docstring.
        train: called with the recipe; it imports what it needs, so that --help and --dry-run
            work without torch.

    Raises:
        UserError: recipe, overrides or launch are wrong.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="recipe file, see recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="training.steps=20 …")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print sizes, memory, layout and balance without training",
    )
    add_json(parser, "with --dry-run: write the plan as JSON to F, or to stdout for -")
    # The deepspeed launcher adds it; the environment holds the same value.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    if arguments.json and not arguments.dry_run:
        raise UserError(
            "--json: needs --dry-run; a training writes its metrics to metrics.jsonl in run.dir"
        )
    if not arguments.dry_run:
        outlive_console()
        die_with_launcher()
        train(_recipe_for_launch(arguments.recipe, arguments.overrides))
        return

    from calm_dist.planner.dry_run import format_plan, plan
    from calm_dist.training.resolve import resolve

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    values = plan(resolve(recipe, missing_stores=True))
    if arguments.json != "-":
        print(format_plan(values))
    if arguments.json:
        write_json(values, arguments.json)


def _recipe_for_launch(path: str, overrides: list[str]) -> Recipe:
    """Load the recipe, even if it fits only the launched number of processes, not the planned."""
    from calm_dist.parallel.launch import read_world

    try:
        return load_recipe(path, overrides)
    except RecipeError:
        return load_recipe(path, [*overrides, f"parallel.world_size={read_world().size}"])
