"""How far a run is, and when it gives up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from calm_dist.errors import TrainingDivergedError


@dataclass
class RunProgress:
    """Counters of a run, the same on every rank; a checkpoint holds them."""

    step: int = 0
    """Steps taken, skipped ones included."""
    adam_steps: int = 0
    """Updates that the optimizers made."""
    skipped_in_a_row: int = 0

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> RunProgress:
        """The counters in a checkpoint's state."""
        return cls(state["step"], state["adam_steps"], state["skipped_in_a_row"])

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
                f"in a row (health.max_skipped_steps={max_skipped}); lower "
                "training.learning_rate or look at the data"
            )
