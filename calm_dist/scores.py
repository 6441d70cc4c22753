"""How BrierLM is shown everywhere: with its standard errors, marked if it is mostly noise, and with
a note if the scored blocks differ from the training's.

BrierLM is a geometric mean, so its smallest factor dominates. For models that predict few n-grams
correctly, Brier-3 and Brier-4 are hardly known, and BrierLM may exceed that of a model whose
Brier-1 and Brier-2 are better. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MARK = "*"
"""Follows a BrierLM that is mostly noise."""

MARK_EXPLAINED = (
    f"{MARK} Brier-3 or Brier-4 is not above two standard errors: BrierLM is mostly noise"
)

MISSING = "–"

Evaluation = Mapping[str, Any]
"""A result of `calm_dist.evaluation.evaluate`, or the part of it in a record or a report: brierlm,
brierlm_stderr, brier [4], brier_stderr [4], each of which may be absent or None."""

_DECIDING = (3, 4)
_STANDARD_ERRORS = 2


def noisy_brier(evaluation: Evaluation) -> list[int]:
    """Those n of 3 and 4 whose Brier-n is not above two standard errors; BrierLM is marked if there
    are any.

    A value that is not above 0 counts even if its error is not known; a positive value without an
    error, as in records of early versions, does not.
    """
    noisy = []
    for n in _DECIDING:
        value, error = brier(evaluation, n)
        if value is not None and value <= _STANDARD_ERRORS * (error or 0.0):
            noisy.append(n)
    return noisy


def brier(evaluation: Evaluation, n: int) -> tuple[float | None, float | None]:
    """Brier-n and its standard error, as fractions of 1; None for an unknown value."""
    value, error = (_at(evaluation.get(name), n - 1) for name in ("brier", "brier_stderr"))
    return value, error


def brierlm_text(evaluation: Evaluation, pattern: str = "{:.2f}") -> str:
    """``0.60* ± 0.08``: BrierLM with its mark and its standard error."""
    value = number(evaluation.get("brierlm"))
    if value is None:
        return MISSING
    mark = MARK if noisy_brier(evaluation) else ""
    return _with_error(pattern.format(value) + mark, evaluation.get("brierlm_stderr"), pattern)


def brier_text(evaluation: Evaluation, n: int, pattern: str = "{:.2f}") -> str:
    """``5.92 ± 0.14``: a hundred times Brier-n with its standard error."""
    value, error = brier(evaluation, n)
    if value is None:
        return MISSING
    return _with_error(pattern.format(100 * value), None if error is None else 100 * error, pattern)


def summary_text(evaluation: Evaluation, between: str = ", ") -> str:
    """``BrierLM 0.60* ± 0.08, Brier-1 5.92 ± 0.14, Brier-2 0.81 ± 0.05``."""
    parts = [f"BrierLM {brierlm_text(evaluation)}"]
    parts += [f"Brier-{n} {brier_text(evaluation, n)}" for n in (1, 2)]
    return between.join(parts)


def block_size_note(scored: int, recipe_block_size: int | None, step: int) -> str | None:
    """A note for a model that was scored on blocks of another size than it was trained on.

    Args:
        scored: tokens per scored block.
        recipe_block_size: ``data.block_size`` of the checkpoint's recipe.
        step: step of the checkpoint. At 0 it was imported and has not been trained here: its recipe
            has the largest block of the released configuration (max_position_embeddings).

    Returns:
        A sentence without a full stop, or None if the sizes agree.
    """
    if recipe_block_size is None:
        return f"scored on blocks of {scored} tokens; the model's training block size is not known"
    if step == 0:
        allowed = f"its configuration has positions for {recipe_block_size} tokens"
        if scored > recipe_block_size:
            allowed += f", and tokens after the first {recipe_block_size} exceed them"
        return (
            f"scored on blocks of {scored} tokens; the training block size of an imported model is "
            f"not known, {allowed}"
        )
    if scored == recipe_block_size:
        return None
    differs = f"scored on blocks of {scored} tokens, trained on blocks of {recipe_block_size}"
    if scored > recipe_block_size:
        return f"{differs}: longer blocks exceed the trained context, and scores suffer"
    return f"{differs}: the model sees less context than in training"


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _at(values: Any, index: int) -> float | None:
    if not isinstance(values, list | tuple) or len(values) <= index:
        return None
    return number(values[index])


def _with_error(text: str, error: Any, pattern: str) -> str:
    known = number(error)
    return text if known is None else f"{text} ± {pattern.format(known)}"
