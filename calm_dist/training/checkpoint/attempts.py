"""Keeps the training alive when a checkpoint cannot be written."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from calm_dist.errors import CheckpointError

_log = logging.getLogger(__name__)


class Attempts:
    """Attempts of all ranks together to write checkpoints; an error is the same on all ranks.

    A failure (a full disk) is reported, earlier checkpoints are kept, and the next checkpoint is
    attempted when it is due. Only a failure of the last one is an error at the end.
    """

    def __init__(self) -> None:
        self._failure: str | None = None

    def make(self, temporary: Path, work: Callable[[], object]) -> None:
        """Do a part of writing ``temporary``; remove it if that fails."""
        try:
            work()
        except (CheckpointError, OSError) as error:
            self._failure = (
                f"{temporary}: {error}; there is no checkpoint of this step, earlier ones are "
                "unchanged"
            )
            if dist.get_rank() == 0:
                _log.warning(self._failure)
                shutil.rmtree(temporary, ignore_errors=True)

    def forget(self) -> None:
        """Forget the failure of the previous checkpoint, because another one begins."""
        self._failure = None

    def finish(self) -> None:
        """Raises CheckpointError, on every rank, if the last checkpoint could not be written."""
        if self._failure is not None:
            error = CheckpointError(self._failure)
            error.reported = True  # type: ignore[attr-defined]
            raise error
