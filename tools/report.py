"""Write the report of runs: index.html and report.md for people, report.json for programs."""

from __future__ import annotations

import argparse

from calm_dist.cli.console import add_json, run, writable_directory


def parse_arguments() -> argparse.Namespace:
    from calm_dist.cli.report_tool import add_options

    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tools/report.py --autoencoder runs/autoencoder "
        "--run runs/calm_m runs/transformer_s --out runs/report",
    )
    parser.add_argument(
        "--run",
        dest="runs",
        metavar="DIR",
        nargs="+",
        action="extend",
        required=True,
        help="run directories of the models to compare, CALM and Transformer",
    )
    parser.add_argument(
        "--out",
        type=writable_directory,
        metavar="DIR",
        required=True,
        help="output directory of the report",
    )
    add_json(parser, "also write report.json to F, or stdout for -")
    add_options(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()

    from calm_dist.cli.report_tool import report_runs

    report_runs(arguments)


if __name__ == "__main__":
    run(main)
