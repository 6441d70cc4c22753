"""Turn text into the vectors of an autoencoder, one for K tokens, and vectors into text.

    python tools/encode_text.py --autoencoder runs/autoencoder --text "The sea" --out sea.npz
    python tools/encode_text.py --autoencoder runs/autoencoder --vectors sea.npz
    python tools/encode_text.py --autoencoder runs/autoencoder --file chapter.txt --sample 0

Without --out the text goes to vectors and back, and is printed. The .npz file has the arrays mean
and log_std [patches, latent size].
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from calm_dist.cli.console import (
    add_device,
    add_document_tokens,
    add_json,
    announce,
    at_least,
    run,
    utf8_text,
    writable_file,
    write_json,
)
from calm_dist.errors import UserError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--autoencoder",
        required=True,
        metavar="CKPT",
        help="run directory, checkpoint, or directory in the released layout",
    )
    parser.add_argument(
        "--tokenizer", metavar="F", help="tokenizer file (default: the autoencoder's own)"
    )
    add_document_tokens(parser)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--text", type=utf8_text, help="text to encode")
    given.add_argument("--file", type=Path, metavar="F", help="UTF-8 text file to encode")
    given.add_argument("--vectors", metavar="F", help=".npz file of vectors to decode")
    parser.add_argument(
        "--out", type=writable_file, metavar="F", help="write the vectors to this .npz file"
    )
    parser.add_argument(
        "--sample",
        type=at_least(0),
        metavar="SEED",
        help="decode a sample of each posterior (default: its mean)",
    )
    add_device(parser)
    add_json(parser, "write text, restored text and sizes to F, or stdout for -")
    args = parser.parse_args()
    if args.vectors and args.out:
        parser.error("argument --out: is for --text and --file; --vectors are decoded to text")
    return args


def given_text(args: argparse.Namespace) -> str | None:
    """The text to encode; None if vectors are given."""
    if args.file is None:
        return args.text
    try:
        return args.file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--file {args.file}: cannot be read as UTF-8 text ({error})") from error


def main() -> None:
    args = parse_arguments()
    text = given_text(args)
    announce("loading libraries ...")

    from calm_dist.data.text_vectors import TextVectors, decode_vectors, encode_text
    from calm_dist.parallel.launch import own_device
    from calm_dist.released.autoencoder import load_autoencoder
    from calm_dist.training.resolve import autoencoder_directory, autoencoder_tokenizer

    directory = autoencoder_directory(args.autoencoder)
    tokenizer = autoencoder_tokenizer(directory, args.tokenizer, args.begin_token, args.end_token)
    autoencoder = load_autoencoder(directory).to(own_device(args.device))
    if text is None:
        vectors = TextVectors.load(args.vectors)
    else:
        vectors = encode_text(autoencoder, tokenizer, text)
    if args.out:
        vectors.save(args.out)
    latents = vectors.mean if args.sample is None else vectors.sample(args.sample)
    restored = decode_vectors(autoencoder, tokenizer, latents)
    patches, size = vectors.mean.shape
    if args.json != "-":
        print(f"{args.out}: {patches} vectors of {size}" if args.out else restored)
    if text is not None and restored != text:
        print("note: the restored text differs from the text", file=sys.stderr)
    if args.json:
        facts = {"text": text, "restored": restored, "vectors": patches, "latent_size": size}
        write_json(facts, args.json)


if __name__ == "__main__":
    run(main)
