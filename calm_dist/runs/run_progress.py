"""Counters of a run's progress, and the limit of skipped steps."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from calm_dist.errors import TrainingDivergedError


@dataclass
class RunProgress:
    """Counters of a run, the same on every rank; saved in checkpoints."""

    step: int = 0
    """Steps taken, skipped ones included."""
    adam_steps: int = 0
    """Updates that the optimizers made."""
    skipped_in_a_row: int = 0
    adam_steps_before: int = 0
    """Number of these updates that were made in the run that this one continues."""
    continued_from: str | None = None
    """The checkpoint of that run."""

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> RunProgress:
        """The counters in a checkpoint's state."""
        return cls(**{field.name: state[field.name] for field in fields(cls)})

    @classmethod
    def continuing(cls, directory: Path, adam_steps: int) -> RunProgress:
        """The counters of a run that takes over weights and moments after ``adam_steps``."""
        return cls(
            adam_steps=adam_steps, adam_steps_before=adam_steps, continued_from=str(directory)
        )

    def count(self, skipped: bool, max_skipped: int) -> None:
        """Count a step that was taken.

        Raises:
            TrainingDivergedError: more than ``max_skipped`` steps in a row were skipped.
        """
        self.step += 1
        self.adam_steps += not skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row > max_skipped:
            raise TrainingDivergedError(
                f"step {self.step}: loss or gradient not finite for {self.skipped_in_a_row} steps "
                f"in a row (health.max_skipped_steps={max_skipped})"
            )
