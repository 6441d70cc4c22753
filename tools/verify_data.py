#!/usr/bin/env python3
"""Check every byte of a data store: hashes, counts, token ids, latents; and show a sample.

    python tools/verify_data.py data/latents/train
    python tools/verify_data.py s3://bucket/latents/train --block 1000 --json -

A remote store is downloaded shard by shard. Ends with code 2 if anything is wrong.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from calm_dist.cli.console import add_device, add_json, at_least, run, write_json


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", metavar="STORE", help="directory or URL of the store")
    parser.add_argument(
        "--block",
        type=at_least(0),
        default=0,
        metavar="N",
        help="block that is shown as a sample, counted from 0 (default 0)",
    )
    parser.add_argument(
        "--autoencoder",
        type=Path,
        metavar="DIR",
        help="the store's autoencoder, which decodes the sample (default: where it was)",
    )
    add_device(parser)
    add_json(parser)
    args = parser.parse_args()

    from calm_dist.cli.data_tools import describe, show_sample
    from calm_dist.data.inspection import check_request, check_store
    from calm_dist.errors import DataError

    check_request(args.store, args.block, args.autoencoder)
    check = check_store(args.store)
    documents = "" if check.documents is None else f", {check.documents:,} ends of documents"
    summary = (
        f"{args.store}: {check.shards:,} shards, {check.blocks:,} blocks, {check.tokens:,} tokens, "
        f"{check.bytes:,} bytes{documents}"
    )
    result = {
        **{name: getattr(check, name) for name in ("shards", "blocks", "tokens", "bytes")},
        "documents": check.documents,
        "problems": check.problems,
    }
    if check.problems:
        if args.json:
            write_json(result, args.json)
        raise DataError("\n".join([f"{len(check.problems)} problem(s)", *check.problems]))
    sample = describe(args.store, args.block, args.autoencoder, args.device)
    if args.json != "-":
        print(f"{summary}; all intact")
        show_sample(args.block, sample)
    if args.json:
        write_json({**result, "sample": {"block": args.block, **sample}}, args.json)


if __name__ == "__main__":
    run(main)
