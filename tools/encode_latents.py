#!/usr/bin/env python3
"""Encode a text corpus into a data store: blocks of tokens and their latents.

    python tools/encode_latents.py --autoencoder runs/autoencoder --tokenizer data/tokenizer.json \\
        --corpus data/corpus/train.jsonl --block-size 8192 --out data/latents/train
    python tools/encode_latents.py --variant tokens --patch-size 4 --block-size 2048 \\
        --tokenizer data/tokenizer.json --corpus data/corpus/train.jsonl --out data/tokens/train

    python tools/encode_latents.py --append-to data/latents/train --corpus more.jsonl \\
        --out data/latents/train-2

Run the same command again to continue after an interruption; it does nothing if the store is
complete.

Many processes can share the work: give each the same options, --parts N and its own --worker I/W.
With Slurm that is --worker $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT or, for the ranks of srun,
--worker $SLURM_PROCID/$SLURM_NTASKS. N is a property of the store; W may change with every start.
With N a multiple of W, more workers can join later. The last to finish merges the parts. For many
files, run the command with --begin first: then only one process searches them.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calm_dist.cli.console import add_device, announce, at_least, run
from calm_dist.cli.corpus_options import CORPUS_HELP, add_reading, reading_from

if TYPE_CHECKING:
    from calm_dist.data.manifest import BegunCorpus
    from calm_dist.models.autoencoder import Autoencoder
    from calm_dist.text.corpus_files import CorpusFiles
    from calm_dist.text.formats import Reading
    from calm_dist.text.tokenizer import Tokenizer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--autoencoder",
        metavar="CKPT",
        help="run directory, checkpoint, or directory in the released layout (variant fp16)",
    )
    parser.add_argument("--tokenizer", metavar="F", help="tokenizer.json or tokenizer.model")
    parser.add_argument(
        "--append-to",
        metavar="STORE",
        help="write more text for a training on STORE: tokenizer, variant, block size, patch size "
        "and autoencoder are those of STORE, which is not changed",
    )
    parser.add_argument(
        "--begin-token",
        metavar="NAME",
        help="token that begins documents (default: the tokenizer's own); may be the end token",
    )
    parser.add_argument(
        "--end-token",
        metavar="NAME",
        help="token that ends documents (default: the tokenizer's own)",
    )
    parser.add_argument(
        "--corpus",
        required=True,
        nargs="+",
        metavar="PATH",
        help=CORPUS_HELP,
    )
    parser.add_argument("--out", required=True, metavar="DIR|URL", help="directory of the store")
    parser.add_argument(
        "--variant",
        choices=("fp16", "tokens"),
        help="fp16: tokens and latents (default); tokens: no latents, no autoencoder",
    )
    parser.add_argument(
        "--block-size",
        type=at_least(1),
        metavar="T",
        help="tokens per block (default 512)",
    )
    parser.add_argument(
        "--patch-size", type=at_least(1), metavar="K", help="tokens per patch (variant tokens only)"
    )
    parser.add_argument(
        "--batch-size", type=at_least(1), default=16, help="blocks encoded at a time (default 16)"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the document order")
    parser.add_argument(
        "--shard-mib",
        type=at_least(1),
        default=64,
        help="size of a shard, below 4096 (default 64 MiB)",
    )
    parser.add_argument(
        "--token-dtype",
        choices=("auto", "uint16", "uint32"),
        default="auto",
        help="type of the stored tokens (default auto: uint16 for up to 65,536 entries)",
    )
    parser.add_argument(
        "--latent-dtype",
        choices=("float16", "int8"),
        help="type of the stored latents; int8: half the size, each dimension of a block with a "
        "scale of its own (default float16)",
    )
    parser.add_argument(
        "--compression",
        choices=("zstd",),
        help="compress shards of tokens; readers unpack them into data.cache_dir (default: none)",
    )
    parser.add_argument(
        "--parts",
        type=at_least(1),
        default=1,
        metavar="N",
        help="divide the corpus into N parts with separate blocks; the tail of each part that does "
        "not fill a block is dropped (default 1)",
    )
    parser.add_argument(
        "--worker",
        type=worker,
        metavar="I/W",
        help="write only the parts I, I+W, I+2W, ... (I from 0 to W-1); other workers write the "
        "rest (default: this process writes all parts)",
    )
    parser.add_argument(
        "--begin",
        action="store_true",
        help="find the files of the corpus and divide them into parts, and write none; workers "
        "then start at once (default: the first worker does this)",
    )
    add_reading(parser)
    add_device(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace another store in --out")
    args = parser.parse_args()
    if args.append_to is None and args.tokenizer is None:
        parser.error("--tokenizer is required, unless --append-to names a store that has it")
    return args


def worker(text: str) -> tuple[int, int]:
    """A type for argparse: ``I/W``, worker I of W, counted from 0."""
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(
            f"{text}: give I/W, worker I of W, with I from 0 to W-1, such as 0/4"
        )
    return int(match[1]), int(match[2])


def settle_options(args: argparse.Namespace) -> None:
    """Fill in the options that --append-to takes from a store, and defaults.

    Raises:
        DataError: an option contradicts the store.
    """
    if args.append_to is not None:
        from calm_dist.data.inspection import settings_of
        from calm_dist.errors import DataError

        for name, value in settings_of(args.append_to, args.out).items():
            given = getattr(args, name)
            if given is not None and given not in (value, "auto"):
                option = f"--{name.replace('_', '-')}"
                raise DataError(
                    f"{option} {given}: {args.append_to} has {value}; leave {option} out"
                )
            setattr(args, name, value)
    args.variant = args.variant or "fp16"
    args.block_size = args.block_size or 512
    args.latent_dtype = args.latent_dtype or "float16"


def load_encoder(directory: Path, device: str) -> Autoencoder:
    from calm_dist.interop.huggingface import load_autoencoder
    from calm_dist.parallel.launch import own_device

    return load_autoencoder(directory).to(own_device(device))


def find_corpus(args: argparse.Namespace, reading: Reading) -> CorpusFiles | BegunCorpus:
    """The corpus; that of a store which has been begun is not searched again."""
    from calm_dist.data.existing import PARTS
    from calm_dist.data.latents import refuse_corpus_in_store
    from calm_dist.data.layout import is_remote
    from calm_dist.data.manifest import begun_corpus
    from calm_dist.text.corpus_files import find_files

    if not (is_remote(args.out) or args.overwrite):
        begun = begun_corpus(Path(args.out) / PARTS, args.corpus)
        if begun is not None:
            return begun
    corpus = find_files(args.corpus, reading)
    corpus.report()
    refuse_corpus_in_store(args.out, corpus)
    return corpus


def report_left_out(out: str, reading: Reading) -> None:
    """Say what was left out of a finished local store."""
    from calm_dist.text.reports import REPORT, missing_id_key, summary

    file = Path(out) / REPORT
    if not file.is_file():
        return
    report = json.loads(file.read_text(encoding="utf-8"))
    for note in (summary(report), missing_id_key(report, reading)):
        if note is not None:
            print(f"{file}: {note}")


def report_lost(out: str, tokenizer: Tokenizer) -> None:
    if lost := tokenizer.lost.report():
        print(f"{out}: in the text encoded by this process, {lost}", flush=True)


def main() -> None:
    args = parse_arguments()
    announce("loading libraries ...")

    from calm_dist.data.inspection import refuse_same_text
    from calm_dist.data.latents import (
        check_worker,
        finished_store,
        plan_store,
        read_meta,
        write_parts,
        write_store,
    )
    from calm_dist.data.parts import begin, blocks_in_shard
    from calm_dist.runs.checkpoints import find_checkpoint
    from calm_dist.text.tokenizer import load_tokenizer

    settle_options(args)
    if args.worker is not None or args.begin:
        check_worker(args.out, args.worker or (0, 1), args.parts, overwrite=args.overwrite)
    directory = None
    if args.autoencoder is not None:
        directory = Path(args.autoencoder)
        # A directory in the released layout has no manifest.
        if not (directory / "config.json").is_file():
            directory = find_checkpoint(directory)
    tokenizer = load_tokenizer(args.tokenizer, args.begin_token, args.end_token)
    reading, skip_faults = reading_from(args), args.on_bad_line == "skip"
    corpus = find_corpus(args, reading)
    plan = plan_store(
        corpus,
        tokenizer,
        variant=args.variant,
        block_size=args.block_size,
        patch_size=args.patch_size,
        autoencoder=directory,
        seed=args.seed,
        parts=args.parts,
        reading=reading,
        token_dtype=args.token_dtype,
        compression=args.compression,
        latent_dtype=args.latent_dtype,
        out=None if args.overwrite else args.out,
        skip_faults=skip_faults,
    )
    if args.append_to is not None:
        refuse_same_text(args.append_to, plan)
    shard_bytes = args.shard_mib << 20
    blocks_per_shard = blocks_in_shard(plan, shard_bytes)
    meta = None if args.overwrite else finished_store(args.out, plan)
    if meta is not None:
        print(f"{args.out}: already there and complete, {meta.num_blocks} blocks")
        return

    if args.begin:
        begin(Path(args.out), plan, blocks_per_shard, corpus, skip_faults=skip_faults)
        print(f"{args.out}: begun, {plan.parts} part{'s' if plan.parts > 1 else ''}")
        return
    if filling := tokenizer.describe_filling(plan.patch_size):
        print(f"{args.out}: {filling}", flush=True)
    inputs = (corpus, tokenizer, plan)
    options: dict[str, Any] = {
        "autoencoder": None if directory is None else load_encoder(directory, args.device),
        "batch_size": args.batch_size,
        "shard_bytes": shard_bytes,
        "skip_faults": skip_faults,
    }
    if args.worker is None:
        meta = write_store(args.out, *inputs, overwrite=args.overwrite, **options)
        report_lost(args.out, tokenizer)
    else:
        missing = write_parts(Path(args.out), *inputs, worker=args.worker, **options)
        report_lost(args.out, tokenizer)
        if missing:
            print(
                f"{args.out}: the parts of worker {args.worker[0]}/{args.worker[1]} are done; "
                f"{len(missing)} of {plan.parts} parts are missing; other workers write them"
            )
            return
        meta = read_meta(args.out)
    report_left_out(args.out, reading)
    print(f"{args.out}: {meta.num_blocks} blocks of {meta.block_size} tokens written")


if __name__ == "__main__":
    run(main)
