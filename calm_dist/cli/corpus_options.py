"""Command line options of the tools that read a corpus."""

from __future__ import annotations

import argparse

from calm_dist.cli.console import at_least
from calm_dist.errors import DataError
from calm_dist.text.formats import SUPPORTED, Reading

CORPUS_HELP = (
    f"{SUPPORTED}, or directories or globs of them, here or at URLs such as s3://; - is lines of "
    "JSON on standard input"
)


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what of a corpus becomes documents."""
    parser.add_argument(
        "--text-key",
        default="text",
        metavar="NAME",
        help="key or column of the text; dots separate nested keys (default text)",
    )
    parser.add_argument(
        "--id-key",
        default="id",
        metavar="NAME",
        help="key or column of the document's id, where there is one (default id)",
    )
    parser.add_argument(
        "--min-chars",
        type=at_least(0),
        default=0,
        metavar="N",
        help="leave out documents of fewer characters (default 0)",
    )
    parser.add_argument(
        "--dedup",
        choices=("none", "exact"),
        default="none",
        help="exact: of documents with the same text, keep only the first of the corpus; reads it "
        "once more (default none)",
    )
    parser.add_argument(
        "--on-bad-line",
        choices=("stop", "skip"),
        default="stop",
        help="stop at a damaged line, row or file (default), or leave it out and count it in "
        "report.json",
    )


def reading_from(args: argparse.Namespace) -> Reading:
    """The `Reading` that these options ask for."""
    for name, key in (("--text-key", args.text_key), ("--id-key", args.id_key)):
        if not key:
            raise DataError(f"{name}: is empty; name a key or column")
    return Reading(
        text_key=args.text_key,
        id_key=args.id_key,
        min_chars=args.min_chars,
        dedup=args.dedup == "exact",
    )
