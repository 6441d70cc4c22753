"""Sizes of chunks and buckets, shared by the code that computes or reduces them and the planner,
which counts their memory. Needs no torch."""

from __future__ import annotations

SCORE_POSITIONS = 64
"""Positions scored at a time (`losses.energy`): their draws fit a cache."""
LOGITS = 44_000_000
"""Logits in memory at a time in a loss (`losses.linear_cross_entropy`), 168 MiB in fp32. Fewer rows
make the matrix products slower: with 128k words, 256 rows cost 10% more than 512, and 512 cost no
more than 1,024."""
GPU_LOGITS = 1 << 28
"""The same for a language model's output layer on GPUs, 1 GiB in fp32. In bf16 each chunk also
reads and writes an fp32 gradient of the whole layer: at a width of 1,024 an eighth of the bytes
that the logits of 2,093 rows move, but half of those of 512 rows."""
ZERO_BUCKET_ELEMENTS = 500_000_000
"""The largest bucket in which DeepSpeed reduces gradients (`parallel.zero_head`): its own
default."""


def output_logits(on_cpu: bool) -> int:
    """Logits in memory at a time in the loss of a language model's output layer."""
    return LOGITS if on_cpu else GPU_LOGITS


def rows_at_once(rows: int, words: int, logits: int) -> int:
    """Rows of a chunk of at most ``logits``, of a loss over ``rows`` rows and a rank's ``words``:
    equal chunks, of whole rows."""
    parts = -(-rows // max(1, logits // words))
    return -(-rows // parts)
