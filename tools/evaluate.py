"""Score a checkpoint on held-out text: BrierLM with its standard error, and the training losses.

    python tools/evaluate.py --checkpoint runs/calm_m --data data/latents/test
    python tools/evaluate.py --checkpoint runs/calm_m --data data/latents/test --all-checkpoints \\
        --blocks 200 --json scores.json

The scores are also added to the run's metrics.jsonl, from which reports are made. If that file is
not writable, a warning says so at the start, and the scores are only shown (exit code 0). If
writing fails later, the scores are shown first, and the exit code is 2.
"""

from __future__ import annotations

import argparse

from calm_dist.cli.console import add_device, add_json, announce, at_least, run, write_json


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", required=True, help="run directory (its newest checkpoint) or checkpoint"
    )
    parser.add_argument("--data", required=True, help="held-out store, made by encode_latents.py")
    parser.add_argument("--autoencoder", help="autoencoder checkpoint (default: the recipe's)")
    parser.add_argument("--blocks", type=int, help="blocks to score (default: the recipe's)")
    parser.add_argument("--samples", type=int, help="draws per position (default: the recipe's)")
    parser.add_argument(
        "--seed", type=at_least(0), help="seed of the draws (default: the recipe's)"
    )
    parser.add_argument(
        "--alignment",
        choices=("patch", "all"),
        help="score n-grams at the beginnings of patches (as published) or at every position "
        "(default: the recipe's)",
    )
    parser.add_argument(
        "--alignment-stride",
        type=int,
        help="Transformer: the patch size of the CALM to compare with (default: the store's)",
    )
    parser.add_argument(
        "--all-checkpoints", action="store_true", help="score every checkpoint of the run"
    )
    add_device(parser)
    add_json(parser, "write the results to F, or stdout for -")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    announce(f"loading {args.checkpoint} ...")

    import sys

    from calm_dist.data.stream import open_store
    from calm_dist.evaluation import evaluate
    from calm_dist.inference.load import load_model
    from calm_dist.parallel.launch import own_device
    from calm_dist.runs.checkpoints import all_checkpoints, find_checkpoint
    from calm_dist.runs.evaluation_records import RecordLog

    paths = all_checkpoints(args.checkpoint) if args.all_checkpoints else []
    # If there is no checkpoint at all, find_checkpoint raises.
    paths = paths or [find_checkpoint(args.checkpoint)]
    store = open_store(args.data)
    device = own_device(args.device)
    log = RecordLog(paths)
    results = []
    try:
        for path in paths:
            model = load_model(path, autoencoder=args.autoencoder, device=str(device))
            settings = evaluate.settings_of(
                model.recipe,
                blocks=args.blocks,
                samples=args.samples,
                seed=args.seed,
                alignment=args.alignment,
                alignment_stride=args.alignment_stride,
            )
            results.append(evaluate.evaluate(model, store, settings, show_progress=True))
            log.add(model.checkpoint, results[-1])
    finally:
        # Also show what was scored before an error or Ctrl-C.
        if results:
            # The table must not mix with JSON on stdout.
            output = sys.stderr if args.json == "-" else sys.stdout
            print(evaluate.table(results), file=output, flush=True)
            if args.json:
                write_json(results if args.all_checkpoints else results[0], args.json)
    log.close()


if __name__ == "__main__":
    run(main)
