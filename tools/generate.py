"""Continue prompts with a trained CALM or Transformer.

    python tools/generate.py --checkpoint runs/calm_m --prompt "The sea" --temperature 0.5
    python tools/generate.py --checkpoint runs/calm_m --prompt "The sea" --prompt "A house" \\
        --seed 1 --seed 2 --method exact --temperature 0.7 --json texts.json
    python tools/generate.py --checkpoint runs/calm_m --prompts prompts.jsonl --num-samples 4 \\
        --stop "\\n\\n" --json texts.jsonl
    torchrun --nproc-per-node 2 tools/generate.py --checkpoint runs/calm_xl --prompt "The sea"

The processes of torchrun share a model by tensor parallelism, whatever layout it was trained in.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from calm_dist.cli.console import (
    add_device,
    add_document_tokens,
    add_json,
    announce,
    at_least,
    run,
    utf8_text,
    write_json,
    write_json_lines,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from calm_dist.inference.generate import Generation
    from calm_dist.inference.loading import LoadedModel


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="run directory, checkpoint, or directory in the released layout",
    )
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument(
        "--prompt",
        type=utf8_text,
        action="append",
        help="text to continue, may be empty; repeat the option for a batch of prompts",
    )
    given.add_argument(
        "--prompts",
        metavar="FILE",
        type=Path,
        help='JSON lines {"prompt": "...", "seed": 1}, seed optional',
    )
    parser.add_argument(
        "--num-samples",
        type=at_least(1),
        default=1,
        help="texts for each prompt, with the seeds S, S+1, ... (default: 1)",
    )
    parser.add_argument(
        "--stop",
        type=stop_string,
        action="append",
        help="end a text before this string, in which \\n is a new line; may be repeated",
    )
    parser.add_argument(
        "--batch-size", type=at_least(1), default=32, help="texts at a time (default: 32)"
    )
    parser.add_argument(
        "--temperature",
        type=temperature,
        default=0.5,
        help="CALM: above 0, at most 1; Transformer, and CALM with the tokens head: 0 or more, "
        "where 0 takes the most likely token (ties: the lowest id); fractions such as 1/3 are "
        "accepted (default: 0.5)",
    )
    parser.add_argument("--max-new-tokens", type=at_least(1), default=128, help="default: 128")
    parser.add_argument(
        "--seed",
        type=at_least(0),
        action="append",
        help="one seed S: texts get S, S+1, ... in the order of the output; or one per prompt. The "
        "same prompt and seed give the same text (default: 0)",
    )
    parser.add_argument(
        "--method",
        choices=("auto", "exact", "pool"),
        default="auto",
        help="CALM: exact: rejection, any temperature; pool: a pool of draws, 1/n only, "
        "approximate; auto: pool if the temperature is 1/n, else exact (default). With the tokens "
        "head: exact draws whole patches; auto draws each token as a Transformer does (default)",
    )
    parser.add_argument(
        "--pool-size", type=at_least(1), default=200, help="draws in a pool (default: 200)"
    )
    parser.add_argument(
        "--max-draws",
        type=at_least(1),
        default=100_000,
        help="limit of the exact method for one patch (default: 100000)",
    )
    parser.add_argument(
        "--stream",
        action="store_true",
        help="print text as it is generated, several texts one after the other (default for one "
        "text on a terminal)",
    )
    parser.add_argument(
        "--reproducible",
        action="store_true",
        help="give a prompt the same text in any batch, bit for bit; slower (by default rounding "
        "depends on the batch, and can tip a draw between two tokens)",
    )
    parser.add_argument("--tokenizer", metavar="F", help="tokenizer file (default: the recipe's)")
    add_document_tokens(parser)
    parser.add_argument("--autoencoder", help="autoencoder checkpoint (default: the recipe's)")
    add_device(parser)
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of backbone and head (default: fp32); the autoencoder stays in fp32",
    )
    add_json(
        parser,
        "write the result to F, or stdout for -: a list for several texts; lines, batch by batch, "
        "if F ends in .jsonl, and to stdout with --prompts",
    )
    args = parser.parse_args()
    args.seed = args.seed or [0]
    count = len(args.prompt) if args.prompt else 1
    if len(args.seed) not in (1, count):
        what = f"{count} prompts" if args.prompt else "--prompts, whose lines may have their own"
        parser.error(
            f"argument --seed: {len(args.seed)} seeds for {what}; give one, or one for each"
        )
    return args


def stop_string(text: str) -> str:
    """A type for argparse: a string that is not empty, with \\n for a new line."""
    if not text:
        raise argparse.ArgumentTypeError("an empty string ends no text")
    return utf8_text(text).replace("\\n", "\n")


def temperature(text: str) -> float:
    """A type for argparse: a number of at least 0, or a fraction such as 1/3.

    The limits of a CALM are checked once the model is loaded.
    """
    try:
        value = float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a fraction") from None
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a finite number, 0 or more")
    return value


def texts_to_make(args: argparse.Namespace) -> list[tuple[str, int]]:
    """Prompt and seed of every text, the samples of a prompt one after the other."""
    if args.prompt:
        own = args.seed if len(args.seed) > 1 else [None] * len(args.prompt)
        given = list(zip(args.prompt, own, strict=True))
    else:
        from calm_dist.inference.prompts import read_prompts

        given = [(prompt.text, prompt.seed) for prompt in read_prompts(args.prompts)]
    # Texts with equal seeds would share their random numbers.
    return [
        (text, (args.seed[0] + number * args.num_samples if seed is None else seed) + sample)
        for number, (text, seed) in enumerate(given)
        for sample in range(args.num_samples)
    ]


def streamer(
    args: argparse.Namespace, wanted: list[tuple[str, int]]
) -> Callable[[int, str], None] | None:
    """A callback that prints text while it is generated, or None; prints the prompt."""
    on_terminal = len(wanted) == 1 and sys.stdout.isatty()
    if args.json == "-" or not (args.stream or on_terminal):
        return None
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]

    def show_piece(number: int, piece: str) -> None:
        print(piece, end="", flush=True)

    return show_piece


def show(
    args: argparse.Namespace,
    wanted: list[tuple[str, int]],
    results: list[Generation],
    seconds: float,
    streamed: bool,
) -> None:
    """Print the texts, what was left out of them, and how fast several were made."""
    if args.json != "-" and not streamed:
        # Characters that the terminal cannot show are printed as escapes.
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        texts = [text + new.text for (text, _), new in zip(wanted, results, strict=True)]
        print("\n\n".join(texts))
    for number, result in enumerate(results, start=1):
        if result.note:
            print(f"note: text {number}: {result.note}", file=sys.stderr)
    if len(results) > 1 or args.prompts:
        made = sum(len(result.tokens) for result in results)
        print(
            f"{len(results)} text{'s' * (len(results) > 1)}, {made:,} tokens in {seconds:.1f} s, "
            f"{made / seconds:,.0f} tokens/s",
            file=sys.stderr,
        )


def facts(
    args: argparse.Namespace,
    model: LoadedModel,
    wanted: list[tuple[str, int]],
    results: list[Generation],
) -> list[dict[str, Any]]:
    """What ``--json`` holds of each text."""
    return [
        {
            "checkpoint": str(model.checkpoint),
            "step": model.step,
            "prompt": text,
            "temperature": args.temperature,
            "seed": seed,
        }
        | asdict(result)
        for (text, seed), result in zip(wanted, results, strict=True)
    ]


def note_equal_seeds(wanted: list[tuple[str, int]]) -> None:
    """Say if texts have a seed in common, and with it their random numbers."""
    seed, times = Counter(seed for _, seed in wanted).most_common(1)[0]
    if times > 1:
        print(
            f"note: {times} texts have the seed {seed}, and thus the same random numbers; with "
            "--num-samples N, give seeds that are N apart",
            file=sys.stderr,
        )


def end_at(signal_number: int, frame: object) -> NoReturn:
    """Stop early, but still show and write the texts that are finished."""
    sys.exit(128 + signal_number)


def main() -> None:
    args = parse_arguments()
    wanted = texts_to_make(args)
    announce(f"loading {args.checkpoint} ...")

    from calm_dist.inference.load import load_text_model
    from calm_dist.parallel.launch import own_device, tensor_parallel_world

    world = tensor_parallel_world()
    loaded = load_text_model(
        args.checkpoint,
        tokenizer=args.tokenizer,
        begin_token=args.begin_token,
        end_token=args.end_token,
        autoencoder=args.autoencoder,
        device=str(own_device(args.device)),
        dtype=args.dtype,
        world=world,
    )
    stream = streamer(args, wanted)
    # Every process makes the same calls; the first one prints.
    speaks = world.rank == 0
    if speaks:
        note_equal_seeds(wanted)
    # Lines are written batch by batch: a job that is killed keeps what it finished.
    lines = str(args.json).endswith(".jsonl") or (args.json == "-" and args.prompts is not None)
    size = 1 if stream else args.batch_size
    started, results = time.monotonic(), []
    previous = signal.signal(signal.SIGTERM, end_at)
    try:
        for first in range(0, len(wanted), size):
            batch = wanted[first : first + size]
            if stream and speaks:
                print(("\n" if first else "") + batch[0][0], end="", flush=True)
            made = loaded.generate(
                [text for text, _ in batch],
                temperature=args.temperature,
                max_new_tokens=args.max_new_tokens,
                seed=[seed for _, seed in batch],
                method=args.method,
                pool_size=args.pool_size,
                max_draws=args.max_draws,
                stop=args.stop or (),
                reproducible=args.reproducible,
                on_text=stream if speaks else None,
                show_progress=stream is None and speaks,
            )
            results += made
            if stream and speaks:
                print()
            if lines and speaks:
                write_json_lines(
                    facts(args, loaded.model, batch, made), args.json, append=first > 0
                )
    finally:
        signal.signal(signal.SIGTERM, previous)
        # Also the texts from before an error, Ctrl-C or SIGTERM.
        if results and speaks:
            finished = wanted[: len(results)]
            show(args, finished, results, time.monotonic() - started, stream is not None)
            if args.json and not lines:
                values = facts(args, loaded.model, finished, results)
                write_json(values if len(values) > 1 else values[0], args.json)


if __name__ == "__main__":
    run(main)
