"""A checkpoint that cannot be written costs only itself, not the training."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from calm_dist.errors import CheckpointError

_log = logging.getLogger(__name__)


class Attempts:
    """Attempts to write checkpoints, made by all ranks together, with an error equal on all.

    A failure (a full disk) is reported, and the ones before it stay; the next one is tried when it
    is due. Only that the last one failed is an error in the end.
    """

    def __init__(self) -> None:
        self._failure: str | None = None

    def make(self, temporary: Path, work: Callable[[], object]) -> None:
        """Do a part of writing ``temporary``, which is removed if that fails."""
        try:
            work()
        except (CheckpointError, OSError) as error:
            self._failure = (
                f"{temporary}: {error}; no checkpoint of this step, those before it are as they "
                "were"
            )
            if dist.get_rank() == 0:
                _log.warning(self._failure)
                shutil.rmtree(temporary, ignore_errors=True)

    def forget(self) -> None:
        """Another checkpoint is begun: what happened to the one before is made up for."""
        self._failure = None

    def finish(self) -> None:
        """Raises CheckpointError, on every rank, if the last checkpoint could not be written."""
        if self._failure is not None:
            error = CheckpointError(self._failure)
            error.reported = True  # type: ignore[attr-defined]
            raise error
