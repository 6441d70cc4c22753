"""Import and export checkpoints in the layout of the authors' released CALM models.

    python tools/convert_checkpoint.py import-hf CALM-M runs/calm_m
    python tools/train.py runs/calm_m/recipe.yaml data.path=data/latents/train

    python tools/convert_checkpoint.py export-hf runs/calm_m exported

Importing a language model creates a run directory with one checkpoint of step 0. It can be
evaluated, sampled and trained like any other, with a fresh optimizer. An autoencoder is converted
into a directory that encode_latents.py and recipes accept.
"""

from __future__ import annotations

import argparse
import sys

from calm_dist.cli.console import add_json, run, write_json


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    importing = commands.add_parser("import-hf", help="from the released layout into ours")
    importing.add_argument("source", metavar="SRC", help="directory of a released checkpoint")
    importing.add_argument(
        "--tokenizer", metavar="F", help="tokenizer file (default: the one in SRC, if any)"
    )
    exporting = commands.add_parser("export-hf", help="from ours into the released layout")
    exporting.add_argument("source", metavar="SRC", help="run directory or checkpoint")
    for command in (importing, exporting):
        command.add_argument("target", metavar="DST", help="new directory")
        command.add_argument(
            "--autoencoder",
            metavar="DIR",
            help="CALM: the autoencoder's directory (default: from config or recipe)",
        )
        add_json(command, "write a report of the conversion to F, or - (stdout)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()

    from calm_dist.interop.convert import export_checkpoint, import_checkpoint

    if args.command == "import-hf":
        done = import_checkpoint(args.source, args.target, args.autoencoder, args.tokenizer)
    else:
        done = export_checkpoint(args.source, args.target, args.autoencoder)
    # The report must not mix with JSON on stdout.
    output = sys.stderr if args.json == "-" else sys.stdout
    print(f"{done['target']}: {done['kind']}, {done['parameters']:,} parameters", file=output)
    for note in done["notes"]:
        print(f"note: {note}", file=output)
    if args.json:
        write_json(done, args.json)


if __name__ == "__main__":
    run(main)
