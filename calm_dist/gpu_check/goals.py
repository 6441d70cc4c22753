"""What the results of a check are held to. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from calm_dist.gpu_check.parts import VARIANTS

MFU = 0.45
KERNEL_FACTOR = 2.0
PLANNER_DIFFERENCE = 0.20
# Of the mean over positions; a fault of the generator shows more.
DRAWS_STANDARD_ERRORS = 5.0

Results = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Goal:
    """One goal; ``met`` is None if the part that measures it has no result."""

    name: str
    wanted: str
    found: str
    met: bool | None


def goals(results: Results) -> list[Goal]:
    """All goals, in the order of a reader's interest."""
    return [
        _mfu(results),
        _kernel_time(results),
        *_planner(results),
        *_correctness(results),
    ]


def _mfu(results: Results) -> Goal:
    found = {
        variant.name: values["mfu"]
        for variant in VARIANTS
        if "calm" in variant.name and (values := results.get(variant.name, {})).get("mfu")
    }
    best = max(found, key=found.__getitem__, default=None)
    text = "not measured" if best is None else f"{found[best]:.1%} ({best})"
    met = None if best is None else found[best] >= MFU
    return Goal("MFU of CALM-M, full attention counted", f">= {MFU:.0%}", text, met)


def _kernel_time(results: Results) -> Goal:
    times = results.get("kernel", {}).get("times", {})
    wanted = f"<= {KERNEL_FACTOR:g} x predicted"
    kernel, predicted = times.get("kernel"), times.get("predicted")
    if not kernel or not predicted:
        return Goal("time of the energy kernel", wanted, "not measured", None)
    text = f"{kernel * 1e3:.2f} ms, predicted {predicted * 1e3:.2f} ms"
    return Goal("time of the energy kernel", wanted, text, kernel <= KERNEL_FACTOR * predicted)


def _planner(results: Results) -> Iterator[Goal]:
    wanted = f"within {PLANNER_DIFFERENCE:.0%}"
    for variant in VARIANTS:
        if variant.name not in ("calm_m", "transformer_m"):
            continue
        values = results.get(variant.name, {})
        planned = values.get("planned") or {}
        for what, key in (("step", "step_seconds"), ("peak memory", "peak_bytes")):
            name = f"planner: {what}, {variant.title}"
            if not values.get(key) or not planned.get(key):
                yield Goal(name, wanted, "not measured", None)
                continue
            difference = planned[key] / values[key] - 1
            yield Goal(name, wanted, f"{difference:+.1%}", abs(difference) <= PLANNER_DIFFERENCE)


def _correctness(results: Results) -> Iterator[Goal]:
    kernel = results.get("kernel", {})
    found = [row["largest_difference"] for row in kernel.get("formula", [])]
    yield Goal(
        "energy kernel against the formula",
        f"<= {kernel['tolerance']:g}" if "tolerance" in kernel else "",
        f"{max(found):.1e}" if found else "not measured",
        kernel.get("is_right"),
    )
    cut = kernel.get("cut", {})
    yield Goal(
        "energy kernel beyond 2^31 elements",
        "its last positions as alone",
        _yes_or_no(cut.get("equal"), cut.get("why_not")),
        cut.get("equal"),
    )
    errors = kernel.get("draws", {}).get("standard_errors")
    yield Goal(
        "energy kernel's draws against torch's",
        f"within {DRAWS_STANDARD_ERRORS:g} standard errors",
        "not measured" if errors is None else f"{errors:+.2f}",
        None if errors is None else abs(errors) <= DRAWS_STANDARD_ERRORS,
    )
    rows = {row["name"]: row for row in results.get("parity", {}).get("models", [])}
    for kind in ("calm", "transformer"):
        row = rows.get(kind)
        yield Goal(
            f"losses of 20 steps, {kind}",
            "fp32 as on a CPU, bf16 as fp32",
            "not measured" if row is None
            else f"{row['fp32_to_cpu']:.1e}, {row['bf16_to_fp32']:.1e}",
            None if row is None else row["is_right"],
        )  # fmt: skip
    recovery = results.get("recovery", {})
    equal = recovery.get("equal")
    yield Goal(
        "a killed run after its resumption",
        "equal, or as different as a repetition",
        _yes_or_no(equal, recovery.get("why_not_equal") or recovery.get("why")),
        None if equal is None else equal or not recovery["repeats"],
    )


def _yes_or_no(equal: bool | None, why: str | None) -> str:
    if equal:
        return "equal"
    return why or ("not measured" if equal is None else "different")
