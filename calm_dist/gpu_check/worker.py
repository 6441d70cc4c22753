"""One part of a check, in a process of its own: ``python -m calm_dist.gpu_check.worker NAME FILE``.

FILE gets the result as JSON, and grows with each finding: a part that is killed loses only what it
was measuring.
"""

from __future__ import annotations

import argparse
import importlib
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from calm_dist.cli.console import write_json
from calm_dist.errors import UserError
from calm_dist.gpu_check.parts import PARTS
from calm_dist.parallel.launch import full_fp32

RUNNING, DONE, FAILED, NOT_RUN = "running", "done", "failed", "not run"


class NotRunError(Exception):
    """A part, or a row of it, cannot run here; the message says why."""


@dataclass
class Check:
    """What a part works with, and where its findings go."""

    file: Path
    device: torch.device
    small: bool
    """Whether sizes are small, so that all parts also end on a CPU; times then mean nothing."""
    values: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def add(self, **values: Any) -> None:
        """Add findings, and write the file."""
        self.values |= values
        self.write(RUNNING)

    def row(self, table: str, /, **values: Any) -> None:
        """Add a row to a list of findings."""
        self.add(**{table: [*self.values.get(table, []), values]})

    def write(self, status: str, **more: Any) -> None:
        took = round(time.perf_counter() - self.started, 2)
        # Renamed into place: a kill while it is written loses nothing.
        partial = self.file.with_suffix(".tmp")
        write_json({"status": status, "took_seconds": took, **more, **self.values}, partial)
        partial.replace(self.file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part")
    parser.add_argument("file", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    full_fp32()
    device = torch.device("cpu") if arguments.device == "cpu" else torch.device("cuda", 0)
    check = Check(arguments.file, device, arguments.small)
    run_part(arguments.part, check)


def run_part(name: str, check: Check) -> None:
    """Run a part; whatever it raises becomes its result."""
    part = next(part for part in PARTS if part.name == name)
    check.write(RUNNING)
    try:
        module, _, function = part.function.rpartition(".")
        measure = getattr(importlib.import_module(f"{__package__}.{module}"), function)
        measure(check, **part.arguments)
    except (NotRunError, UserError, ModuleNotFoundError) as error:
        check.write(NOT_RUN, why=f"{error}", **_places(error))
    except Exception as error:
        check.write(FAILED, error=f"{type(error).__name__}: {error}", **_places(error))
    else:
        check.write(DONE)


def why_not(error: BaseException) -> str:
    """One line of an error, for a row that could not be measured."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _places(error: BaseException) -> dict[str, Any]:
    if isinstance(error, NotRunError | UserError):
        return {}
    return {"traceback": "".join(traceback.format_exception(error))[-8000:]}


if __name__ == "__main__":
    # Not the module of this name: parts import it under its own.
    from calm_dist.gpu_check.worker import main as run_as_module

    run_as_module()
