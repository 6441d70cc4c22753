"""Continue prompts with a trained CALM or Transformer.

    python tools/generate.py --checkpoint runs/calm_m --prompt "The sea" --temperature 0.5
    python tools/generate.py --checkpoint runs/calm_m --prompt "The sea" --prompt "A house" \\
        --seed 1 --seed 2 --method exact --temperature 0.7 --json texts.json
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict
from fractions import Fraction

from calm_dist.cli.console import add_json, announce, at_least, run, write_json


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="run directory or checkpoint")
    parser.add_argument(
        "--prompt",
        type=prompt,
        action="append",
        required=True,
        help="text to continue, may be empty; repeat the option for a batch of prompts",
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
        help="give one seed, or one per prompt; the same prompt and seed give the same text "
        "(default: 0)",
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
    parser.add_argument("--tokenizer", metavar="F", help="tokenizer file (default: the recipe's)")
    for role in ("begin", "end"):
        parser.add_argument(
            f"--{role}-token",
            metavar="NAME",
            help=f"the tokenizer's token that {role}s documents (default: the recipe's)",
        )
    parser.add_argument("--autoencoder", help="autoencoder checkpoint (default: the recipe's)")
    add_json(parser, "write the result (a list for several prompts) to F, or stdout for -")
    args = parser.parse_args()
    args.seed = args.seed or [0]
    if len(args.seed) not in (1, len(args.prompt)):
        parser.error(
            f"argument --seed: {len(args.seed)} seeds for {len(args.prompt)} prompts; give one, "
            "or one for each"
        )
    return args


def prompt(text: str) -> str:
    """A type for argparse: text. Bytes that are not UTF-8 arrive as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8") from None
    return text


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


def main() -> None:
    args = parse_arguments()
    announce(f"loading {args.checkpoint} ...")

    from calm_dist.data.tokenizer import load_tokenizer
    from calm_dist.inference.generate import find_tokenizer, generate, token_names
    from calm_dist.inference.load import load_model

    model = load_model(args.checkpoint, autoencoder=args.autoencoder)
    seeds = args.seed if len(args.seed) > 1 else args.seed * len(args.prompt)
    results = generate(
        model,
        load_tokenizer(
            args.tokenizer or find_tokenizer(model),
            *token_names(model, args.begin_token, args.end_token),
        ),
        args.prompt,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        seed=seeds,
        method=args.method,
        pool_size=args.pool_size,
        max_draws=args.max_draws,
        show_progress=True,
    )
    if args.json != "-":
        # Characters that the terminal cannot show are printed as escapes.
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        texts = [text + new.text for text, new in zip(args.prompt, results, strict=True)]
        print("\n\n".join(texts))
    for number, result in enumerate(results, start=1):
        if result.note:
            print(f"note: prompt {number}: {result.note}", file=sys.stderr)
    if args.json:
        facts = [
            {
                "checkpoint": str(model.checkpoint),
                "step": model.step,
                "prompt": text,
                "temperature": args.temperature,
                "seed": seed,
            }
            | asdict(result)
            for text, seed, result in zip(args.prompt, seeds, results, strict=True)
        ]
        write_json(facts if len(facts) > 1 else facts[0], args.json)


if __name__ == "__main__":
    run(main)
