"""A rehearsal as text for a terminal."""

from __future__ import annotations

import textwrap
from typing import Any

from calm_dist.planner.storage import size_text
from calm_dist.rehearsal.rehearse import CATEGORIES

WIDTH = 100


def format_rehearsal(values: dict[str, Any]) -> str:
    """`rehearse.rehearse` as text."""
    cut = values["layout"]
    chunks = f" x {cut['chunks']}" if cut["chunks"] > 1 else ""
    context = f"CP {cut['context']}, " if cut["context"] > 1 else ""
    lines = [
        f"{values['name']} rehearsed on {values['world_size']:,} x {values['gpu']}, without a GPU",
        f"TP {cut['tensor']}, PP {cut['pipeline']}{chunks}, {context}DP {cut['data']}, "
        f"{cut['micro_batches']} micro-batch{'' if cut['micro_batches'] == 1 else 'es'} of "
        f"{cut['micro_batch_size']}",
    ]
    for rank in values["ranks"]:
        lines += ["", f"Rank {rank['rank']}, stage {rank['stage'] + 1} of {cut['pipeline']}"]
        lines += _failure(rank["failed"]) if "failed" in rank else _rank(rank)
    lines += ["", "Not proven by a rehearsal:"]
    for line in values["not_proven"]:
        lines += textwrap.wrap(f"- {line}", WIDTH, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def _failure(failed: dict[str, Any]) -> list[str]:
    lines = [f"  FAILED: {line}" for line in failed["error"].splitlines()[:8]]
    lines += [f"    {place}" for place in failed["where"]]
    return lines if failed["where"] else [*lines, failed["traceback"]]


def _rank(rank: dict[str, Any]) -> list[str]:
    return [*_memory(rank), *_kernels(rank), *_waits(rank), *_collectives(rank)]


def _memory(rank: dict[str, Any]) -> list[str]:
    verdict = "fits" if rank["fits"] else "DOES NOT FIT"
    lines = [
        f"  peak memory {size_text(rank['peak'])} of {size_text(rank['usable_memory'])}: "
        f"{verdict}; planner {size_text(rank['planned_peak'])} "
        f"(rehearsed {rank['difference']:+.1%})",
        f"    {'':<24}" + "".join(f"{name:>13}" for name in CATEGORIES),
    ]
    for title, key in (("rehearsed", "memory"), ("planner", "planned")):
        sizes = "".join(f"{size_text(rank[key][name]):>13}" for name in CATEGORIES)
        lines.append(f"    {title:<24}{sizes}")
    if rank["built"] > rank["peak"]:
        lines.append(f"    while the model is built: {size_text(rank['built'])}")
    return lines


def _kernels(rank: dict[str, Any]) -> list[str]:
    number = rank["micro_batches"]
    each = {row["part"]: row for row in rank["each"]["kernels"]}
    step = {row["part"]: row for row in rank["step"]["kernels"]}
    totals = [0.0, 0.0, 0.0]
    lines = []
    for part in sorted(step, key=lambda name: -_launches(step[name])):
        row = each.get(part, {})
        numbers = [row.get("forward", 0), row.get("backward", 0), _launches(step[part])]
        totals = [total + n for total, n in zip(totals, numbers, strict=True)]
        lines.append(f"    {part:<24}" + "".join(f"{_count(n):>13}" for n in numbers))
    title = "  kernels of a micro-batch"
    head = f"{title:<28}{'forward':>13}{'backward':>13}{f'step of {number}':>13}"
    foot = f"    {'all':<24}" + "".join(f"{_count(n):>13}" for n in totals)
    return [head, *lines, foot]


def _launches(row: dict[str, Any]) -> float:
    return row.get("forward", 0) + row.get("backward", 0)


def _waits(rank: dict[str, Any]) -> list[str]:
    each = {(row["what"], row["where"]): row["count"] for row in rank["each"]["waits"]}
    lines = ["  the host waits for the device (times a micro-batch, a step)"]
    for row in rank["step"]["waits"]:
        of_batch = each.get((row["what"], row["where"]), 0)
        lines.append(f"    {_count(of_batch):>8}{_count(row['count']):>8}  {row['what']}")
        lines.append(f"{'':<8}{row['where']}")
    return lines if len(lines) > 1 else ["  the host never waits for the device"]


def _collectives(rank: dict[str, Any]) -> list[str]:
    each = {(row["operation"], row["group"]): row for row in rank["each"]["collectives"]}
    rows = rank["step"]["collectives"]
    if not rows:
        return ["  no collectives"]
    head = f"    {'':<32}{'calls':>8}{'bytes':>11}{'calls':>10}{'bytes':>11}"
    lines = [f"{'  collectives':<36}{'of a micro-batch':>19}{'of a step':>21}", head]
    for row in rows:
        one = each.get((row["operation"], row["group"]), {"calls": 0, "bytes": 0})
        lines.append(
            f"    {row['operation'] + ', ' + row['group']:<32}{_count(one['calls']):>8}"
            f"{size_text(one['bytes']):>11}{_count(row['calls']):>10}{size_text(row['bytes']):>11}"
        )
    return lines


def _count(number: float) -> str:
    return f"{number:,.0f}" if abs(number - round(number)) < 0.05 else f"{number:,.1f}"
