"""Training batches, read and copied to the device one step ahead."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch
import torch.distributed as dist

from calm_dist.data.stream import Batch
from calm_dist.errors import DataError, first_failure, plain_failure


def copied(batch: Batch, device: torch.device | None) -> Batch:
    """A batch on a device, without a wait for the copy; ``index``, which the host reads, stays."""
    if device is None or device.type != "cuda":
        return batch
    return {
        name: tensor if name == "index" else tensor.pin_memory().to(device, non_blocking=True)
        for name, tensor in batch.items()
    }


class LookAhead:
    """The batches of a rank. Each rank reads its next batch before the ranks synchronize at the end
    of a step: if one cannot, all stop together after this step, with a checkpoint.

    On a GPU, the copy of a batch begins when it is read, from pinned memory and beside the kernels
    of the step that is under way; nothing waits for it but the kernels that use it.
    """

    def __init__(
        self,
        stream: Iterable[Batch],
        device: torch.device | None = None,
        names: Collection[str] | None = None,
    ) -> None:
        """
        Args:
            device: where the batches are used; None: they stay on the CPU.
            names: what of them is used; None: everything.
        """
        self._batches: Iterator[Batch] = iter(stream)
        self._device, self._names = device, names
        on_gpu = device is not None and device.type == "cuda" and torch.cuda.is_available()
        self._copies = torch.cuda.Stream(device) if on_gpu else None
        self._next: Batch | None = None
        self._failure: DataError | None = None

    @property
    def failed(self) -> bool:
        """Whether the next batch could not be read."""
        return self._failure is not None

    def read(self) -> None:
        """Read the next batch; keep a failure for `check`."""
        try:
            batch = next(self._batches)
        except DataError as error:
            self._failure = error
            return
        if self._names is not None:
            batch = {name: batch[name] for name in self._names}
        with torch.cuda.stream(self._copies):
            self._next = copied(batch, self._device)

    def close(self) -> None:
        """End the reading; a batch or a failure that has been read stays."""
        # A generator ends with its last reference.
        self._batches = iter(())

    def take(self) -> Batch:
        """The batch that `read` has read."""
        batch, self._next = self._next, None
        assert batch is not None
        if self._copies is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._copies)
            for tensor in batch.values():
                if tensor.is_cuda:
                    # Its memory must not be reused before the kernels of this stream are done.
                    tensor.record_stream(current)
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
