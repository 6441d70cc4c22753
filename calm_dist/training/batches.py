"""Training batches, read one step ahead so that a failing reader is known in time."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist

from calm_dist.data.stream import Batch
from calm_dist.errors import DataError, first_failure, plain_failure


class LookAhead:
    """The batches of a rank. Each rank reads its next batch before the ranks synchronize at the end
    of a step: if one cannot, all stop together after this step, with a checkpoint."""

    def __init__(self, stream: Iterable[Batch]) -> None:
        self._batches = iter(stream)
        self._next: Batch | None = None
        self._failure: DataError | None = None

    @property
    def failed(self) -> bool:
        """Whether the next batch could not be read."""
        return self._failure is not None

    def read(self) -> None:
        """Read the next batch; keep a failure for `check`."""
        try:
            self._next = next(self._batches)
        except DataError as error:
            self._failure = error

    def take(self) -> Batch:
        """The batch that `read` has read."""
        batch, self._next = self._next, None
        assert batch is not None
        return batch

    def check(self) -> None:
        """Exchange failures with all ranks; a collective of the world.

        Raises:
            DataError: the failure of the first rank that has one, on every rank; see
                `first_failure`.
        """
        failures: list[DataError | None] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, self._failure and plain_failure(self._failure))
        found = first_failure(failures)
        if found is not None:
            rank, failure = found
            error = type(failure)(f"rank {rank}: {failure}")
            error.reported = True  # type: ignore[attr-defined]
            raise error
