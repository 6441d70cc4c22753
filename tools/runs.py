#!/usr/bin/env python
"""List run directories and their state.

    python tools/runs.py
    python tools/runs.py runs/quickstart /scratch/me
    python tools/runs.py --json - | jq '.[] | select(.state == "failed")'

state  running, finished, stopped (asked to stop), failed (with the reason), not started, damaged
saved  step of the newest checkpoint, from which the same training command continues
idle   time since the last record
score  BrierLM of the last evaluation ± one standard error, with * if it is mostly noise, then
       Brier-1 and Brier-2; for an autoencoder, the reconstructed fraction of held-out tokens
"""

from __future__ import annotations

import argparse

from calm_dist.cli.console import add_json, run, write_json


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "directories",
        nargs="*",
        default=["runs"],
        metavar="DIR",
        help="list run directories at and below DIR (default: runs)",
    )
    add_json(parser)
    arguments = parser.parse_args()

    from calm_dist.runs.listing import list_runs, table

    rows = list_runs(arguments.directories)
    if arguments.json != "-":
        places = ", ".join(arguments.directories)
        print(table(rows) if rows else f"no run directories at or below {places}")
    if arguments.json:
        write_json(rows, arguments.json)


if __name__ == "__main__":
    run(main)
