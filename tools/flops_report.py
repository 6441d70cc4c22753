#!/usr/bin/env python
"""Compare the paper's models by parameters and FLOPs, counted from their shapes alone."""

from __future__ import annotations

import argparse

from calm_dist.cli import run, write_json


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tools/flops_report.py --json flops.json",
    )
    parser.add_argument(
        "--json", metavar="F", help="write JSON to F, or to stdout (and no table) for -"
    )
    arguments = parser.parse_args()

    from calm_dist.reports.comparison_paper import compare_with_paper, format_comparison

    comparison = compare_with_paper()
    if arguments.json:
        write_json(comparison, arguments.json)
    if arguments.json != "-":
        print(format_comparison(comparison))


if __name__ == "__main__":
    run(main)
