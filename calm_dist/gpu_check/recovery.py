"""A training with asynchronous checkpoints is killed and resumes: equal to one that never was."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from calm_dist.gpu_check.parity import largest_difference
from calm_dist.gpu_check.worker import Check
from calm_dist.runs.metrics_file import read_records

STEPS, EVERY, KILLED_AFTER = 30, 5, 13
PATIENCE = 100
_PROGRAM = """
import sys
from calm_dist.cli.console import run
from calm_dist.recipe import load_recipe
from calm_dist.training.run import train
if __name__ == "__main__":
    run(lambda: train(load_recipe(sys.argv[1])))
"""
_TEXT = "the quick brown fox jumps over the lazy dog while seven wizards mix a potion "


def measure(check: Check) -> None:
    """Three runs at once: one that is killed and resumes, and two that are left alone, which show
    whether this device repeats its own numbers."""
    place = check.file.parent / "recovery"
    # Of an earlier check, whose runs have nothing left to do.
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    make_store(place)
    names = ("killed", "first", "second")
    recipes = {name: write_recipe(place, name, check.device) for name in names}
    processes = {name: _start(place, recipes[name]) for name in names}
    check.add(killed_at_step=_kill_at(processes["killed"], place / "killed", KILLED_AFTER))
    resumed = _start(place, recipes["killed"])
    for name, process in (("killed", resumed), *processes.items()):
        if process is not processes["killed"]:
            _end(process, name, place)
    check.add(**compare({name: losses(place / name) for name in names}))


def compare(found: dict[str, dict[int, float]]) -> dict[str, Any]:
    """Losses of the resumed run against those of the others, by step."""
    numbers = range(1, STEPS + 1)
    missing = {name: [n for n in numbers if n not in steps] for name, steps in found.items()}
    if any(missing.values()):
        raise RuntimeError(f"steps without a loss: {missing}")
    killed, first, second = ([found[name][n] for n in numbers] for name in found)
    different = [n for n, a, b in zip(numbers, killed, first, strict=True) if a != b]
    result: dict[str, Any] = {
        "losses": killed,
        "equal": not different,
        "repeats": first == second,
        "largest_difference": largest_difference(killed, first),
        "largest_difference_of_repetition": largest_difference(second, first),
    }
    if different:
        why = "two runs that nothing interrupts differ, too: kernels here add in varying order"
        if result["repeats"]:
            why = "unknown: runs that nothing interrupts are equal"
        result |= {"first_different_step": different[0], "why_not_equal": why}
    return result


def losses(run_dir: Path) -> dict[int, float]:
    """The last loss of each step."""
    records: list[dict[str, Any]] = [dict(record) for record in read_records(run_dir)]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def make_store(place: Path) -> None:
    """Latents of made-up text by an untrained autoencoder, in blocks of 64 tokens."""
    from calm_dist.data.latents import plan_store, write_store
    from calm_dist.models.autoencoder import Autoencoder, AutoencoderConfig
    from calm_dist.released.autoencoder import save_autoencoder
    from calm_dist.text.tokenizer import train_tokenizer

    words = _TEXT.split()
    text = " ".join(words[(i * i + i // 7) % len(words)] for i in range(20_000))
    corpus = place / "corpus.txt"
    corpus.write_text(text, encoding="utf-8")
    tokenizer = train_tokenizer([text], 300, place / "tokenizer.json")
    torch.manual_seed(0)
    config = AutoencoderConfig(
        vocab_size=tokenizer.vocab_size, latent_size=16, hidden_size=32, intermediate_size=64
    )
    autoencoder = Autoencoder(config).eval()
    (place / "autoencoder").mkdir(exist_ok=True)
    save_autoencoder(autoencoder, place / "autoencoder")
    plan = plan_store(
        [str(corpus)], tokenizer, variant="fp16", block_size=64, autoencoder=place / "autoencoder"
    )
    write_store(
        place / "store", [str(corpus)], tokenizer, plan, autoencoder=autoencoder, overwrite=True
    )


def write_recipe(place: Path, name: str, device: torch.device) -> Path:
    """The recipe of a small CALM whose run directory is ``name``."""
    file = place / f"{name}.yaml"
    file.write_text(
        f"""
run: {{dir: {place / name}}}
model:
  kind: calm
  latent_size: 16
  autoencoder: {place / "autoencoder"}
  hidden_size: 64
  intermediate_size: 128
  num_hidden_layers: 2
  num_attention_heads: 2
  head: {{num_mlp_layers: 1, num_samples: 4, posterior_samples: 8}}
data: {{path: {place / "store"}, block_size: 64}}
parallel: {{device: {device.type}}}
training: {{steps: {STEPS}, micro_batch_size: 4, global_batch_size: 8}}
precision: bf16
checkpoint: {{every: {EVERY}, keep: 2, async: true}}
logging: {{every: 1, wandb: off}}
""",
        encoding="utf-8",
    )
    return file


def _start(place: Path, recipe: Path) -> subprocess.Popen[bytes]:
    program = place / "train.py"
    program.write_text(_PROGRAM, encoding="utf-8")
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD", "LOCAL"))
    }
    with recipe.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, str(program), str(recipe)],
            env=inherited, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip


def _kill_at(process: subprocess.Popen[bytes], run_dir: Path, step: int) -> int:
    """Kill the process once it has taken a step; returns the last step that it took."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        if (run_dir / "metrics.jsonl").is_file() and max(losses(run_dir), default=0) >= step:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return max(losses(run_dir))
        time.sleep(0.02)
    raise RuntimeError(f"the run took no {step} steps in {PATIENCE} s; see killed.log")


def _end(process: subprocess.Popen[bytes], name: str, place: Path) -> None:
    code = process.wait(PATIENCE)
    if code:
        log = (place / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"the run {name} ended with exit code {code}: {log[-3000:]}")
