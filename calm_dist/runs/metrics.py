"""A run's records: appended to ``metrics.jsonl``, and passed on to console and trackers."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from calm_dist.files import replace_text
from calm_dist.progress import Meter, duration
from calm_dist.redact import redact_arguments, redact_values
from calm_dist.runs.metrics_file import METRICS_FILE, json_line, read_records
from calm_dist.runs.wandb_id import wandb_id

_log = logging.getLogger(__name__)

_WANDB_SECONDS = 60
"""Longest wait for wandb's server at the start."""

if TYPE_CHECKING:
    from calm_dist.recipe import Recipe

_STEPS_TIMED = 100
"""Number of last steps from which the time left is estimated, including evaluations and checkpoints
between them."""

Record = dict[str, Any]


class Tracker(Protocol):
    """A sink for all records."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """Appends records to a run's metrics.jsonl and passes them to the console and trackers.

    Records of steps after ``resume_step`` belong to lost work that will be repeated; they are
    dropped from the file.
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
        self._torn = False
        self._skipped = 0
        self._ends: deque[float] = deque(maxlen=_STEPS_TIMED + 1)
        self._trackers = _open_trackers(recipe, run_dir, resume_step)
        self._meter = Meter(
            self._total_steps, label="train", unit="steps", done=resume_step, lines=False
        )

    def training_step(
        self, step: int, values: dict[str, float], skipped: bool, seconds: float, ends: bool = False
    ) -> None:
        """Log training step ``step`` (counted from 1) if it is due (``logging.every``), or if the
        run ends after it.

        Args:
            values: loss, grad_norm, learning_rate and further numbers of the trainer.
            skipped: whether the step was not applied; a record has the number of skipped steps
                since the previous record.
            seconds: duration of the step.

        A number that is not finite is written as null, because JSON cannot hold it.
        """
        self._skipped += skipped
        self._ends.append(time.monotonic())
        self._meter.advance()
        if step % self._every and step != self._total_steps and not ends:
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
        _log.info(self._console_line(record))
        self._track(step, {name: value for name, value in record.items() if name != "step"})

    def evaluation(self, step: int, values: dict[str, Any]) -> None:
        """Log an evaluation; its record has a key ``eval`` and no ``loss``."""
        self._write({"step": step, "eval": values})
        self._track(step, {f"eval/{k}": v for k, v in values.items() if isinstance(v, int | float)})

    def _track(self, step: int, values: dict[str, float]) -> None:
        """Pass the finite values to the trackers."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._for_each_tracker(lambda tracker: tracker.log(step, finite))

    def _for_each_tracker(self, work: Callable[[Tracker], object]) -> None:
        """A tracker that fails is used no more: it must not end a training."""
        for tracker in list(self._trackers):
            try:
                work(tracker)
            except Exception as error:  # the libraries raise what they like
                self._trackers.remove(tracker)
                reason = str(error) or type(error).__name__
                _log.warning(
                    f"{type(tracker).__name__} failed ({reason}); training continues without it, "
                    f"{self._path} has every record"
                )

    def close(self) -> None:
        self._meter.close()
        if self._unwritten:
            _log.warning(f"{self._path}: {len(self._unwritten)} records could not be written")
        with contextlib.suppress(OSError):
            self._file.close()
        self._for_each_tracker(lambda tracker: tracker.close())

    def _write(self, record: Record) -> None:
        """Append a record. A full disk or a lost file system must not end a training: records that
        cannot be written are kept and written together with a later one."""
        self._unwritten.append(json_line(record).encode())
        waited = len(self._unwritten) > 1
        # Half a record that could not be removed again becomes a line of its own.
        data = b"\n" * self._torn + b"".join(self._unwritten)
        end = None
        try:
            end = os.fstat(self._file.fileno()).st_size
            # A single write, so that neither a reader nor a crash sees half a record.
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            try:
                if end is not None:
                    self._file.truncate(end)
            except OSError:
                self._torn = True
            if not waited:
                _log.warning(
                    f"{self._path}: {error.strerror}; training continues, records are kept in "
                    "memory until there is room"
                )
            return
        self._unwritten.clear()
        self._torn = False

    def _console_line(self, record: Record) -> str:
        """A training record in fewer than 80 columns."""
        loss = record["loss"]
        shown = f"{loss:.4f}" if abs(loss) < 10 else f"{loss:#.5g}"
        losses = (
            f"step {record['step']}/{self._total_steps}  loss {shown}  "
            f"norm {_short(record['grad_norm'], '#.3g')}  "
        )
        for name, words in (("loss", "loss"), ("grad_norm", "gradient")):
            if not math.isfinite(record[name]):
                return f"{losses}SKIPPED: {words} not finite"
        rate = _short(record["learning_rate"], ".1e")
        skipped = f"  {record['skipped']} SKIPPED" if record["skipped"] else ""
        return (
            f"{losses}lr {rate}  {compact(record['tokens_per_second'])} tok/s  "
            f"{duration(self._seconds_left(record))} left{skipped}"
        )

    def _seconds_left(self, record: Record) -> float:
        steps = len(self._ends) - 1
        a_step = (
            (self._ends[-1] - self._ends[0]) / steps if steps else float(record["step_seconds"])
        )
        return a_step * (self._total_steps - record["step"])


def _short(number: float, style: str) -> str:
    """A number without the padding of its exponent: 3.0e-4."""
    return format(number, style).rstrip(".").replace("e-0", "e-").replace("e+0", "e")


def compact(number: float) -> str:
    """A rate in at most six characters: 871, 8,952, 89.5k, 1.23M."""
    if number < 9999.5:
        return f"{number:,.0f}"
    for unit, size in (("k", 1e3), ("M", 1e6), ("G", 1e9)):
        if number < 999.5 * size:
            return f"{_short(number / size, '#.3g')}{unit}"
    return f"{number:.1e}"


def _drop_records_after(path: Path, step: int) -> None:
    kept = [record for record in read_records(path.parent) if record["step"] <= step]
    text = "".join(json_line(record) for record in kept)
    # The history of a long run is not written again where it stays the same.
    if text.encode() != path.read_bytes():
        replace_text(path, text)


def _open_trackers(recipe: Recipe, run_dir: Path, resume_step: int) -> list[Tracker]:
    trackers: list[Tracker] = []
    if recipe.logging.wandb != "off":
        trackers.append(WandbTracker(recipe, run_dir))
    if recipe.logging.tensorboard:
        trackers.append(TensorBoardTracker(run_dir, resume_step))
    return trackers


class WandbTracker:
    """Weights & Biases; a resumed run continues the same wandb run.

    Offline, each start writes its own directory under ``wandb/``, all with the run's id, and
    `wandb sync` joins them in order. wandb keeps the first record of a step: for steps repeated
    after a crash, the second record, which is the same, is dropped.
    """

    def __init__(self, recipe: Recipe, run_dir: Path) -> None:
        import wandb

        mode = recipe.logging.wandb
        if mode == "online" and not (os.environ.get("WANDB_API_KEY") or _is_logged_in()):
            _say_offline("no API key is set; `wandb login` sets it", run_dir)
            mode = "offline"
        options: dict[str, Any] = {
            "project": recipe.logging.project,
            "name": recipe.run.display_name,
            "id": wandb_id(run_dir),
            "resume": "allow",
            "dir": run_dir,
            "config": redact_values(recipe.to_dict()),
            # We log the console ourselves; wandb would capture it, including our progress bars.
            "settings": wandb.Settings(silent=True, console="off", init_timeout=_WANDB_SECONDS),
        }
        try:
            with _redacted_command_line():
                self._run = wandb.init(mode=mode, **options)  # type: ignore[arg-type]
        except wandb.Error as error:
            # A tracker must not prevent a training.
            _say_offline(str(error), run_dir)
            # The failed attempt still holds the run's id.
            wandb.teardown()
            with _redacted_command_line():
                self._run = wandb.init(mode="offline", **options)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


@contextmanager
def _redacted_command_line() -> Iterator[None]:
    """Mask secrets in ``sys.argv``, which wandb copies into its files."""
    given = sys.argv
    sys.argv = redact_arguments(given)
    try:
        yield
    finally:
        sys.argv = given


def _is_logged_in() -> bool:
    import wandb

    try:
        return bool(wandb.login(prompt=False))
    except TypeError:
        # Older versions of wandb lack the argument.
        return bool(wandb.api.api_key)


def _say_offline(reason: str, run_dir: Path) -> None:
    _log.warning(
        f"logging.wandb=online: {reason}\n"
        f"logging offline; to upload later: wandb sync {run_dir}/wandb/offline-run-*"
    )


class TensorBoardTracker:
    """TensorBoard event files under ``logs/tensorboard``; a resumed run hides records of later
    steps that an earlier start wrote."""

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            str(run_dir / "logs" / "tensorboard"), purge_step=resume_step + 1
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
