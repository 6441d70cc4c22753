"""Continue a prompt with a trained CALM or Transformer."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from fractions import Fraction

from calm_dist.cli import at_least, run, write_json


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="run directory or checkpoint")
    parser.add_argument("--prompt", required=True, help="text to continue; may be empty")
    parser.add_argument(
        "--temperature",
        type=temperature,
        default=0.5,
        help="CALM: above 0, at most 1, also as 1/3 (default: 0.5)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, help="default: 128")
    parser.add_argument(
        "--seed", type=at_least(0), default=0, help="same seed, same text (default: 0)"
    )
    parser.add_argument(
        "--method",
        choices=("auto", "exact", "pool"),
        default="auto",
        help="CALM: rejection (any temperature), a pool of draws (1/n only, approximate), or the "
        "pool where the temperature is 1/n (default)",
    )
    parser.add_argument("--pool-size", type=int, default=200, help="draws in a pool (default: 200)")
    parser.add_argument(
        "--max-draws",
        type=int,
        default=100_000,
        help="limit of the exact method for one patch (default: 100000)",
    )
    parser.add_argument("--tokenizer", metavar="F", help="tokenizer file (default: the recipe's)")
    parser.add_argument("--autoencoder", help="autoencoder checkpoint (default: the recipe's)")
    parser.add_argument("--json", metavar="F", help="write the result to F, or stdout for -")
    return parser.parse_args()


def temperature(text: str) -> float:
    """A number, or a fraction such as 1/3."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a fraction") from None


def main() -> None:
    args = parse_arguments()

    from calm_dist.data.tokenizer import load_tokenizer
    from calm_dist.evaluation.generate import find_tokenizer, generate
    from calm_dist.evaluation.load import load_model

    model = load_model(args.checkpoint, autoencoder=args.autoencoder)
    result = generate(
        model,
        load_tokenizer(args.tokenizer or find_tokenizer(model)),
        args.prompt,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        method=args.method,
        pool_size=args.pool_size,
        max_draws=args.max_draws,
    )
    if args.json != "-":
        print(args.prompt + result.text)
    if args.json:
        facts = {
            "checkpoint": str(model.checkpoint),
            "step": model.step,
            "prompt": args.prompt,
            "temperature": args.temperature,
            "seed": args.seed,
        }
        write_json(facts | asdict(result), args.json)


if __name__ == "__main__":
    run(main)
