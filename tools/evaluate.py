"""Score a checkpoint on held-out text: BrierLM with its standard error, and the training losses.

    python tools/evaluate.py --checkpoint runs/calm_m --data data/latents/test
    python tools/evaluate.py --checkpoint runs/calm_m --data data/latents/test --all-checkpoints \\
        --blocks 200 --json scores.json
    python tools/evaluate.py --checkpoint CALM-M --text wikitext_document_level-test.json \\
        --protocol published

--checkpoint may be a directory in the released layout. --protocol published scores as the authors'
script does: documents in the order of the file, each with one begin token and no end token, blocks
of 8,192 tokens, and its estimator and formula beside ours.

    torchrun --nproc-per-node 2 tools/evaluate.py --checkpoint runs/calm_xl --data data/latents/test

The processes of torchrun share a model by tensor parallelism, whatever layout it was trained in.

The scores are also added to the run's metrics.jsonl, from which reports are made. If that file is
not writable, a warning says so at the start, and the scores are only shown (exit code 0). If
writing fails later, the scores are shown first, and the exit code is 2.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from calm_dist.cli.console import (
    add_device,
    add_document_tokens,
    add_json,
    announce,
    at_least,
    run,
    write_json,
)
from calm_dist.text.formats import SUPPORTED, Reading

if TYPE_CHECKING:
    from calm_dist.evaluation.text import Blocks
    from calm_dist.inference.loading import LoadedModel


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="run directory (its newest checkpoint), checkpoint, or directory in the released "
        "layout",
    )
    scored = parser.add_mutually_exclusive_group(required=True)
    scored.add_argument("--data", help="held-out store, made by encode_latents.py")
    scored.add_argument(
        "--text", nargs="+", metavar="PATH", help=f"held-out text: {SUPPORTED}, directories, globs"
    )
    parser.add_argument(
        "--text-key",
        metavar="NAME",
        help="key or column of the text in --text; dots separate nested keys (default text)",
    )
    parser.add_argument(
        "--protocol",
        choices=("own", "published"),
        default="own",
        help="how --text is cut into blocks: as stores are (default), or as published",
    )
    parser.add_argument(
        "--block-size",
        type=at_least(1),
        metavar="T",
        help="tokens per block of --text (default: the model's; published: 8192)",
    )
    parser.add_argument(
        "--tokenizer", metavar="F", help="tokenizer file for --text (default: the recipe's)"
    )
    add_document_tokens(parser)
    parser.add_argument("--autoencoder", help="autoencoder checkpoint (default: the recipe's)")
    parser.add_argument(
        "--blocks", type=at_least(1), help="blocks to score (default: the recipe's)"
    )
    parser.add_argument(
        "--samples", type=at_least(2), help="draws per position (default: the recipe's)"
    )
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
        type=at_least(1),
        help="Transformer: the patch size of the CALM to compare with (default: the store's)",
    )
    parser.add_argument(
        "--all-checkpoints", action="store_true", help="score every checkpoint of the run"
    )
    add_device(parser)
    add_json(parser, "write the results to F, or stdout for -")
    args = parser.parse_args()
    if args.text_key == "":
        parser.error("argument --text-key: is empty; name a key or column")
    for name in ("text_key", "block_size", "tokenizer", "begin_token", "end_token"):
        if args.data and getattr(args, name) is not None:
            parser.error(f"argument --{name.replace('_', '-')}: is for --text, not for --data")
    if args.data and args.protocol != "own":
        parser.error("argument --protocol: is for --text; a store is cut into blocks already")
    return args


def held_out(args: argparse.Namespace, model: LoadedModel) -> Blocks:
    """The blocks of --text, made with the model's tokenizer."""
    from calm_dist.evaluation.text import PUBLISHED_BLOCK_SIZE, TextBlocks
    from calm_dist.inference.generate import check_tokenizer, find_tokenizer, token_names
    from calm_dist.text.tokenizer import load_tokenizer

    names = token_names(model, args.begin_token, args.end_token)
    tokenizer = load_tokenizer(args.tokenizer or find_tokenizer(model), *names)
    check_tokenizer(model, tokenizer)
    published = PUBLISHED_BLOCK_SIZE if args.protocol == "published" else model.recipe.block_size
    patch_size = model.recipe.model.patch_size
    if model.kind == "transformer":
        patch_size = args.alignment_stride or 1
    return TextBlocks(
        args.text,
        tokenizer,
        block_size=args.block_size or published,
        patch_size=patch_size,
        protocol=args.protocol,
        reading=Reading(text_key=args.text_key or "text"),
    )


def main() -> None:
    args = parse_arguments()
    announce(f"loading {args.checkpoint} ...")

    import sys

    from calm_dist.data.stream import open_store
    from calm_dist.evaluation import evaluate
    from calm_dist.inference.loading import load_model
    from calm_dist.parallel.launch import own_device, tensor_parallel_world
    from calm_dist.released.files import is_released
    from calm_dist.runs.checkpoints import all_checkpoints, find_checkpoint
    from calm_dist.runs.evaluation_records import RecordLog
    from calm_dist.text.corpus_files import find_files

    paths = all_checkpoints(args.checkpoint) if args.all_checkpoints else []
    if is_released(args.checkpoint):
        paths = [Path(args.checkpoint)]
    # If there is no checkpoint at all, find_checkpoint raises.
    paths = paths or [find_checkpoint(args.checkpoint)]
    # A mistake in the paths is found before a model is loaded.
    store: Blocks | None = open_store(args.data) if args.data else None
    if args.text:
        find_files(args.text, Reading(text_key=args.text_key or "text"))
    device = own_device(args.device)
    world = tensor_parallel_world()
    log = RecordLog(paths) if world.rank == 0 else None
    results = []
    try:
        for path in paths:
            model = load_model(path, args.autoencoder, str(device), world=world)
            store = held_out(args, model) if store is None else store
            settings = evaluate.settings_of(
                model.recipe,
                blocks=args.blocks,
                samples=args.samples,
                seed=args.seed,
                alignment=args.alignment,
                alignment_stride=args.alignment_stride,
                released_estimator=args.protocol == "published",
            )
            shows = world.rank == 0
            results.append(evaluate.evaluate(model, store, settings, show_progress=shows))
            if log is not None:
                log.add(model.checkpoint, results[-1])
    finally:
        # Also show what was scored before an error or Ctrl-C.
        if results and world.rank == 0:
            # The table must not mix with JSON on stdout.
            output = sys.stderr if args.json == "-" else sys.stdout
            print(evaluate.table(results), file=output, flush=True)
            if args.json:
                write_json(results if args.all_checkpoints else results[0], args.json)
    if log is not None:
        log.close()


if __name__ == "__main__":
    run(main)
