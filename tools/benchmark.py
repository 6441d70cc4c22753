#!/usr/bin/env python
"""Time parts of the models.

python tools/benchmark.py heads
python tools/benchmark.py heads --recipe recipes/calm_xl.yaml --device cuda --json heads.json
"""

from __future__ import annotations

import argparse

from calm_dist.cli import at_least, run, write_json


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    heads = parts.add_parser("heads", help="one latent sample with each generative head")
    heads.add_argument("--recipe", default="recipes/calm_m.yaml", help="default: %(default)s")
    heads.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the recipe")
    heads.add_argument("--positions", type=at_least(1), default=16, help="default: %(default)s")
    heads.add_argument("--samples", type=at_least(1), default=4, help="default: %(default)s")
    heads.add_argument("--repeats", type=at_least(1), default=3, help="default: %(default)s")
    heads.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    heads.add_argument("--json", metavar="F", help="write JSON to F, or to stdout for -")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()

    import torch

    from calm_dist.benchmark.heads import measure_heads, table
    from calm_dist.recipe import load_recipe

    result = measure_heads(
        load_recipe(args.recipe, args.overrides),
        positions=args.positions,
        samples=args.samples,
        repeats=args.repeats,
        device=torch.device(args.device),
    )
    if args.json:
        write_json(result, args.json)
    if args.json != "-":
        print(table(result))


if __name__ == "__main__":
    run(main)
