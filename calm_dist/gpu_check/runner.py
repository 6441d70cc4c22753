"""Run the parts of a check one after the other, each in a process of its own with a time limit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import calm_dist
from calm_dist.cli.console import write_json
from calm_dist.errors import UserError
from calm_dist.gpu_check.parts import PARTS, CheckPart
from calm_dist.parallel.launch import cuda_environment

RUNNING, FAILED, NOT_RUN, TIMED_OUT = "running", "failed", "not run", "timed out"
# Less is not enough to import torch, Megatron-core and DeepSpeed.
_SHORTEST = 15
_REPORT = "report.json"


@dataclass
class _Running:
    part: CheckPart
    process: subprocess.Popen[bytes]
    started: float
    end: float


def run_parts(
    directory: Path,
    device: str,
    minutes: float,
    only: Collection[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run all parts, or ``only`` those named, for ``minutes`` at most.

    Args:
        directory: gets ``parts/NAME.json`` and the output of each part, ``NAME.log``, as they come,
            and ``report.json``, all results by name.
        device: cuda, or cpu with small sizes.

    Returns:
        The results by name.
    """
    end = time.monotonic() + 60 * minutes
    place = directory / "parts"
    place.mkdir(parents=True, exist_ok=True)
    chosen = [part for part in PARTS if not only or part.name in only]
    for part in chosen:
        _file(place, part).unlink(missing_ok=True)
    background: list[_Running] = []
    try:
        for part in chosen:
            left = end - time.monotonic()
            if left < _SHORTEST:
                _settle(_file(place, part), NOT_RUN, f"the {minutes:g} minutes were over")
            elif part.in_background:
                background.append(_start(part, place, device, end))
                continue
            else:
                _wait(_start(part, place, device, end), place)
            say(_line(part, place))
            _report(directory, chosen)
    finally:
        for running in background:
            _wait(running, place)
            say(_line(running.part, place))
    return _report(directory, chosen)


def read_results(directory: Path) -> dict[str, Any]:
    """The results in a directory, by part.

    Raises:
        UserError: there are none.
    """
    file = directory / _REPORT
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: cannot be read ({error}); give the --out directory of a finished check"
        ) from error
    return values


def _start(part: CheckPart, place: Path, device: str, end: float) -> _Running:
    package = str(Path(calm_dist.__file__).parents[1])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH", ""))))
    small = ["--small"] if device == "cpu" else []
    # Torch's CUDA builds import Triton, which decides then whether to interpret its kernels.
    settings = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    if device == "cpu":
        # Megatron-core uses any GPU that it sees.
        settings["CUDA_VISIBLE_DEVICES"] = ""
    if device == "cuda" and not part.in_background:
        # As a training has them; a rehearsal makes its own.
        settings = cuda_environment(tensor_parallel_size=1)
    command = [sys.executable, "-P", "-m", "calm_dist.gpu_check.worker", part.name]
    with (place / f"{part.name}.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, str(_file(place, part)), "--device", device, *small],
            env={**os.environ, **settings, "PYTHONPATH": path},
            stdout=log,
            stderr=subprocess.STDOUT,
            # A part that is late is ended with all that it started.
            start_new_session=True,
        )
    started = time.monotonic()
    return _Running(part, process, started, min(end, started + part.seconds))


def _wait(running: _Running, place: Path) -> None:
    """Wait for a part until its time is over."""
    file = _file(place, running.part)
    try:
        code = running.process.wait(max(0.0, running.end - time.monotonic()))
    except subprocess.TimeoutExpired:
        given = running.end - running.started
        _settle(file, TIMED_OUT, f"it had not ended after {given:.0f} s")
    else:
        _settle(file, FAILED, f"its process ended with exit code {code}; see {running.part.name}"
                ".log")  # fmt: skip
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.process.pid, signal.SIGKILL)
        running.process.wait()


def _settle(file: Path, status: str, why: str) -> None:
    """Give a part that has not said how it ended a status; its findings stay."""
    values = _read(file)
    if values.get("status", RUNNING) == RUNNING:
        write_json({**values, "status": status, "why": why}, file)


def _read(file: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # Not begun, or killed while it wrote.
        return {}
    return values


def _report(directory: Path, chosen: list[CheckPart]) -> dict[str, Any]:
    results = {part.name: _read(_file(directory / "parts", part)) for part in chosen}
    write_json({name: values for name, values in results.items() if values}, directory / _REPORT)
    return results


def _line(part: CheckPart, place: Path) -> str:
    values = _read(_file(place, part))
    why = " ".join(str(values.get("why") or values.get("error") or "").split())
    return (
        f"{part.name:<14}{values['status']:<10}{values.get('took_seconds', 0):>7.1f} s  {why[:100]}"
    )


def _file(place: Path, part: CheckPart) -> Path:
    return place / f"{part.name}.json"
