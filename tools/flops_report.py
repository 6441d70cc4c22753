#!/usr/bin/env python
"""Compare models by FLOPs: the paper's, counted from their shapes, or runs with what they reached.

Without --run: the paper's models beside its Table 1. With --run: a report of these runs.
"""

from __future__ import annotations

import argparse

from calm_dist.cli.console import add_json, run, writable_directory, write_json
from calm_dist.errors import UserError


def parse_arguments() -> argparse.Namespace:
    from calm_dist.cli.report_tool import add_options

    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python tools/flops_report.py --json flops.json\n"
        "  python tools/flops_report.py --run runs/calm_m runs/transformer_s --out runs/report\n"
        "  python tools/flops_report.py --run runs/calm_* --json - --peak-tflops 312",
    )
    parser.add_argument(
        "--run",
        dest="runs",
        metavar="DIR",
        nargs="+",
        action="extend",
        help="run directories of CALMs and Transformers",
    )
    parser.add_argument(
        "--out",
        type=writable_directory,
        metavar="DIR",
        help="write index.html, report.md, report.json and plots/ of the runs there",
    )
    add_json(parser, "write JSON to F, or to stdout (and nothing else) for -")
    add_options(parser)
    return parser.parse_args()


def compare_paper(arguments: argparse.Namespace) -> None:
    """The paper's models, without any run."""
    for name in ("out", "autoencoder", "peak_tflops"):
        if getattr(arguments, name) is not None:
            option = name.replace("_", "-")
            raise UserError(f"--{option}: belongs to a report of runs; give them with --run")

    from calm_dist.reports.comparison_paper import compare_with_paper, format_comparison

    comparison = compare_with_paper()
    if arguments.json != "-":
        print(format_comparison(comparison))
    if arguments.json:
        write_json(comparison, arguments.json)


def main() -> None:
    arguments = parse_arguments()
    if not arguments.runs:
        compare_paper(arguments)
        return

    from calm_dist.cli.report_tool import report_runs

    report_runs(arguments)


if __name__ == "__main__":
    run(main)
