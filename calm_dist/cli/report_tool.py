"""The command line that `tools/report.py` and `tools/flops_report.py` share."""

from __future__ import annotations

import argparse
from pathlib import Path

from calm_dist.cli.console import between, write_json
from calm_dist.reports.inference import read_inference
from calm_dist.reports.markdown import render_markdown
from calm_dist.reports.report import read_runs, report_content, summarize, write_files


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a report of runs, except ``--run``, ``--out`` and ``--json``."""
    parser.add_argument("--autoencoder", metavar="RUN", help="run directory of the autoencoder")
    parser.add_argument(
        "--peak-tflops",
        type=between(1e-3, 1e6),
        metavar="X",
        help="peak TFLOP/s of one device, for MFU; known for A100, H100, H200 and B200",
    )
    parser.add_argument(
        "--inference",
        metavar="F",
        help="add a section on generation from the JSON of tools/benchmark.py inference",
    )


def report_runs(arguments: argparse.Namespace) -> None:
    """Write the files that the command line asks for and print where, or print the report itself.

    Raises:
        UserError: see `reports.report.write_report`.
    """
    models, autoencoder = read_runs(arguments.runs, arguments.autoencoder)
    inference = read_inference(arguments.inference) if arguments.inference else None
    summary = summarize(models, autoencoder, arguments.peak_tflops, inference)
    if arguments.out:
        write_files(summary, models, autoencoder, Path(arguments.out))
    if arguments.json:
        write_json(summary, arguments.json)
    if arguments.json == "-":
        return
    if arguments.out:
        print(Path(arguments.out) / "index.html")
    elif not arguments.json:
        print(render_markdown(report_content(summary, models, autoencoder), images=False))
