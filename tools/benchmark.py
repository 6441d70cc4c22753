#!/usr/bin/env python
"""Time parts of CALM and their plain formulation alternately in one process.

python tools/benchmark.py energy
python tools/benchmark.py brier --threads 1 --cpu-time --json brier.json
python tools/benchmark.py brier --runs runs/calm runs/transformer --data latents/test
python tools/benchmark.py energy --device cuda
python tools/benchmark.py heads --recipe recipes/calm_xl.yaml
python tools/benchmark.py model --device cuda --recipe recipes/calm_m.yaml precision=bf16
python tools/benchmark.py growth --plot growth.svg
python tools/benchmark.py ranks
python tools/benchmark.py inference runs/calm_m runs/transformer_s --batches 1 8 --plot speed.svg

The plain form is the paper's formula as its released code executes it: every tensor materialised, a
loop over all positions. Peak memory is the memory that a call adds to what was in use before it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import time
from collections.abc import Iterable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from calm_dist.cli.console import add_json, at_least, between, image_file, run, write_json
from calm_dist.errors import UserError

if TYPE_CHECKING:
    import torch

PAIRS = {
    "energy": "the energy score, forward and backward",
    "head": "the energy head with eight samples, forward and backward",
    "autoencoder": "a training step of the paper's autoencoder, and encoding",
    "step": "a whole training step of a small CALM",
    "brier": "evaluation of a block, Transformer and CALM, random weights or runs",
    "sampling": "generation at temperature 0.5 from pools of 200 draws, random weights or runs",
    "data": "from files to tokens, and reading stored latents in training order",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    for name, text in PAIRS.items():
        pair = parts.add_parser(name, help=text)
        pair.add_argument(
            "--threads", type=at_least(1), default=2, help="threads of torch, on CPUs; default: 2"
        )
        pair.add_argument(
            "--cpu-time",
            action="store_true",
            help="time the processor instead of the clock, for a CPU with other work; one thread",
        )
        if name in ("brier", "sampling"):
            _add_runs(pair)
        if name == "data":
            pair.add_argument(
                "--corpus",
                nargs="+",
                default=[],
                metavar="PATH",
                help="text of which the first 4 MiB are tokenized; default: Python's library",
            )
            pair.add_argument(
                "--tokenizer", metavar="F", help="default: a BPE of 8,192 entries, trained on them"
            )
        _add_common(pair)
    growth = parts.add_parser("growth", help="how time and memory grow with each size")
    growth.add_argument(
        "--threads", type=at_least(1), default=2, help="threads of torch; default: 2"
    )
    growth.add_argument(
        "--plot", type=image_file, metavar="F", help="draw the series to F (.svg or .png)"
    )
    _add_common(growth)
    ranks = parts.add_parser("ranks", help="one and two processes, pipelines and their bubbles")
    ranks.add_argument("--repeats", type=at_least(1), default=3, help="default: %(default)s")
    add_json(ranks)
    # Of gloo.
    ranks.set_defaults(device="cpu")
    heads = parts.add_parser("heads", help="one latent sample with each generative head")
    heads.add_argument("--recipe", default="recipes/calm_m.yaml", help="default: %(default)s")
    heads.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe")
    heads.add_argument("--positions", type=at_least(1), default=16, help="default: %(default)s")
    heads.add_argument("--samples", type=at_least(1), default=4, help="default: %(default)s")
    _add_common(heads)
    model = parts.add_parser(
        "model", help="training steps of a recipe on one device: tokens/s, MFU, memory, profile"
    )
    model.add_argument("--recipe", default="recipes/calm_m.yaml", help="default: %(default)s")
    model.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe")
    model.add_argument(
        "--micro-batches", type=at_least(1), default=8, help="per step; default: %(default)s"
    )
    model.add_argument(
        "--peak-tflops",
        type=between(1e-3, 1e6),
        metavar="X",
        help="peak TFLOP/s of the device, for MFU",
    )
    _add_common(model)
    inference = parts.add_parser(
        "inference", help="generation with two or more models in turns: speed, memory, FLOPs"
    )
    inference.add_argument(
        "models",
        nargs="+",
        metavar="RUN",
        help="run directory, checkpoint, released directory, or a recipe (random weights)",
    )
    inference.add_argument(
        "--batches",
        type=at_least(1),
        nargs="+",
        default=[1, 2, 4, 8, 16, 32, 64],
        help="numbers of texts; default: 1 to 64",
    )
    inference.add_argument(
        "--contexts",
        type=at_least(1),
        nargs="+",
        metavar="T",
        help="tokens of a prompt; default: half of the shortest block",
    )
    inference.add_argument(
        "--temperature",
        type=one_over_n,
        default=1.0,
        help="1 (default) or 1/n, for which a CALM draws pools",
    )
    inference.add_argument(
        "--new-tokens", type=at_least(1), default=16, help="timed tokens of a text; default: 16"
    )
    inference.add_argument(
        "--threads", type=at_least(1), default=2, help="threads of torch, on CPUs; default: 2"
    )
    inference.add_argument(
        "--plot", type=image_file, metavar="F", help="draw tokens/s against batch size to F"
    )
    _add_common(inference)
    args = parser.parse_args()
    if getattr(args, "cpu_time", False) and (args.device != "cpu" or args.threads != 1):
        parser.error("--cpu-time: is for one thread on the CPU; give --threads 1 --device cpu")
    if bool(getattr(args, "runs", None)) != bool(getattr(args, "data", None)):
        parser.error("--runs and --data: go together; give both or neither")
    return args


def one_over_n(text: str) -> float:
    """A type for argparse: 1/n, as a fraction or a number. Without pools, draws may never end."""
    value = between(1e-3, 1)(
        str(float(Fraction(text)) if re.fullmatch(r"1/[1-9]\d*", text) else text)
    )
    if abs(1 / value - round(1 / value)) > 1e-9 / value:
        raise argparse.ArgumentTypeError(f"{text}: give 1, or 1/n such as 1/2 or 0.5")
    return value


def _add_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs",
        nargs="+",
        metavar="RUN",
        help="trained models instead of random ones: run directories, checkpoints or released ones",
    )
    parser.add_argument("--data", metavar="STORE", help="a store whose first block the runs score")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=at_least(1), default=3, help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_json(parser)


def main() -> None:
    args = parse_arguments()
    if args.device == "cpu":
        # Before torch is imported: Megatron-core uses any GPU that it sees.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    result, text = _ranks(args) if args.part == "ranks" else _in_process(args)
    if args.json != "-":
        print(text)
    if args.json:
        write_json(result, args.json)
    if getattr(args, "plot", None):
        from calm_dist.benchmark import growth, inference

        if args.part == "growth":
            growth.plot(result["series"], args.plot)
        else:
            inference.plot(result, args.plot)


def _ranks(args: argparse.Namespace) -> tuple[Any, str]:
    from calm_dist.benchmark.ranks import measure_ranks, table

    result = measure_ranks(args.repeats)
    return result, table(result)


def _in_process(args: argparse.Namespace) -> tuple[Any, str]:
    import torch

    from calm_dist.parallel.launch import full_fp32

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU; use cpu, or a machine with a GPU")
    full_fp32()
    device = torch.device(args.device)
    if device.type == "cpu" and args.part not in ("heads", "model"):
        torch.set_num_threads(args.threads)
    parts = {"heads": _heads, "growth": _growth, "model": _model, "inference": _inference}
    return parts.get(args.part, _pairs)(args, device)


def _model(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, Any], str]:
    from calm_dist.benchmark.model import measure_model, one_device, table
    from calm_dist.recipe import LanguageModelRecipe, load_recipe

    given = load_recipe(args.recipe, args.overrides)
    if not isinstance(given, LanguageModelRecipe):
        raise UserError(
            f"{args.recipe}: is an autoencoder's recipe; use `benchmark.py autoencoder` for that"
        )
    recipe = one_device(given, args.micro_batches)
    result = measure_model(recipe, device, args.repeats, args.peak_tflops)
    return result, table(result)


def _inference(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, Any], str]:
    from calm_dist.benchmark.inference import measure_inference, open_model, table

    result = measure_inference(
        [open_model(path, device) for path in args.models],
        batches=args.batches,
        contexts=args.contexts,
        temperature=args.temperature,
        tokens=args.new_tokens,
        repeats=args.repeats,
    )
    return result, table(result)


def _growth(args: argparse.Namespace, device: torch.device) -> tuple[Any, str]:
    from calm_dist.benchmark.growth import measure_growth, table
    from calm_dist.benchmark.timing import environment

    series = measure_growth(device, args.repeats)
    return {**environment(device), "series": series}, table(series)


def _heads(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, Any], str]:
    from calm_dist.benchmark.heads import measure_heads, table
    from calm_dist.recipe import load_recipe

    result = measure_heads(
        load_recipe(args.recipe, args.overrides),
        positions=args.positions,
        samples=args.samples,
        repeats=args.repeats,
        device=device,
    )
    return result, table(result)


def _pairs(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, Any], str]:
    from calm_dist.benchmark import pairs, scoring_pairs, step
    from calm_dist.benchmark.compare import Pair, compare, table
    from calm_dist.benchmark.timing import environment

    made: Iterable[Pair]
    if args.part == "data":
        from calm_dist.benchmark.reading import store_pairs
        from calm_dist.benchmark.tokenizing import tokenizing_pairs

        made = itertools.chain(tokenizing_pairs(args.corpus, args.tokenizer), store_pairs(device))
    elif getattr(args, "runs", None):
        made = scoring_pairs.pairs_of_runs(args.part, args.runs, args.data, device)
    else:
        modules = {"step": step, "brier": scoring_pairs, "sampling": scoring_pairs}
        made = getattr(modules.get(args.part, pairs), f"{args.part}_pairs")(device)
    clock = time.process_time if args.cpu_time else time.perf_counter
    rows = [compare(pair, args.repeats, device, clock) for pair in made]
    return {"part": args.part, **environment(device), "rows": rows}, table(rows)


if __name__ == "__main__":
    run(main)
