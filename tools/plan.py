#!/usr/bin/env python
"""Predict memory, time and cost of a recipe on a cluster, and find its best layout.

    python tools/plan.py recipes/calm_xl.yaml --gpu h100-sxm --nodes 16
    python tools/plan.py recipes/calm_m.yaml training.global_batch_size=512 --price 2.5
    python tools/plan.py recipes/calm_tiny.yaml --gpu local
    python tools/plan.py --scaling docs/scaling.svg --json scaling.json
    python tools/plan.py --published

Nothing is started and no data is needed. Rates are assumptions (docs/planner.md), which the options
below replace. The plan says whether the layout fits; the exit code is 0 if a plan was made.
"""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from calm_dist.cli.console import add_json, at_least, between, image_file, run, write_json
from calm_dist.errors import RecipeError, UserError

if TYPE_CHECKING:
    from calm_dist.costs.clusters import Cluster
    from calm_dist.planner.storage import Reliability
    from calm_dist.recipe import LanguageModelRecipe

DEFAULT_GPU = "h100-sxm"


def main() -> None:
    arguments = _parser().parse_intermixed_args()
    if arguments.scaling is not None or arguments.published:
        _refuse_ignored(arguments)
        _without_recipe(arguments)
        return
    if arguments.recipe is None:
        raise UserError("RECIPE: missing; give a recipe file, see recipes/")

    from calm_dist.planner.full_plan import format_full_plan, full_plan

    recipe, cluster, gpus = _recipe_and_cluster(arguments)
    values = full_plan(recipe, cluster, _reliability(arguments), gpus)
    _output(arguments, values, format_full_plan(values))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("recipe", nargs="?", help="recipe file, see recipes/")
    add("overrides", nargs="*", metavar="key=value", help="training.steps=20 …")
    add(
        "--gpu",
        metavar="NAME",
        help="a100-sxm-80, h100-sxm (default), h200-sxm, b200, or local: measure this machine",
    )
    add("--nodes", type=at_least(1), metavar="N", help="default: from the recipe's world_size")
    add("--gpus-per-node", type=at_least(1), metavar="N", help="default: 8; local: all processes")
    # Beyond these limits, results would be infinite.
    positive = between(1e-12, 1e18)
    add("--price", type=positive, metavar="X", help="price of a GPU-hour, in any currency")
    add_json(parser, "write every term as JSON to F, or to stdout (no text) for -")
    add(
        "--scaling",
        type=image_file,
        metavar="F",
        help="plot two models on 8 to 16,384 GPUs to F (.svg, .png)",
    )
    add("--published", action="store_true", help="compare with published runs of other models")
    rates = parser.add_argument_group("assumptions, see docs/planner.md")
    for option, what in (
        ("--matmul-fraction", "fraction of peak in matrix products"),
        ("--attention-fraction", "fraction of peak in attention"),
        ("--bandwidth-fraction", "fraction of memory bandwidth in element-wise kernels"),
        ("--link-fraction", "fraction of link bandwidth in collectives"),
    ):
        rates.add_argument(option, type=between(1e-6, 1), metavar="X", help=what)
    for option, what in (
        ("--node-mtbf-hours", "mean hours between failures of one node"),
        ("--restart-seconds", "time lost at each failure, in addition to lost work"),
        ("--write-bandwidth", "bytes/s to the file system, per node"),
        ("--write-bandwidth-limit", "bytes/s to the file system, all nodes together"),
    ):
        rates.add_argument(option, type=positive, metavar="X", help=what)
    return parser


def _refuse_ignored(arguments: argparse.Namespace) -> None:
    """Refuse options that a comparison or a simulation would ignore."""
    mode = "published" if arguments.published else "scaling"
    ignored = {"recipe", "overrides", "nodes", "gpus_per_node"}
    if mode == "published":
        ignored = vars(arguments).keys() - {"published", "json"}
    for name, value in vars(arguments).items():
        if name in ignored and value not in (None, []):
            option = value if name == "recipe" else f"--{name.replace('_', '-')}"
            raise UserError(f"{option}: --{mode} does not use it; leave it out")


def _recipe_and_cluster(arguments: argparse.Namespace) -> tuple[LanguageModelRecipe, Cluster, int]:
    """The recipe as it is, the cluster, and its number of GPUs."""
    from calm_dist.costs.clusters import preset

    per_node, nodes = arguments.gpus_per_node, arguments.nodes
    if arguments.gpu == "local":
        if nodes not in (None, 1):
            raise UserError(f"--nodes {nodes}: --gpu local measures one machine; leave it out")
        from calm_dist.planner.local import local_cluster

        recipe, gpus = _recipe_and_gpus(arguments, per_node)
        cluster = local_cluster(gpus)
    else:
        cluster = replace(preset(arguments.gpu or DEFAULT_GPU), gpus_per_node=per_node or 8)
        recipe, gpus = _recipe_and_gpus(arguments, nodes and nodes * (per_node or 8))
    given = _given(arguments, cluster.rates)
    return recipe, replace(cluster.with_rates(**given), price=arguments.price), gpus


def _recipe_and_gpus(
    arguments: argparse.Namespace, gpus: int | None
) -> tuple[LanguageModelRecipe, int]:
    """The recipe, and the number of GPUs from the options or else from the recipe."""
    from calm_dist.recipe import LanguageModelRecipe, load_recipe
    from calm_dist.training.resolve import resolve

    def load(*more: str) -> LanguageModelRecipe:
        recipe = load_recipe(arguments.recipe, [*arguments.overrides, *more])
        if not isinstance(recipe, LanguageModelRecipe):
            raise UserError(
                "model.kind: autoencoder; the planner knows language models; an autoencoder has "
                "one layout, see tools/train_autoencoder.py --dry-run"
            )
        return resolve(recipe, missing_stores=True)

    if gpus is None:
        recipe = load()
        return recipe, recipe.world_size
    size = "parallel.world_size="
    for override in arguments.overrides:
        if override.startswith(size) and override != f"{size}{gpus}":
            raise UserError(
                f"{override}: contradicts the options, which give {gpus} GPUs; omit one"
            )
    try:
        return load(f"{size}{gpus}"), gpus
    except RecipeError as error:
        try:
            # The plan reports a layout that does not divide the GPUs, and lists those that do.
            return load(), gpus
        except RecipeError:
            raise error from None


def _reliability(arguments: argparse.Namespace) -> Reliability:
    from calm_dist.planner.storage import Reliability

    return replace(Reliability(), **_given(arguments, Reliability()))


def _given(arguments: argparse.Namespace, settings: Any) -> dict[str, float]:
    """The options that replace a field of ``settings``."""
    names = [field.name for field in fields(settings)]
    values = {name: getattr(arguments, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _without_recipe(arguments: argparse.Namespace) -> None:
    if arguments.published:
        from calm_dist.planner.published import compare_with_published, format_published

        rows = compare_with_published()
        _output(arguments, rows, format_published(rows))
        return

    from calm_dist.costs.clusters import preset
    from calm_dist.planner.scaling import format_scaling, plot_scaling, scaling

    if arguments.gpu == "local":
        raise UserError("--gpu local: --scaling needs a kind of GPU, see --help")
    cluster = preset(arguments.gpu or DEFAULT_GPU)
    cluster = replace(cluster.with_rates(**_given(arguments, cluster.rates)), price=arguments.price)
    values = scaling(cluster, _reliability(arguments))
    _output(arguments, values, format_scaling(values))
    plot_scaling(values, arguments.scaling)


def _output(arguments: argparse.Namespace, values: Any, text: str) -> None:
    if arguments.json != "-":
        print(text)
    if arguments.json:
        write_json(values, arguments.json)


if __name__ == "__main__":
    run(main)
