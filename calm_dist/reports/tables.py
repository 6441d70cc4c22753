"""Tables of the report as plain values: every cell has a text and a sort key."""

from __future__ import annotations

from dataclasses import dataclass

from calm_dist.scores import MISSING

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Cell:
    """A table's cell; ``value`` is the sort key, None if unknown."""

    text: str
    value: float | str | None


@dataclass(frozen=True)
class Table:
    """A table whose first column names the row."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    folded: bool = False
    """Shown on demand, for the numbers behind a plot."""


UNKNOWN = Cell(MISSING, None)


def text(value: str | None) -> Cell:
    """Words, or a dash."""
    return UNKNOWN if value is None else Cell(value, value)


def number(value: float | None, pattern: str = "{:,}") -> Cell:
    """A number in a format of ``str.format``, or a dash."""
    return UNKNOWN if value is None else Cell(pattern.format(value), value)


def short(value: float | None, unit: str = "") -> Cell:
    """A number as `compact` writes it, or a dash."""
    return UNKNOWN if value is None else Cell(f"{compact(value)}{unit}", value)


def scientific(value: float | None) -> Cell:
    """3.12 × 10¹³, or a dash."""
    if value is None:
        return UNKNOWN
    return Cell(power_of_ten(value, 2) if value else "0", value)


def compact(value: float) -> str:
    """1234567 -> 1.23 M."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.3g}"


def power_of_ten(value: float, digits: int = 0) -> str:
    """2e12 -> 2×10¹², 1.5e12 -> 1.5×10¹²; with two digits 2.00 × 10¹²."""
    mantissa, exponent = f"{value:.{digits or 1}e}".split("e")
    power = "10" + str(int(exponent)).translate(_SUPERSCRIPTS)
    if digits:
        return f"{mantissa} × {power}"
    mantissa = mantissa.removesuffix(".0")
    return power if mantissa == "1" else f"{mantissa}×{power}"
