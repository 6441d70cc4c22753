"""The user's own command at paper size, on one CPU process and a vocabulary of 128,256."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from warm import warm_python

from calm_dist.data.store import read_meta
from calm_dist.runs.checkpoints import find_checkpoint
from calm_dist.runs.metrics_file import read_records
from calm_dist.text.tokenizer import BEGIN, END, PAD, load_tokenizer

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools"
CALM_M = ROOT / "recipes" / "calm_m.yaml"
VOCABULARY = 128_256
# A step of CALM-M takes one minute on two idle cores; a shared machine can be many times slower.
TIMEOUT_SECONDS = 3600


def run(command: list[str | Path], directory: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=directory,
        # As a user's machine: all cores, and no launcher around it.
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )


def tool(name: str, *arguments: str | Path) -> None:
    done = run([sys.executable, TOOLS / name, *arguments])
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


def deepspeed(
    directory: Path, *arguments: str | Path, python: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    """Launch ``tools/train.py`` in a directory on one process, away from the default port."""
    launcher = Path(sys.executable).with_name("deepspeed")
    port = 20_000 + os.getpid() % 10_000
    command = [python, launcher, "--master_port", str(port), TOOLS / "train.py", *arguments]
    return run(command, directory)


def write_tokenizer(path: Path) -> None:
    """A byte-level BPE of Llama 3's size that is not trained: bytes, then all pairs of bytes, then
    the first of all threes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [BEGIN, END, PAD]
    pairs = [first + second for first in alphabet for second in alphabet]
    merges = list(
        itertools.islice(
            itertools.product([*alphabet, *pairs], alphabet),
            VOCABULARY - len(alphabet) - len(special),
        )
    )
    entries = [*special, *alphabet, *("".join(merge) for merge in merges)]
    bpe = tokenizers.Tokenizer(
        models.BPE({entry: number for number, entry in enumerate(entries)}, merges)
    )
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(special)
    path.write_text(bpe.to_str(), encoding="utf-8")


@pytest.fixture(scope="module")
def paper_size_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks of 2,048 patches, encoded by the paper's autoencoder after one step of training."""
    root = tmp_path_factory.mktemp("paper_size")
    tokenizer, corpus = root / "tokenizer.json", root / "corpus.txt"
    write_tokenizer(tokenizer)
    corpus.write_bytes(Path(argparse.__file__).read_bytes())
    encode: list[str | Path] = ["--tokenizer", tokenizer, "--corpus", corpus]
    tool("encode_latents.py", *encode, "--variant", "tokens", "--patch-size", "4",
         "--block-size", "2048", "--out", root / "tokens")  # fmt: skip
    tool("train_autoencoder.py", ROOT / "recipes" / "autoencoder.yaml", "training.steps=1",
         "training.micro_batch_size=1", "training.global_batch_size=1",
         f"data.path={root / 'tokens'}", f"run.dir={root / 'autoencoder'}")  # fmt: skip
    tool("encode_latents.py", *encode, "--autoencoder", root / "autoencoder",
         "--block-size", "8192", "--out", root / "latents")  # fmt: skip
    return root / "latents"


@pytest.mark.full
def test_calm_m_trains_a_step(paper_size_store: Path, tmp_path: Path) -> None:
    meta = read_meta(paper_size_store)
    assert meta.vocab_size == load_tokenizer(paper_size_store).vocab_size == VOCABULARY
    done = deepspeed(tmp_path, CALM_M, f"data.path={paper_size_store}", "training.steps=1",
                     "training.micro_batch_size=1", "training.global_batch_size=1",
                     f"run.dir={tmp_path / 'run'}")  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    records: list[dict[str, Any]] = [dict(found) for found in read_records(tmp_path / "run")]
    (record,) = records
    assert record["tokens"] == 8192 and record["skipped"] == 0
    assert math.isfinite(record["loss"]) and record["grad_norm"] > 0
    state = json.loads((find_checkpoint(tmp_path / "run") / "state.json").read_text())
    assert state["step"] == state["adam_steps"] == 1
    # 5 GB, which pytest would keep for the next three runs.
    shutil.rmtree(tmp_path / "run")


def test_without_data_it_says_what_to_set_and_how_to_make_it(tmp_path: Path) -> None:
    small = ("training.steps=1", "training.micro_batch_size=1", "training.global_batch_size=1")
    done = deepspeed(tmp_path, CALM_M, *small, python=warm_python())
    assert done.returncode == 2
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "data/latents/train: no such directory" in message
    assert "set data.path" in message and "python tools/encode_latents.py" in message
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())
