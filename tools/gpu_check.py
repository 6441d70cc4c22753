#!/usr/bin/env python
"""Check training on one GPU: right, and as fast and as large as predicted, in ten minutes.

    python tools/gpu_check.py --out runs/gpu_check
    python tools/gpu_check.py --out runs/gpu_check --only calm_m,kernel
    python tools/gpu_check.py --out runs/gpu_check --page docs/performance.md
    python tools/gpu_check.py --out runs/small --device cpu

Needs no data and no network. Each part is a process of its own, with a time limit, and writes what
it finds as it goes. --page only writes the results in --out into a page. With --device cpu the same
parts run in small sizes, which says that they work and nothing about speed. The exit code is 1 if a
part failed or a goal was not met.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from calm_dist.cli.console import between, run, writable_directory, writable_file
from calm_dist.errors import UserError

MINUTES = 10


def main() -> int:
    arguments = _parser().parse_args()

    from calm_dist.gpu_check.page import markdown, put_into
    from calm_dist.gpu_check.runner import read_results, run_parts

    directory = Path(arguments.out)
    if arguments.page:
        put_into(Path(arguments.page), markdown(read_results(directory)))
        return 0
    if arguments.device == "cuda":
        _require_gpu()
    results = run_parts(
        directory,
        arguments.device,
        arguments.minutes,
        arguments.only,
        lambda text: print(text, flush=True),
    )
    text = markdown(results)
    (directory / "report.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")
    return _exit_code(results, arguments)


def _exit_code(results: dict[str, Any], arguments: argparse.Namespace) -> int:
    from calm_dist.gpu_check.goals import goals

    is_broken = any(values["status"] in ("failed", "timed out") for values in results.values())
    if arguments.device == "cpu" or arguments.only:
        met = all(goal.met is not False for goal in goals(results))
    else:
        met = all(goal.met for goal in goals(results))
    return int(is_broken or not met)


def _require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            "torch finds no GPU on this machine; run the check on a machine with one, or with "
            "--device cpu, in small sizes"
        )


def _parser() -> argparse.ArgumentParser:
    from calm_dist.gpu_check.parts import PARTS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", required=True, type=writable_directory, metavar="DIR", help="for the results")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    names = [part.name for part in PARTS]
    add("--only", type=_names(names), default=(), metavar="PART,…", help=", ".join(names))
    add(
        "--minutes",
        type=between(0.1, 1440),
        default=MINUTES,
        metavar="M",
        help="most time of all parts together; default: %(default)s",
    )
    add(
        "--page",
        type=writable_file,
        metavar="F",
        help="run nothing; write the results in --out between the markers of this page",
    )
    return parser


def _names(known: list[str]) -> Any:
    """A type for argparse: names of parts, separated by commas."""

    def names(text: str) -> list[str]:
        found = text.split(",")
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(
                f"{unknown[0]!r}: is not a part; give some of {', '.join(known)}"
            )
        return found

    return names


if __name__ == "__main__":
    run(main)
