"""Measure trainings of several sizes and layouts on this machine and print them beside the plan.

    PYTHONPATH=. python tests/distributed/planner_validation.py OUT [--ranks 1 2] [--layouts DP2]

Makes a small store in OUT first, from the standard library's text. Every process has one thread.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from launches import run_worker
from planner_jobs import WORKER, compare_bytes, compare_seconds, job

BLOCK, VOCABULARY, LATENT = 1024, 4096, 64
HEADS = ["model.latent_size=64", "model.head.num_samples=8", "model.head.posterior_samples=100"]
# Kind, hidden size, layout.
CASES = {
    1: [(kind, hidden, "one") for hidden in (256, 512, 768) for kind in ("calm", "transformer")],
    2: [
        (kind, 384, layout)
        for layout in ("DP2", "TP2", "TP2 SP", "PP2")
        for kind in ("calm", "transformer")
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--layouts", nargs="*", help="only these, such as DP2 TP2")
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    make_store(out)
    for ranks in arguments.ranks:
        jobs = [
            job(
                kind,
                layout,
                common(out, kind, hidden),
                out / f"{kind} {hidden} {layout}.json",
                steps=arguments.steps,
            )
            for kind, hidden, layout in CASES[ranks]
            if layout in (arguments.layouts or [layout])
        ]
        run_worker(ranks, WORKER, jobs, out)
        for one in jobs:
            show(one, ranks)


def common(out: Path, kind: str, hidden: int) -> list[str]:
    """Sizes of a small model: 4 layers, 8 blocks of 1,024 tokens a step, 2 a micro-batch."""
    overrides = [
        f"run.dir={out / 'run'}",
        f"data.path={out / 'store'}",
        f"data.block_size={BLOCK}",
        f"model.vocab_size={VOCABULARY}",
        f"model.hidden_size={hidden}",
        f"model.intermediate_size={-(-8 * hidden // 3 // 64) * 64}",
        "model.num_hidden_layers=4",
        "training.steps=100000",
        "training.global_batch_size=8",
        "training.micro_batch_size=2",
        "logging.wandb=off",
    ]
    if kind == "calm":
        overrides += [*HEADS, f"model.autoencoder={out / 'autoencoder'}"]
    return overrides


def show(one: dict[str, Any], ranks: int) -> None:
    name = Path(one["out"]).stem
    for row in compare_bytes(one, ranks):
        shown = "  ".join(
            f"{what} {row[what] / 1e6:.0f} MB, predicted {row[f'{what}_predicted'] / 1e6:.0f} "
            f"({row[f'{what}_predicted'] / row[what] - 1:+.1%})"
            for what in ("kept", "saved", "peak")
        )
        print(f"{name}, stage {row['stage']}: {shown}")
    if one["steps"]:
        seconds, predicted, ratio = compare_seconds(one, ranks)
        print(f"{name}: {seconds:.2f} s a step, predicted {predicted:.2f} ({ratio - 1:+.1%})")


def make_store(out: Path) -> None:
    """Latents by an untrained autoencoder, once."""
    if (out / "store" / "meta.json").exists():
        return
    import torch

    from calm_dist.data.latents import plan_store, write_store
    from calm_dist.interop.huggingface import save_autoencoder
    from calm_dist.models.autoencoder import Autoencoder, AutoencoderConfig
    from calm_dist.text.tokenizer import train_tokenizer

    (out / "autoencoder").mkdir(parents=True, exist_ok=True)
    library = sorted(Path(json.__file__).parents[1].glob("*.py"))[:60]
    text = "\n".join(path.read_text(encoding="utf-8") for path in library)
    corpus = out / "corpus.txt"
    corpus.write_text(text, encoding="utf-8")
    tokenizer = train_tokenizer([text[:400_000]], VOCABULARY, out / "tokenizer.json")
    torch.manual_seed(0)
    config = AutoencoderConfig(
        vocab_size=VOCABULARY, latent_size=LATENT, hidden_size=64, intermediate_size=128
    )
    autoencoder = Autoencoder(config).eval()
    save_autoencoder(autoencoder, out / "autoencoder")
    plan = plan_store(
        [str(corpus)],
        tokenizer,
        variant="fp16",
        block_size=BLOCK,
        patch_size=None,
        autoencoder=out / "autoencoder",
        seed=0,
    )
    write_store(out / "store", [str(corpus)], tokenizer, plan, autoencoder=autoencoder)


if __name__ == "__main__":
    main()
