#!/usr/bin/env python3
"""Show a block of a data store: tokens, text, patches, posterior, and what the decoder makes of it.

    python tools/inspect_data.py data/latents/train --block 7
    python tools/inspect_data.py data/tokens/train --block 7 --patches 100 --json block.json

For each patch: its tokens and text, the norm of the posterior's mean, the mean and the range of its
standard deviations, and the tokens that the decoder gives for the mean, where they differ.
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
        "--block", type=at_least(0), required=True, metavar="N", help="its number, from 0"
    )
    parser.add_argument(
        "--patches",
        type=at_least(0),
        default=16,
        metavar="N",
        help="patches that are shown one by one (default 16)",
    )
    parser.add_argument(
        "--autoencoder",
        type=Path,
        metavar="DIR",
        help="the store's autoencoder, which decodes the block (default: where it was)",
    )
    add_device(parser)
    add_json(parser)
    args = parser.parse_args()

    from calm_dist.cli.data_tools import describe, show_patches, show_sample

    block = describe(args.store, args.block, args.autoencoder, args.device)
    if args.json != "-":
        show_sample(args.block, block)
        show_patches(block, args.patches)
    if args.json:
        write_json({"block": args.block, **block}, args.json)


if __name__ == "__main__":
    run(main)
