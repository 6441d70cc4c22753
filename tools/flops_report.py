#!/usr/bin/env python
"""Compare models by FLOPs: the paper's models, counted from their shapes, or runs and their scores.

Without --run: the paper's models next to its Table 1. With --run: a report of these runs. With
--inference, both also show what tools/benchmark.py inference measured, beside the counts. With
--page: fill a page with tables and plots from the results of studies.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from calm_dist.cli.console import (
    add_json,
    run,
    writable_directory,
    writable_file,
    write_json,
)
from calm_dist.errors import UserError


def parse_arguments() -> argparse.Namespace:
    from calm_dist.cli.report_tool import add_options

    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python tools/flops_report.py --json flops.json\n"
        "  python tools/flops_report.py --run runs/calm_m runs/transformer_s --out runs/report\n"
        "  python tools/flops_report.py --run runs/calm_* --json - --peak-tflops 312\n"
        "  python tools/flops_report.py --inference inference.json\n"
        "  python tools/flops_report.py --study docs/results --page docs/results.md",
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
        help="write index.html, report.md, report.json and plots/ to DIR",
    )
    parser.add_argument(
        "--study",
        type=Path,
        metavar="DIR",
        help="directory of results of study.py --collect, which comments in --page name",
    )
    parser.add_argument(
        "--page",
        type=writable_file,
        metavar="F",
        help="fill the tables of this Markdown page, and draw its plots",
    )
    add_json(parser, "write JSON to F, or to stdout (and nothing else) for -")
    add_options(parser)
    return parser.parse_args()


def compare_paper(arguments: argparse.Namespace) -> None:
    """The paper's models, without any run."""
    for name in ("out", "autoencoder", "peak_tflops"):
        if getattr(arguments, name) is not None:
            option = name.replace("_", "-")
            raise UserError(f"--{option}: is for a report of runs; give the runs with --run")

    from calm_dist.reports.comparison_paper import compare_with_paper, format_comparison

    comparison, section = compare_with_paper(), None
    if arguments.inference:
        from calm_dist.reports.inference import claims, inference_section, read_inference

        measured = read_inference(arguments.inference)
        comparison["inference"] = {**measured.model_dump(), "claims": claims(measured)}
        section = inference_section(measured)
    if arguments.json != "-":
        print(format_comparison(comparison))
        if section is not None:
            from calm_dist.reports.markdown import render_section

            print("", *render_section(section, images=False), sep="\n")
    if arguments.json:
        write_json(comparison, arguments.json)


def update_page(directory: Path, page: Path) -> None:
    """Fill a page of results, and write its plots next to it."""
    from calm_dist.files import replace_text
    from calm_dist.study.page import fill_page, page_plots

    try:
        filled = fill_page(page.read_text(encoding="utf-8"), directory)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"is not UTF-8 text ({error})"
        raise UserError(f"--page {page}: {reason}; give a page with comments") from error
    for path, plot in page_plots(filled, directory).items():
        target = page.parent / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(plot.png())
    replace_text(page, filled)
    print(page)


def main() -> None:
    arguments = parse_arguments()
    if (arguments.study is None) != (arguments.page is None):
        raise UserError("--study and --page: must be given together; give both")
    if arguments.page is not None:
        for name in ("runs", "out", "json"):
            if getattr(arguments, name):
                option = "run" if name == "runs" else name
                raise UserError(f"--{option}: is for a report of runs, not for a --page")
        update_page(arguments.study, Path(arguments.page))
        return
    if not arguments.runs:
        compare_paper(arguments)
        return

    from calm_dist.cli.report_tool import report_runs

    report_runs(arguments)


if __name__ == "__main__":
    run(main)
