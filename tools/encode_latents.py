#!/usr/bin/env python3
"""Encode a text corpus into a data store: blocks of tokens and their latents.

The same command goes on where a killed one stopped, and does nothing where all is done.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from calm_dist.cli import at_least, run


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--autoencoder",
        metavar="CKPT",
        help="run directory, checkpoint, or directory in the released layout (variant fp16)",
    )
    parser.add_argument(
        "--tokenizer", required=True, metavar="F", help="tokenizer.json or tokenizer.model"
    )
    parser.add_argument(
        "--corpus",
        required=True,
        nargs="+",
        metavar="PATH",
        help=".txt, .jsonl or .jsonl.zst files, directories or globs of them",
    )
    parser.add_argument("--out", required=True, metavar="DIR|URL", help="directory of the store")
    parser.add_argument(
        "--variant",
        choices=("fp16", "tokens"),
        default="fp16",
        help="fp16: tokens and latents (default); tokens: no latents, no autoencoder",
    )
    parser.add_argument(
        "--block-size",
        type=at_least(1),
        default=512,
        metavar="T",
        help="tokens per block (default 512)",
    )
    parser.add_argument(
        "--patch-size", type=at_least(1), metavar="K", help="tokens per patch (variant tokens only)"
    )
    parser.add_argument(
        "--batch-size", type=at_least(1), default=16, help="blocks encoded at a time (default 16)"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the documents' order")
    parser.add_argument(
        "--shard-mib", type=at_least(1), default=64, help="size of a shard (default 64 MiB)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace another store in --out")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()

    from calm_dist.data.latents import finished_store, plan_store, write_store
    from calm_dist.data.tokenizer import load_tokenizer
    from calm_dist.training.checkpoint import find_checkpoint

    directory = None
    if args.autoencoder is not None:
        directory = Path(args.autoencoder)
        # A directory in the released layout has no manifest of ours.
        if not (directory / "config.json").is_file():
            directory = find_checkpoint(directory)
    tokenizer = load_tokenizer(args.tokenizer)
    plan = plan_store(
        args.corpus,
        tokenizer,
        variant=args.variant,
        block_size=args.block_size,
        patch_size=args.patch_size,
        autoencoder=directory,
        seed=args.seed,
    )
    meta = None if args.overwrite else finished_store(args.out, plan)
    if meta is not None:
        print(f"{args.out}: already there and complete, {meta.num_blocks} blocks")
        return

    autoencoder = None
    if directory is not None:
        import torch

        from calm_dist.interop.huggingface import load_autoencoder

        autoencoder = load_autoencoder(directory)
        autoencoder = autoencoder.to("cuda" if torch.cuda.is_available() else "cpu")
    meta = write_store(
        args.out,
        args.corpus,
        tokenizer,
        plan,
        autoencoder=autoencoder,
        batch_size=args.batch_size,
        shard_bytes=args.shard_mib << 20,
        overwrite=args.overwrite,
    )
    print(f"{args.out}: {meta.num_blocks} blocks of {meta.block_size} tokens written")


if __name__ == "__main__":
    run(main)
