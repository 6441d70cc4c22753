"""Work that one rank does for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from calm_dist.errors import UserError

T = TypeVar("T")


def on_rank_zero(work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 and hand its (picklable) result to every rank.

    A `UserError` or `OSError` of rank 0 is raised on every rank, so that none waits for another.
    """
    outcome: list[T | Exception | None] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [work()]
        except (UserError, OSError) as error:
            outcome = [error]
        except Exception as error:
            # A fault of ours, which this rank reports; the others must not wait for it.
            outcome = [RuntimeError(f"rank 0 failed: {type(error).__name__}: {error}")]
            dist.broadcast_object_list(outcome, src=0)
            raise
    dist.broadcast_object_list(outcome, src=0)
    result = outcome[0]
    if isinstance(result, Exception):
        if dist.get_rank() != 0:
            result.reported = True  # type: ignore[attr-defined]
        raise result
    return result  # type: ignore[return-value]
