#!/usr/bin/env python3
"""Train and score all runs of a plan, each at its budget of FLOPs, and keep the results as JSON.

    python tools/study.py recipes/study/proxy.yaml --corpus books --out runs/proxy
    python tools/study.py recipes/study/words.yaml --corpus books --tokenizer bpe.json \\
        --out runs/words --jobs 2
    python tools/study.py recipes/study/words.yaml --out runs/words --collect words.json
    python tools/study.py recipes/study/words.yaml --corpus books --tokenizer bpe.json \\
        --out runs/words --known docs/results/words.json

The corpus is a directory with one file for each of train, valid and test. Repeat a command that was
interrupted to resume it; runs that have a result are skipped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from calm_dist.cli.console import (
    announce,
    at_least,
    run,
    writable_directory,
    writable_file,
    write_json,
)
from calm_dist.errors import UserError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path, help="a plan, see calm_dist/study/plan.py")
    parser.add_argument(
        "--corpus", type=Path, metavar="DIR", help="directory with train.*, valid.* and test.*"
    )
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="the corpus's tokenizer")
    parser.add_argument(
        "--out", type=writable_directory, required=True, metavar="DIR", help="output directory"
    )
    parser.add_argument(
        "--jobs", type=at_least(1), default=1, metavar="N", help="trainings at a time (default 1)"
    )
    parser.add_argument(
        "--only", metavar="TEXT", help="only runs with TEXT in their name, and their autoencoders"
    )
    parser.add_argument(
        "--list", action="store_true", help="only list the runs and whether they have a result"
    )
    parser.add_argument(
        "--known",
        type=Path,
        metavar="F",
        help="results of --collect, such as those of another machine: skip the runs in them",
    )
    parser.add_argument(
        "--collect",
        type=writable_file,
        metavar="F",
        help="write the existing results of the plan's runs to F, and train nothing",
    )
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    announce("loading ...")

    from calm_dist.study import data
    from calm_dist.study.plan import read_plan
    from calm_dist.study.result import collected, read_collected
    from calm_dist.study.runner import Runner, patch_sizes

    out = Path(arguments.out)
    plan, runs = read_plan(arguments.plan)
    if arguments.only:
        chosen = [one for one in runs if arguments.only in one.name]
        needed = {one.autoencoder for one in chosen}
        runs = [one for one in runs if one in chosen or one.name in needed]
        if not chosen:
            raise UserError(
                f"--only {arguments.only}: no run of {arguments.plan} has that in its name"
            )
    runner = Runner(plan, out)
    known = [] if arguments.known is None else read_collected(arguments.known)
    if known and not arguments.list:
        print(f"{runner.adopt(known)} results taken from {arguments.known}", flush=True)
    elsewhere = {result["name"] for result in known}
    results = {one.name: runner.result_file(one.name) for one in runs}
    if arguments.list:
        for name, file in results.items():
            is_done = file.is_file() or name in elsewhere
            print(f"{'done' if is_done else 'left'}  {name}")
        return 0
    if arguments.collect:
        found = [json.loads(file.read_text()) for file in results.values() if file.is_file()]
        write_json(collected(arguments.plan.name, found), arguments.collect)
        print(f"{arguments.collect}: {len(found)} of {len(runs)} runs")
        return 0
    if arguments.corpus is None:
        raise UserError(
            "--corpus: needed for training; give a directory with train, valid and test"
        )
    sizes = patch_sizes(runs)
    splits = data.find_splits(arguments.corpus)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = data.make_tokenizer(out, splits, plan.vocabulary, arguments.tokenizer)
    for patch_size in sizes:
        data.encode(out, splits, tokenizer, patch_size, plan.block_size)
    failed = runner.run_all(runs, arguments.jobs)
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed\n  " + "\n  ".join(failed))
    return 0


if __name__ == "__main__":
    run(main)
