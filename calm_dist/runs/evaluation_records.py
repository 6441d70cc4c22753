"""Record the scores of a run's checkpoints in its metrics.jsonl, each measurement once."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from calm_dist.errors import UserError
from calm_dist.files import check_file_is_writable
from calm_dist.log import NOTE
from calm_dist.runs import checkpoints
from calm_dist.runs.metrics_file import METRICS_FILE, json_line, read_records

_log = logging.getLogger(__name__)


def run_with_recipe(directory: Path) -> Path | None:
    """The run directory that contains a step directory, or None if there is none with a recipe."""
    run = checkpoints.run_directory(directory.resolve())
    return run if run is not None and (run / checkpoints.RECIPE_FILE).is_file() else None


def record(run: Path, result: Mapping[str, Any]) -> bool:
    """Append ``{"step", "eval"}`` to a run's metrics.jsonl.

    Returns:
        False if that step has already been scored on the same data with the same protocol and seed.

    Raises:
        OSError: the file cannot be read or written; it is unchanged.
    """
    if any(
        known["step"] == result["step"] and _same_measurement(known.get("eval"), result)
        for known in read_records(run)
    ):
        return False
    path = run / METRICS_FILE
    data = path.read_bytes() if path.exists() else b""
    separator = "" if not data or data.endswith(b"\n") else "\n"
    line = (separator + json_line({"step": result["step"], "eval": result})).encode()
    with path.open("ab", buffering=0) as file:
        if file.write(line) != len(line):
            # Half a record would also damage the next one.
            file.truncate(len(data))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    return True


def why_not_recorded(run: Path) -> str | None:
    """The reason why `record` cannot add to a run's metrics.jsonl, or None if it can; checked
    before the scores are computed."""
    try:
        check_file_is_writable(run / METRICS_FILE)
        read_records(run)
    except OSError as error:
        return f"{run / METRICS_FILE}: cannot be written ({error.strerror})"
    return None


class RecordLog:
    """Records the results of checkpoints, and reports those that could not be recorded."""

    def __init__(self, directories: Iterable[Path]) -> None:
        """Warn about runs in which results of these checkpoints cannot be recorded."""
        runs = {run for path in directories if (run := run_with_recipe(path)) is not None}
        reasons = {run: why_not_recorded(run) for run in sorted(runs)}
        self._writable = {run for run, reason in reasons.items() if reason is None}
        self._failures: list[str] = []
        for reason in filter(None, reasons.values()):
            _log.warning(f"{reason}: the scores are shown, not recorded; reports will lack them")

    def add(self, directory: Path, result: Mapping[str, Any]) -> None:
        """Record the result of a checkpoint if it belongs to a run that can be written."""
        run = run_with_recipe(directory)
        if run not in self._writable:
            return
        try:
            if not record(run, result):
                _log.log(NOTE, f"step {result['step']}: already in {run / METRICS_FILE}")
        except OSError as error:
            self._failures.append(
                f"{run / METRICS_FILE}: step {result['step']} was not recorded ({error.strerror})"
            )

    def close(self) -> None:
        """Raises:
        UserError: some results could not be recorded.
        """
        if self._failures:
            raise UserError(
                f"{'; '.join(self._failures)}; the scores are above; make room or make the file "
                "writable, then evaluate again to record them"
            )


def _same_measurement(known: Any, result: Mapping[str, Any]) -> bool:
    """Whether two results have the same data, seed and protocol. The training block size is
    ignored: records of early versions lack it."""
    if not isinstance(known, Mapping):
        return False
    names = result["protocol"].keys() - {"trained_block_size"}
    protocol = known.get("protocol")
    return (
        all(known.get(name) == result[name] for name in ("data_fingerprint", "seed"))
        and isinstance(protocol, Mapping)
        and protocol.keys() - {"trained_block_size"} == names
        and all(protocol[name] == result["protocol"][name] for name in names)
    )
