"""List run directories with their states; needs no torch."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from calm_dist import scores
from calm_dist.errors import UserError
from calm_dist.files import read_bounded
from calm_dist.progress import duration
from calm_dist.recipe import LARGEST_FILE
from calm_dist.runs import checkpoints
from calm_dist.runs.directory import (
    ENDED,
    ENVIRONMENT_FILE,
    FAILED,
    FINISHED,
    LARGEST_ENVIRONMENT,
    STOPPED,
    is_held,
)
from calm_dist.runs.metrics import compact
from calm_dist.runs.metrics_file import METRICS_FILE, Record, num_blocks, parse_line, read_lines
from calm_dist.scores import number

RUNNING, DAMAGED, NEW = "running", "damaged", "not started"
_LONGEST_NAME = 80
_RATE_OF = 20
"""Number of last records whose median rate is shown."""
_DEEPEST = 50
# The C loader is ten times as fast, but PyYAML may lack it.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Row = dict[str, Any]


def list_runs(directories: Sequence[str | Path]) -> list[Row]:
    """The run directories at and below ``directories``, by path.

    Returns:
        A JSON-able dict for each: path, name, kind, state (running, finished, stopped, failed, not
        started, damaged), reason (why it ended, or what is damaged), step, steps, loss,
        tokens_per_second, checkpoint (step of the newest), idle_seconds (since the last record),
        brierlm, brierlm_stderr, brier and brier_stderr (lists for n = 1..4), noisy_brier (the n of
        `scores.noisy_brier`), token_accuracy (of an autoencoder). Unknown values are None.

    Raises:
        UserError: a directory does not exist.
    """
    found: set[Path] = set()
    for directory in map(Path, directories):
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory; give one that holds runs")
        found.update(_run_directories(directory))
    # List each run once, by its own path in preference to links to it.
    known = sorted(found, key=lambda path: (os.path.realpath(path) != os.path.abspath(path), path))
    once = {os.path.realpath(path): path for path in reversed(known)}
    return [describe(path) for path in sorted(once.values())]


def _run_directories(directory: Path) -> Iterator[Path]:
    for path, folders, files in os.walk(directory):
        if _is_run(files):
            yield Path(path)
            folders.clear()
        elif checkpoints.MANIFEST in files or "index.json" in files:
            # A checkpoint, a corpus or a store, which may hold very many files.
            folders.clear()
        for link in filter(os.path.islink, (os.path.join(path, name) for name in folders)):
            # Follow only links to runs: others may lead anywhere.
            with contextlib.suppress(OSError):
                if _is_run(os.listdir(link)):
                    yield Path(link)


def _is_run(files: Sequence[str]) -> bool:
    return METRICS_FILE in files or (
        checkpoints.RECIPE_FILE in files and checkpoints.MANIFEST not in files
    )


def describe(run_dir: Path) -> Row:
    """One row of `list_runs`."""
    row: Row = dict.fromkeys(
        ("path", "name", "kind", "state", "reason", "step", "steps", "loss", "tokens_per_second",
         "checkpoint", "idle_seconds", "brierlm", "brierlm_stderr", "brier", "brier_stderr",
         "noisy_brier", "token_accuracy")
    )  # fmt: skip
    row |= {"path": str(run_dir), "name": run_dir.name, "state": DAMAGED}
    try:
        row |= _recipe_facts(run_dir)
        row |= _metrics_facts(run_dir)
        row["checkpoint"] = _newest_checkpoint(run_dir)
        if row["step"] is None:
            row["step"] = row["checkpoint"]
        row["state"], row["reason"] = _state(run_dir, row)
        if row["reason"] is None and (newest := checkpoints.step_directories(run_dir)):
            row["reason"] = checkpoints.skipped_note(newest[0])
    except (_DamagedError, UserError) as error:
        row["reason"] = str(error)
    except OSError as error:
        name = Path(error.filename).name if error.filename else run_dir
        row["reason"] = f"{name}: cannot be read ({error.strerror})"
    return row


class _DamagedError(Exception):
    """A file of a run is damaged; the message names the file and the remedy."""


def _recipe_facts(run_dir: Path) -> Row:
    """Read the recipe without its types, so that recipes of other versions are listed too."""
    try:
        text = read_bounded(run_dir / checkpoints.RECIPE_FILE, LARGEST_FILE).decode("utf-8")
        recipe = _load_yaml(text)
        kind, steps = recipe["model"]["kind"], int(recipe["training"]["steps"])
        name = recipe["run"].get("name") or run_dir.name
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError,
            yaml.YAMLError) as error:  # fmt: skip
        raise _DamagedError(
            f"{checkpoints.RECIPE_FILE}: is not a recipe; copy that of a checkpoint here, or start "
            "the training again, which writes it"
        ) from error
    return {"name": _one_line(str(name)), "kind": _one_line(str(kind)), "steps": steps}


def _load_yaml(text: str) -> Any:
    """Load YAML, but refuse aliases, a few of which expand to gigabytes, and nesting so deep that
    the C loader would crash the process (PyYAML 6.0)."""
    depth = 0
    for event in yaml.parse(text, _LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST or isinstance(event, yaml.AliasEvent):
            raise ValueError("aliases, or deep nesting")
    return yaml.load(text, _LOADER)


def _one_line(text: str) -> str:
    """Printable text on one line, for a table."""
    return "".join(c if c.isprintable() else "?" for c in text[:_LONGEST_NAME])


def _metrics_facts(run_dir: Path) -> Row:
    try:
        lines = read_lines(run_dir)
        idle = time.time() - (run_dir / METRICS_FILE).stat().st_mtime
    except FileNotFoundError:
        return {}
    facts: Row = {"idle_seconds": max(0.0, idle)}
    # From the end: only the last records count, and a long run has very many.
    training: list[Record] = []
    scored: Record | None = None
    for line in reversed(lines):
        is_evaluation = b'"eval"' in line
        if len(training) == _RATE_OF and not is_evaluation:
            continue
        if (record := parse_line(line)) is None:
            continue
        if is_evaluation and _is_better(record, scored):
            scored = record
        elif "loss" in record and len(training) < _RATE_OF:
            training.append(record)
    if scored is not None:
        facts |= _scores(scored["eval"])
    if training:
        rates = [rate for r in training if (rate := number(r.get("tokens_per_second")))]
        facts |= {
            "step": training[0]["step"],
            "loss": number(training[0]["loss"]),
            "tokens_per_second": median(rates) if rates else None,
        }
    return facts


def _scores(evaluation: Mapping[str, Any]) -> Row:
    facts: Row = {name: number(evaluation.get(name)) for name in (*_SCORES, "brierlm_stderr")}
    if facts["brierlm"] is None:
        return facts
    pairs = [scores.brier(evaluation, n) for n in (1, 2, 3, 4)]
    # Lists are complete or absent.
    for name, values in zip(("brier", "brier_stderr"), zip(*pairs, strict=True), strict=True):
        facts[name] = list(values) if None not in values else None
    return facts | {"noisy_brier": scores.noisy_brier(evaluation)}


_SCORES = ("brierlm", "token_accuracy")


def _is_better(record: Record, scored: Record | None) -> bool:
    """Whether an earlier record's evaluation replaces ``scored``: it must have a score and, if
    ``scored`` exists, be of the same step and of more blocks."""
    evaluation = record.get("eval")
    if not isinstance(evaluation, dict):
        return False
    if all(number(evaluation.get(name)) is None for name in _SCORES):
        return False
    if scored is None:
        return True
    same = record["step"] == scored["step"]
    return same and num_blocks(evaluation) > num_blocks(scored["eval"])


def _newest_checkpoint(run_dir: Path) -> int | None:
    for directory in checkpoints.step_directories(run_dir):
        if (directory / checkpoints.MANIFEST).is_file():
            return int(directory.name.removeprefix("step_"))
    return None


def _state(run_dir: Path, row: Row) -> tuple[str, str | None]:
    if is_held(run_dir):
        return RUNNING, None
    try:
        text = read_bounded(run_dir / ENVIRONMENT_FILE, LARGEST_ENVIRONMENT)
    except FileNotFoundError:
        return NEW, None
    try:
        ended = json.loads(text).get(ENDED)
        if ended is not None and ended["how"] not in (FINISHED, STOPPED, FAILED):
            raise ValueError(ended["how"])
        reason = None if ended is None else ended.get("reason")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _DamagedError(
            f"{ENVIRONMENT_FILE}: does not say how the run ended; start the training again, which "
            "continues from the newest checkpoint and writes it"
        ) from error
    # Also if it was killed after its last checkpoint, or is of a version that recorded no end.
    if row["checkpoint"] is not None and row["checkpoint"] >= row["steps"]:
        return FINISHED, None
    if ended is not None:
        return ended["how"], None if reason is None else str(reason)
    return FAILED, "ended unexpectedly: killed, or the node failed"


_COLUMNS = ("run", "kind", "state", "step", "loss", "tok/s", "saved", "idle", "score")
_BRIER = ("Brier-1 x100", "Brier-2 x100")
"""Further columns, if any run has a BrierLM."""
_LEFT = 3
"""Number of columns of words; the others are numbers."""


def table(rows: Sequence[Row]) -> str:
    """The rows as lines for the console."""
    columns = [*_COLUMNS, *(_BRIER if any(row["brierlm"] is not None for row in rows) else ())]
    cells = [columns, *(_cells(row)[: len(columns)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            text.ljust(width) if i < _LEFT else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    for place, row in reversed(list(enumerate(rows, start=1))):
        if row["reason"]:
            lines.insert(place + 1, f"    {row['reason']}")
    if any(row["noisy_brier"] for row in rows):
        lines.append(scores.MARK_EXPLAINED)
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    name = row["path"]
    if row["name"] != Path(row["path"]).name:
        name += f" ({row['name']})"
    score, brier = "-", ["-", "-"]
    if row["brierlm"] is not None:
        score = scores.brierlm_text(row)
        brier = [scores.brier_text(row, n) for n in (1, 2)]
    elif row["token_accuracy"] is not None:
        score = f"{row['token_accuracy']:.2%}"
    return [
        name,
        row["kind"] or "-",
        row["state"],
        "-" if row["steps"] is None else f"{row['step'] or 0}/{row['steps']}",
        "-" if row["loss"] is None else f"{row['loss']:.5g}",
        "-" if row["tokens_per_second"] is None else compact(row["tokens_per_second"]),
        "-" if row["checkpoint"] is None else str(row["checkpoint"]),
        "-" if row["idle_seconds"] is None else duration(row["idle_seconds"]),
        score,
        *brier,
    ]
