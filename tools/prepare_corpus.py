#!/usr/bin/env python3
"""Split a text corpus into train, valid and test, and train or copy its tokenizer.

    python tools/prepare_corpus.py --corpus ~/books 'notes/*.jsonl' --vocab-size 4096 --out data
    python tools/prepare_corpus.py --corpus /data/books --tokenizer tokenizer.model --out data

A .txt file is one document, or several if it is long; each line of a .jsonl or .json file is one,
an object with the key "text", and so is each row of a table. Running the command again does nothing
if the output is intact.
"""

from __future__ import annotations

import argparse
import logging

from calm_dist.cli.console import at_least, run
from calm_dist.cli.corpus_options import CORPUS_HELP, add_reading, reading_from


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus",
        nargs="+",
        default=[],
        metavar="PATH",
        help=f"{CORPUS_HELP}; default: the source text of Python's standard library",
    )
    parser.add_argument(
        "--out", required=True, help="directory for corpus/{train,valid,test}.jsonl and tokenizer"
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="use this tokenizer instead of training one"
    )
    parser.add_argument(
        "--begin-token",
        metavar="NAME",
        help="with --tokenizer: the token that begins documents; may be the end token",
    )
    parser.add_argument(
        "--end-token", metavar="NAME", help="with --tokenizer: the token that ends documents"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=512, help="entries of the trained BPE (default 512)"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the split (default 0)")
    parser.add_argument(
        "--processes",
        type=at_least(1),
        metavar="N",
        help="processes that read and write a large corpus (default: one for each core); the "
        "files do not depend on it",
    )
    add_reading(parser)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    from calm_dist.text.prepare import prepare_corpus

    written = prepare_corpus(
        args.out,
        args.corpus,
        tokenizer=args.tokenizer,
        begin_token=args.begin_token,
        end_token=args.end_token,
        vocab_size=args.vocab_size,
        seed=args.seed,
        reading=reading_from(args),
        skip_faults=args.on_bad_line == "skip",
        processes=args.processes,
    )
    state = "written" if written else "already there and intact"
    print(f"{args.out}: corpus/{{train,valid,test}}.jsonl and tokenizer {state}")


if __name__ == "__main__":
    run(main)
