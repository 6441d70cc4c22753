"""The run's records: ``metrics.jsonl`` is the truth, the console and trackers are fed from it."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Protocol

from calm_dist.files import replace_text
from calm_dist.recipe import Recipe

METRICS_FILE = "metrics.jsonl"

Record = dict[str, Any]


class Tracker(Protocol):
    """Something that is fed every record."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """Appends records to a run's metrics.jsonl and passes them to the console and trackers.

    Records of steps after ``resume_step`` belong to work that was lost and is done again: they
    are dropped from the file.
    """

    def __init__(self, recipe: Recipe, run_dir: Path, resume_step: int) -> None:
        self._total_steps = recipe.training.steps
        self._tokens_per_step = recipe.tokens_per_step
        self._every = recipe.logging.every
        self._path = run_dir / METRICS_FILE
        if self._path.exists():
            _drop_records_after(self._path, resume_step)
        self._file: IO[bytes] = self._path.open("ab", buffering=0)
        self._unwritten: list[bytes] = []
        self._skipped = 0
        self._trackers = _open_trackers(recipe, run_dir)

    def training_step(
        self, step: int, values: dict[str, float], skipped: bool, seconds: float
    ) -> None:
        """Log training step ``step`` (counted from 1), where it is due (``logging.every``).

        Args:
            values: loss, grad_norm, learning_rate and further numbers of the trainer's own.
            skipped: whether the step was not applied; a record has the number of skipped steps
                since the one before.
            seconds: duration of the step.

        A number that is not finite is written as null: JSON has none.
        """
        self._skipped += skipped
        if step % self._every and step != self._total_steps:
            return
        record = {
            "step": step,
            **values,
            "tokens": step * self._tokens_per_step,
            "tokens_per_second": self._tokens_per_step / seconds,
            "step_seconds": seconds,
            "skipped": self._skipped,
        }
        self._skipped = 0
        self._write(record)
        print(self._console_line(record), flush=True)
        self._track(step, {name: value for name, value in record.items() if name != "step"})

    def evaluation(self, step: int, values: dict[str, Any]) -> None:
        """Log an evaluation; it carries ``eval`` and no key ``loss``."""
        self._write({"step": step, "eval": values})
        self._track(step, {f"eval/{k}": v for k, v in values.items() if isinstance(v, int | float)})

    def _track(self, step: int, values: dict[str, float]) -> None:
        """Feed the trackers with what can be drawn."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for tracker in self._trackers:
            tracker.log(step, finite)

    def close(self) -> None:
        if self._unwritten:
            print(
                f"warning: {self._path}: {len(self._unwritten)} records could not be written",
                file=sys.stderr,
            )
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def _write(self, record: Record) -> None:
        """Append a record. A full disk must not end a training: what cannot be written now is
        kept, and written together with a later record."""
        self._unwritten.append(json_line(record).encode())
        waited = len(self._unwritten) > 1
        end = os.fstat(self._file.fileno()).st_size
        try:
            # One write, so that a reader or a crash never sees half a record of ours.
            written = self._file.write(b"".join(self._unwritten))
            if written != sum(map(len, self._unwritten)):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file.truncate(end)
            if not waited:
                print(
                    f"warning: {self._path}: {error.strerror}; training goes on, records are kept "
                    "until there is room",
                    file=sys.stderr,
                    flush=True,
                )
            return
        self._unwritten.clear()

    def _console_line(self, record: Record) -> str:
        remaining = (self._total_steps - record["step"]) * record["step_seconds"]
        return (
            f"step {record['step']}/{self._total_steps} | loss {record['loss']:.4f} | "
            f"grad norm {record['grad_norm']:.3f} | lr {record['learning_rate']:.2e} | "
            f"{record['tokens_per_second']:,.0f} tokens/s | {_duration(remaining)} left"
            + self._skipped_text(record)
        )

    def _skipped_text(self, record: Record) -> str:
        if not record["skipped"]:
            return ""
        for name, words in (("loss", "loss"), ("grad_norm", "gradient")):
            if not math.isfinite(record[name]):
                return f" | SKIPPED: {words} not finite"
        return f" | {record['skipped']} steps before SKIPPED"


def json_line(record: Mapping[str, Any]) -> str:
    """A record as a line of JSON, with null for numbers that are not finite."""
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value


def read_records(run_dir: str | Path) -> list[Record]:
    """All records of a run, in order; what is no record, such as a line cut short by a crash, is
    left out."""
    path = Path(run_dir) / METRICS_FILE
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def _drop_records_after(path: Path, step: int) -> None:
    kept = [record for record in read_records(path.parent) if record["step"] <= step]
    replace_text(path, "".join(json_line(record) for record in kept))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _open_trackers(recipe: Recipe, run_dir: Path) -> list[Tracker]:
    trackers: list[Tracker] = []
    if recipe.logging.wandb != "off":
        trackers.append(WandbTracker(recipe, run_dir))
    if recipe.logging.tensorboard:
        trackers.append(TensorBoardTracker(run_dir))
    return trackers


class WandbTracker:
    """Weights & Biases; a resumed run goes on in the same wandb run."""

    def __init__(self, recipe: Recipe, run_dir: Path) -> None:
        import wandb

        mode = recipe.logging.wandb
        if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
            print(
                "logging.wandb=online, but no API key is set: logging offline; "
                "`wandb login`, then `wandb sync` the run's wandb directory",
                file=sys.stderr,
            )
            mode = "offline"
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
        self._run = wandb.init(
            project=recipe.logging.project,
            name=recipe.run.display_name,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            dir=run_dir,
            config=recipe.to_dict(),
            settings=wandb.Settings(silent=True),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class TensorBoardTracker:
    """TensorBoard event files under ``logs/tensorboard``."""

    def __init__(self, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "logs" / "tensorboard"))

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
