"""Work that rank 0 does for all ranks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch.distributed as dist

from calm_dist.errors import UserError

T = TypeVar("T")


def on_rank_zero(work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 and return its (picklable) result on every rank.

    A `UserError` or `OSError` of rank 0 is raised on every rank, so that none waits for another.
    """
    outcome: list[T | Exception | None] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [work()]
        except (UserError, OSError) as error:
            outcome = [error]
        except Exception as error:
            # A bug, which this rank reports; the others must not wait for it.
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


class RankZeroTask:
    """Work that rank 0 does in a thread while all ranks continue."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._future: Future[object] | None = None
        if dist.get_rank() == 0:
            thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rank zero")
            self._future = thread.submit(work)
            thread.shutdown(wait=False)

    def ended(self, wait: bool) -> bool:
        """Whether the work is done; a collective of the world, which raises as `on_rank_zero`."""

        def look() -> bool:
            assert self._future is not None
            if not wait and not self._future.done():
                return False
            self._future.result()
            return True

        return on_rank_zero(look)
