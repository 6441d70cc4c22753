"""Write the report of an experiment: index.html for people, report.json for programs.

    python tools/report.py --autoencoder runs/autoencoder --run runs/calm_m runs/transformer_m \\
        --out report
"""

from __future__ import annotations

import argparse
from pathlib import Path

from calm_dist.cli import run, write_json


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--autoencoder", metavar="RUN", help="run directory of the autoencoder")
    parser.add_argument(
        "--run",
        dest="runs",
        metavar="DIR",
        nargs="+",
        action="extend",
        required=True,
        help="run directories of the models to compare, CALM and Transformer",
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="where the report is written")
    parser.add_argument("--json", metavar="F", help="write report.json to F too, or stdout for -")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()

    from calm_dist.reports.report import write_report

    summary = write_report(args.runs, args.out, autoencoder=args.autoencoder)
    if args.json:
        write_json(summary, args.json)
    if args.json != "-":
        print(Path(args.out) / "index.html")


if __name__ == "__main__":
    run(main)
