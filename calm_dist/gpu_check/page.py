"""The results of a check as Markdown, and its place on a page. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from calm_dist.errors import UserError
from calm_dist.files import replace_text
from calm_dist.gpu_check.goals import Results, goals
from calm_dist.gpu_check.parts import PARTS, VARIANTS

BEGIN, END = "<!-- gpu_check: begin -->", "<!-- gpu_check: end -->"
_VERDICT = {True: "met", False: "**not met**", None: "not measured"}


def markdown(results: Results) -> str:
    """All tables."""
    sections = [
        _machine(results.get("facts", {})),
        _goals(results),
        _models(results),
        _expected(results),
        _parts_of_step(results.get("calm_m", {})),
        _kernel(results.get("kernel", {})),
        _attention(results.get("attention", {})),
        _others(results),
        _not_done(results),
    ]
    return "\n\n".join("\n".join(lines) for lines in map(list, sections) if lines)


def put_into(page: Path, text: str) -> None:
    """Replace what is between the markers of a page.

    Raises:
        UserError: it has no such markers.
    """
    old = page.read_text(encoding="utf-8")
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(
            f"{page}: has no lines {BEGIN!r} and {END!r}; add them where results belong"
        )
    replace_text(page, f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def _machine(facts: Mapping[str, Any]) -> Iterator[str]:
    if not facts.get("gpu"):
        return
    gpu, packages = facts["gpu"], facts.get("packages", {})
    smi = facts.get("nvidia_smi") or {}
    name = gpu["name"] if isinstance(gpu, dict) else gpu
    software = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    driver = f"driver {smi['driver_version']}, " if "driver_version" in smi else ""
    yield f"{name}, {driver}CUDA {facts.get('cuda')}, Python {facts.get('python')}, {software}."
    yield ""
    yield "| plain operations on it | |"
    yield "|---|---|"
    size = {"bf16_tflops": "bf16 product", "fp32_tflops": "fp32 product"}
    for key, title in size.items():
        if key in facts:
            yield f"| {title} | {facts[key]:,.1f} TFLOP/s |"
    for key, title in (
        ("copy_bytes_per_second", "copy, read and written"),
        ("host_to_device_bytes_per_second", "copy from pinned memory of the host"),
    ):
        if key in facts:
            yield f"| {title} | {facts[key] / 1e9:,.0f} GB/s |"
    if "launch_seconds" in facts:
        yield f"| host, for each small operation | {facts['launch_seconds'] * 1e6:.1f} us |"


def _goals(results: Results) -> Iterator[str]:
    yield "| goal | wanted | found | |"
    yield "|---|---|---|---|"
    for goal in goals(results):
        yield f"| {goal.name} | {goal.wanted} | {goal.found} | {_VERDICT[goal.met]} |"


def _models(results: Results) -> Iterator[str]:
    yield "| one step on one GPU | tokens/s | step | MFU | causal | peak | device busy |"
    yield "|---|---|---|---|---|---|---|"
    for variant in VARIANTS:
        values = results.get(variant.name, {})
        if "step_seconds" not in values:
            yield f"| {variant.title} | {_why(values)} | | | | | |"
            continue
        yield (
            f"| {variant.title}, {values['micro_batches']} x {values['micro_batch_size']} "
            f"| {values['tokens_per_second']:,.0f} | {values['step_seconds'] * 1e3:,.0f} ms "
            f"| {_percent(values['mfu'])} | {_percent(values['mfu_causal'])} "
            f"| {_gigabytes(values.get('peak_bytes'))} "
            f"| {_percent(_ratio(values, 'device_busy_seconds', 'profiled_seconds'))} |"
        )


def _expected(results: Results) -> Iterator[str]:
    """Measured against rehearsal and planner."""
    rehearsal = results.get("rehearsal", {})
    rows = {row["name"]: row for row in rehearsal.get("variants", [])}
    yield "| of one step | measured | rehearsed | planner |"
    yield "|---|---|---|---|"
    for variant in VARIANTS:
        values, row = results.get(variant.name, {}), rows.get(variant.name, {})
        planned = values.get("planned") or {}
        yield (
            f"| {variant.title}: peak memory | {_gigabytes(values.get('peak_bytes'))} "
            f"| {_gigabytes(row.get('peak_bytes'))} | {_gigabytes(planned.get('peak_bytes'))} |"
        )
        seconds, plan = values.get("step_seconds"), planned.get("step_seconds")
        yield f"| time | {_milliseconds(seconds)} | | {_milliseconds(plan)} |"
        launched = None
        if "launches" in values:
            launched = values["launches"] + values["copies"]
        number = values.get("profiled_micro_batches", "-")
        yield (
            f"| kernels and copies of {number} micro-batches | {_number(launched)} "
            f"| {_number(row.get('kernels'))} | |"
        )
        waits = values.get("waits")
        yield (
            f"| waits of the host | {_number(None if waits is None else _total(waits))} "
            f"| {_number(row.get('waits'))} | |"
        )
    if "variants" not in rehearsal:
        yield ""
        yield f"Rehearsals: {_why(rehearsal)}."


def _parts_of_step(values: Mapping[str, Any]) -> Iterator[str]:
    parts = values.get("parts")
    if not parts:
        return
    yield "| part of a step of CALM-M | forward | backward |"
    yield "|---|---|---|"
    for name, part in sorted(parts.items(), key=lambda item: -sum(item[1].values())):
        yield f"| {name} | {_milliseconds(part['forward'])} | {_milliseconds(part['backward'])} |"


def _kernel(kernel: Mapping[str, Any]) -> Iterator[str]:
    times = kernel.get("times")
    if not times:
        return
    yield f"| energy score, {times['positions']:,} positions, forward and gradient | |"
    yield "|---|---|"
    titles = {"kernel": "the kernel", "predicted": "predicted", "torch": "by torch"}
    for key, title in titles.items():
        yield f"| {title} | {_milliseconds(times.get(key))} |"


def _attention(attention: Mapping[str, Any]) -> Iterator[str]:
    rows = attention.get("kernels", [])
    if not rows:
        return
    yield "| attention, forward and backward | head dimension | TFLOP/s | |"
    yield "|---|---|---|---|"
    for row in rows:
        rate = f"{row['tflops']:,.1f}" if "tflops" in row else "-"
        note = row.get("kernel") or row.get("why_not") or ""
        yield f"| {row['name']} | {row['head_dim']} | {rate} | {_cell(note)} |"


def _others(results: Results) -> Iterator[str]:
    yield "| | |"
    yield "|---|---|"
    values = results.get("autoencoder", {})
    if "tokens_per_second" in values:
        yield (
            f"| autoencoder, training | {values['tokens_per_second']:,.0f} tokens/s, MFU "
            f"{_percent(values['mfu'])}, peak {_gigabytes(values['peak_bytes'])} |"
        )
    if "encoding_tokens_per_second" in values:
        yield f"| encoding | {values['encoding_tokens_per_second']:,.0f} tokens/s |"
    for row in results.get("inference", {}).get("rates", []):
        rate = f"{row['rate']:,.0f} {row['unit']}/s" if "rate" in row else _cell(row["why_not"])
        yield f"| {row['name']} | {rate} |"


def _not_done(results: Results) -> Iterator[str]:
    """Parts without a whole result, and why."""
    for part in PARTS:
        values = results.get(part.name)
        if values is not None and values.get("status") != "done":
            yield f"- {part.title}: {_why(values)}"


def _why(values: Any) -> str:
    if not values:
        return "not measured"
    reason = values.get("why") or values.get("error")
    return f"{values['status']}: {_cell(reason)}" if reason else values["status"]


def _cell(text: str) -> str:
    """On one line of a table."""
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= 120 else f"{text[:117]}..."


def _total(waits: list[dict[str, Any]]) -> float:
    return sum(row["count"] for row in waits)


def _ratio(values: Mapping[str, Any], part: str, whole: str) -> float | None:
    return values[part] / values[whole] if values.get(whole) else None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _gigabytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e9:,.1f} GB"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value * 1e3:,.2f} ms"
