"""How a BrierLM is shown, and when it is marked as noise."""

from __future__ import annotations

from typing import Any

import pytest

from calm_dist.scores import (
    MARK_EXPLAINED,
    block_size_note,
    brier_text,
    brierlm_text,
    noisy_brier,
    number,
    summary_text,
)

# A CALM of minutes of training: its Brier-4 is not known, its BrierLM looks like that of `LARGER`.
SMALL: dict[str, Any] = {
    "brierlm": 0.60,
    "brierlm_stderr": 0.08,
    "brier": [0.0592, 0.0081, 0.0026, 0.0010],
    "brier_stderr": [0.0014, 0.0005, 0.0003, 0.0006],
}
LARGER = SMALL | {"brierlm": 1.12, "brier": [0.0524, 0.0099, 0.0060, 0.0040]}


def test_a_score_of_noise_is_marked() -> None:
    assert noisy_brier(SMALL) == [4] and noisy_brier(LARGER) == []
    assert summary_text(SMALL) == "BrierLM 0.60* ± 0.08, Brier-1 5.92 ± 0.14, Brier-2 0.81 ± 0.05"
    assert summary_text(LARGER, " | ").startswith("BrierLM 1.12 ± 0.08 | Brier-1 5.24 ± 0.14 | ")
    assert "two standard errors" in MARK_EXPLAINED and MARK_EXPLAINED.startswith("* ")


@pytest.mark.parametrize(
    ("brier", "errors", "noisy"),
    [
        # Not above two standard errors is: at them, below them, and below 0.
        ([0.1, 0.1, 0.25, 0.25], [0.0, 0.0, 0.125, 0.124], [3]),
        ([0.1, 0.1, 0.25, 0.25], [0.0, 0.0, 0.2, 0.2], [3, 4]),
        ([0.1, 0.1, 0.25, -0.25], [0.0, 0.0, 0.1, 0.1], [4]),
        # Brier-1 and Brier-2 carry their errors beside them; they decide nothing.
        ([0.1, 0.1, 0.25, 0.25], [0.9, 0.9, 0.1, 0.1], []),
        # Of early records and of one block no error is known.
        ([0.1, 0.1, 0.25, 0.25], None, []),
        ([0.1, 0.1, 0.25, 0.0], None, [4]),
        (None, None, []),
        # Damage is not known, either.
        ([0.1, 0.1], [0.1], []),
        ("high", 7, []),
        ([0.1, 0.1, None, float("nan")], [None] * 4, []),
    ],
)
def test_what_decides(brier: Any, errors: Any, noisy: list[int]) -> None:
    assert noisy_brier({"brierlm": 1.0, "brier": brier, "brier_stderr": errors}) == noisy


@pytest.mark.parametrize(
    ("scored", "recipe_block_size", "step", "said"),
    [
        (512, 512, 100, None),
        (1024, 512, 100, "trained on blocks of 512: longer blocks exceed the trained context"),
        (256, 512, 100, "trained on blocks of 512: the model sees less context than in training"),
        (512, None, 100, "training block size is not known"),
        # Imported: the recipe has what the released configuration allows.
        (512, 512, 0, "of an imported model is not known, its configuration has positions for 512"),
        (1024, 512, 0, "tokens after the first 512 exceed them"),
    ],
)
def test_blocks_of_another_size_than_in_training(
    scored: int, recipe_block_size: int | None, step: int, said: str | None
) -> None:
    note = block_size_note(scored, recipe_block_size, step)
    assert (note is None) == (said is None)
    if note is not None and said is not None:
        assert said in note and note.startswith(f"scored on blocks of {scored} tokens")


def test_what_is_not_known_is_not_made_up() -> None:
    assert brierlm_text({}) == brierlm_text({"brierlm": None}) == brier_text({}, 1) == "–"
    early = {"brierlm": 5.72, "brierlm_stderr": 0.1, "brier": [0.2, 0.1, 0.05, 0.02]}
    assert summary_text(early) == "BrierLM 5.72 ± 0.10, Brier-1 20.00, Brier-2 10.00"
    assert brierlm_text({"brierlm": 0.0, "brier": [0.1, 0.1, 0.1, -0.1]}) == "0.00*"
    assert [number(value) for value in (True, "1", None, 10**400, float("inf"))] == [None] * 5
