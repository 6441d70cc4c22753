#!/usr/bin/env python
"""Rehearse a training on GPUs that need not be there: its memory, kernels, waits, collectives.

    python tools/rehearse.py recipes/calm_m.yaml
    python tools/rehearse.py recipes/calm_xl.yaml --world 128 --rank 0,3 --gpu h100-sxm
    python tools/rehearse.py recipes/calm_m.yaml training.micro_batch_size=8 --json rehearsal.json

The trainer's own code takes three small steps of each rank on fake tensors; no data is needed, but
a CUDA build of torch is (docs/rehearsal.md). The exit code is 1 if a rank fails.
"""

from __future__ import annotations

import argparse

from calm_dist.cli.console import add_json, announce, at_least, run, write_json
from calm_dist.costs.clusters import PRESETS

DEFAULT_GPU = "h100-sxm"


def main() -> int:
    arguments = _parser().parse_intermixed_args()

    from calm_dist.rehearsal.rehearse import rehearse
    from calm_dist.rehearsal.request import recipe_to_rehearse
    from calm_dist.rehearsal.terminal import format_rehearsal

    recipe = recipe_to_rehearse(arguments.recipe, arguments.overrides, arguments.world)
    values = rehearse(recipe, PRESETS[arguments.gpu], arguments.rank, announce)
    if arguments.json != "-":
        print(format_rehearsal(values))
    if arguments.json:
        write_json(values, arguments.json)
    return int(any("failed" in rank for rank in values["ranks"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("recipe", help="recipe file, see recipes/")
    add("overrides", nargs="*", metavar="key=value", help="training.micro_batch_size=4 …")
    add("--world", type=at_least(1), metavar="N", help="GPUs; default: the recipe's world_size")
    add(
        "--rank",
        type=_ranks,
        metavar="R,…",
        help="ranks to rehearse; default: the first one of each pipeline stage",
    )
    add("--gpu", choices=PRESETS, default=DEFAULT_GPU, help=f"default: {DEFAULT_GPU}")
    add_json(parser, "write everything as JSON to F, or to stdout (no text) for -")
    return parser


def _ranks(text: str) -> list[int]:
    """A type for argparse: numbers of ranks, separated by commas."""
    return list(dict.fromkeys(at_least(0)(number) for number in text.split(",")))


if __name__ == "__main__":
    run(main)
