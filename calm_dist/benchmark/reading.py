"""Reading latents in training order, with our stream and with plain Streaming."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from calm_dist.benchmark.compare import Pair
from calm_dist.benchmark.step import step_pairs
from calm_dist.benchmark.timing import median_seconds
from calm_dist.data import parts
from calm_dist.data.latents import SHARD_BYTES
from calm_dist.data.store import AutoencoderInfo, StorePlan, TokenizerInfo
from calm_dist.data.stream import open_training_stream
from calm_dist.text.tokenizer import train_tokenizer

BLOCKS, BATCH = 480, 4


def store_pairs(device: torch.device) -> Iterator[Pair]:
    """0.5 GB of shuffled blocks of 8,192 tokens with fp16 latents of the paper's size.

    The last entry of the sizes is the rate at which the benchmark's training step consumes tokens.
    """
    from calm_dist.compat.streaming import StreamingDataset

    (step,) = step_pairs(device)
    consumed = step.work / median_seconds(step.ours, 3, device)
    with tempfile.TemporaryDirectory(prefix="calm-reading-") as directory:
        plan = write_random_store(Path(directory), BLOCKS)
        batches = iter(open_training_stream([directory], batch_size=BATCH))
        dataset = StreamingDataset(local=directory, shuffle=True, batch_size=BATCH)
        loader = DataLoader(dataset, batch_size=BATCH)

        def ours() -> None:
            for batch in itertools.islice(batches, BLOCKS // BATCH):
                batch["mean"].sum()

        def plainly() -> None:
            for batch in loader:
                batch["mean"].float().sum()

        yield Pair(
            "reading latents in training order",
            ours,
            plainly,
            BLOCKS * plan.sample_bytes / 1e6,
            "MB",
            {
                "blocks": BLOCKS,
                "tokens_per_mb": plan.block_size / plan.sample_bytes * 1e6,
                "tokens_per_second_of_a_step": consumed,
            },
        )


def write_random_store(
    out: Path, blocks: int, *, shard_bytes: int = SHARD_BYTES, block_size: int = 8192
) -> StorePlan:
    """Write a store of random tokens and latents with K=4 and l=128."""
    texts = ["Reading is timed, not understood."]
    tokenizer = train_tokenizer(texts, 300, out / "tokenizer.json")
    plan = StorePlan(
        variant="fp16",
        block_size=block_size,
        patch_size=4,
        latent_size=128,
        vocab_size=tokenizer.vocab_size,
        tokenizer=TokenizerInfo(
            sha256=tokenizer.fingerprint,
            file="tokenizer.json",
            begin_id=tokenizer.begin_id,
            end_id=tokenizer.end_id,
            pad_id=tokenizer.pad_id,
        ),
        autoencoder=AutoencoderInfo(sha256="0" * 64, file="none"),
        corpus_sha256="0" * 64,
        seed=0,
    )
    rng = np.random.default_rng(0)
    shape = (plan.num_patches, 128)

    def sample() -> dict[str, np.ndarray]:
        tokens = rng.integers(plan.vocab_size, size=plan.block_size, dtype=np.uint32)
        mean, log_std = rng.standard_normal((2, *shape), np.float32).astype(np.float16)
        return {"tokens": tokens, "mean": mean, "log_std": log_std}

    per_shard = max(1, shard_bytes // plan.sample_bytes)
    parts.begin(out, plan, per_shard)
    numbers = range(-(-blocks // per_shard))
    for shard in numbers:
        count = min(per_shard, blocks - shard * per_shard)
        parts.write_shard(out, 0, shard, plan, (sample() for _ in range(count)))
    parts.complete_part(out, 0, len(numbers))
    parts.merge(out, tokenizer)
    parts.remove_parts(out)
    return plan
