"""``state.json`` of a checkpoint: the state that a resumed run needs besides the tensors."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError, model_validator

from calm_dist.errors import CheckpointError

STATE_FILE = "state.json"


class RunState(BaseModel):
    """The progress of a run when it wrote the checkpoint."""

    model_config = ConfigDict(frozen=True, strict=True)

    format: Literal[1] = 1
    step: NonNegativeInt
    """Steps taken, skipped ones included."""
    adam_steps: NonNegativeInt = 0
    """Updates that the optimizers made."""
    adam_steps_before: NonNegativeInt = 0
    """Number of these updates that were made in the run that this one continues."""
    skipped_in_a_row: NonNegativeInt = 0
    tokens: NonNegativeInt = 0
    """Tokens of all steps."""
    tokenizer_sha256: str | None = None
    autoencoder_sha256: str | None = None
    """Hash of the weights that encode on the fly; the data's fingerprint covers stored latents."""
    latents_sha256: str | None = None
    """Hash of the weights that encoded the latents, stored or on the fly."""
    data: dict[str, Any] | None = None
    """Position in the data, see `TrainingStream.state_dict`."""
    weights_only: bool = False
    """Whether there are only weights, no optimizer state, as after an import."""
    imported_from: str | None = None
    continued_from: str | None = None
    """Checkpoint of another run with whose weights and moments this run began."""

    @model_validator(mode="after")
    def _agree(self) -> RunState:
        """Refuse counters that contradict each other."""
        made = self.adam_steps - self.adam_steps_before
        if made < 0 or made + self.skipped_in_a_row > self.step:
            raise ValueError("more updates and skipped steps than steps")
        if self.weights_only and (self.step or self.data is not None):
            raise ValueError("has trained, but is marked weights_only")
        if not self.weights_only and (self.data or {}).get("steps_done") != self.step:
            raise ValueError("the position in the data is not that of the step")
        return self

    def write(self, directory: Path) -> None:
        """Write the state into an unfinished checkpoint."""
        text = self.model_dump_json(indent=1) + "\n"
        (directory / STATE_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> RunState:
        """Read the state of a checkpoint.

        Raises:
            CheckpointError: it is missing or damaged; the message gives the fault.
        """
        path = directory / STATE_FILE
        try:
            state = cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise CheckpointError(f"{path}: damaged; {where}: {first['msg']}") from error
        return state

    @classmethod
    def read_if_whole(cls, directory: Path) -> RunState | None:
        """`read`, or None if it is missing or damaged, which loading the checkpoint reports."""
        with suppress(CheckpointError):
            return cls.read(directory)
        return None
