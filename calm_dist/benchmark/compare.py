"""Time two implementations of the same computation alternately in one process."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calm_dist.benchmark.timing import seconds

Values = list[torch.Tensor]
"""Results of a computation, gradients included, for comparison."""


@dataclass(frozen=True)
class Pair:
    """Our code and the plain formulation, which materialises every tensor and loops over positions.

    Both return values that should be equal, or None if they are random.
    """

    name: str
    ours: Callable[[], Values | None]
    plain: Callable[[], Values | None]
    work: float
    """Work of one call, in ``unit``."""
    unit: str
    sizes: dict[str, Any]
    floor: Callable[[], object] | None = None
    """The work that both must do, timed alone as a lower bound."""


def compare(
    pair: Pair,
    repeats: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Run both alternately, after untimed runs in which memory is measured.

    Args:
        clock: what is read before and after a run; `time.process_time` does not see other work on
            the machine.

    Returns:
        A JSON-able row: for each side ``seconds`` (median), ``all_seconds``, ``peak_mib`` beyond
        the memory in use before, and ``rate``; ``floor_seconds`` if there is a floor; ``speedup``
        (median of the turns), ``memory_ratio`` (None if unknown), and ``largest_difference``,
        relative to the largest value of a tensor.
    """
    sides = {"ours": pair.ours, "plain": pair.plain}
    values: dict[str, Values | None] = {}
    peaks: dict[str, float | None] = {}
    for name, call in sides.items():
        call()
        peaks[name], values[name] = peak_mib(call, device)
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    floor: list[float] = []
    for _ in range(repeats):
        for name, call in sides.items():
            times[name].append(seconds(call, device, clock))
        if pair.floor is not None:
            floor.append(seconds(pair.floor, device, clock))
    row: dict[str, Any] = {"name": pair.name, "sizes": pair.sizes, "unit": pair.unit}
    for name in sides:
        median = statistics.median(times[name])
        row[name] = {
            "seconds": median,
            "all_seconds": times[name],
            "peak_mib": peaks[name],
            "rate": pair.work / median,
        }
    row["floor_seconds"] = statistics.median(floor) if floor else None
    turns = zip(times["plain"], times["ours"], strict=True)
    row["speedup"] = statistics.median(plain / ours for plain, ours in turns)
    ours, plain = peaks["ours"], peaks["plain"]
    row["memory_ratio"] = plain / max(ours, 1.0) if ours is not None and plain is not None else None
    row["largest_difference"] = _largest_difference(values["ours"], values["plain"])
    return row


def _largest_difference(ours: Values | None, plain: Values | None) -> float | None:
    if ours is None or plain is None:
        return None
    return max(
        float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30))
        for a, b in zip(ours, plain, strict=True)
    )


def peak_mib(
    call: Callable[[], Values | None], device: torch.device
) -> tuple[float | None, Values | None]:
    """Peak memory of a call beyond the memory in use before: torch's allocations on a GPU, the
    resident memory of the process on Linux, None elsewhere."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        values = call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20, values
    if not sys.platform.startswith("linux"):
        return None, call()
    # Return freed memory to the system; the call would reuse it without being counted.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before_mib = _status_mib("VmRSS")
    values = call()
    return _status_mib("VmHWM") - before_mib, values


def _status_mib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| | ours | plain | faster | at least | memory, ours | plain | less | largest difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours, plain = row["ours"], row["plain"]
        lines.append(
            f"| {row['name']} | {_rate(ours['rate'], row['unit'])} ({ours['seconds']:.3g} s) "
            f"| {_rate(plain['rate'], row['unit'])} ({plain['seconds']:.3g} s) "
            f"| {row['speedup']:.2f}x | {_floor(row)} "
            f"| {_mib(ours['peak_mib'])} | {_mib(plain['peak_mib'])} "
            f"| {_ratio(row['memory_ratio'])} | {_difference(row['largest_difference'])} |"
        )
    return "\n".join(lines)


def _floor(row: dict[str, Any]) -> str:
    seconds = row["floor_seconds"]
    return "" if seconds is None else f"{seconds:.3g} s"


def _rate(rate: float, unit: str) -> str:
    return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s"


def _mib(value: float | None) -> str:
    return "?" if value is None else f"{value:,.0f} MiB"


def _ratio(value: float | None) -> str:
    return "?" if value is None else f"{value:.1f}x"


def _difference(value: float | None) -> str:
    return "random" if value is None else f"{value:.1e}"
