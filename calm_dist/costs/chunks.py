"""How much is computed or reduced at a time, by the code that does it, for which the planner counts
the memory. Needs no torch."""

from __future__ import annotations

SCORE_POSITIONS = 64
"""Positions scored at a time (`losses.energy`): their draws fit a cache."""
LOGITS = 44_000_000
"""Logits in memory at a time in an autoencoder's loss (`losses.linear_cross_entropy`), 168 MiB in
fp32. Fewer rows make the matrix products slower: with 128k words, 256 rows cost 10% more than 512,
and 512 cost no more than 1,024."""
ZERO_BUCKET_ELEMENTS = 500_000_000
"""The largest bucket in which DeepSpeed reduces gradients (`parallel.zero_head`): its own
default."""
