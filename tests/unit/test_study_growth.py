"""Growth of scores with FLOPs: power laws that are known, their errors, and where they cross."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from calm_dist.errors import UserError
from calm_dist.study.growth import Growth, Score, best_by_budget, crossing, fit, score
from calm_dist.study.growth_page import paper_growths
from calm_dist.study.page import fill_page, page_plots

BUDGETS = (1e12, 1e13, 1e14)


def law(scale: float, exponent: float, error: float = 0.0) -> Growth:
    """Points on BrierLM = scale · (FLOPs / 1e12)^exponent."""
    values = [scale * (flops / 1e12) ** exponent for flops in BUDGETS]
    return fit(
        "law",
        [Score(flops, value, error * value) for flops, value in zip(BUDGETS, values, strict=True)],
    )


def test_a_power_law_is_found_and_its_error_is_that_of_least_squares() -> None:
    found = law(2.0, 0.3, error=0.05)
    assert found.exponent == pytest.approx(0.3, abs=1e-9)
    assert found.at(1e15)[0] == pytest.approx(2 * 1000**0.3)
    # Equal relative errors e at x = -1, 0, 1 (in units of ln 10): variance e² / Σx².
    expected = 0.05 / (math.sqrt(2) * math.log(10))
    # 4,000 draws: the standard deviation's own error is 1.1%.
    assert found.exponent_error == pytest.approx(expected, rel=0.05)


def test_where_two_laws_cross() -> None:
    # 1 · x^0.4 reaches 2 · x^0.3 at x = 2^10.
    found = crossing(law(1.0, 0.4), law(2.0, 0.3))
    assert found.chance == 1
    assert found.middle == pytest.approx(1e12 * 2**10, rel=1e-6) and found.then_ahead
    # The slower one is overtaken there; asked in either order.
    overtaken = crossing(law(2.0, 0.3), law(1.0, 0.4))
    assert overtaken.middle == pytest.approx(1e12 * 2**10, rel=1e-6) and not overtaken.then_ahead
    # Ahead and faster, or crossed within what was measured: nowhere beyond it.
    assert crossing(law(2.0, 0.4), law(1.0, 0.3)).low == math.inf
    assert crossing(law(1.0, 0.4), law(1.01, 0.3)).chance == 0


def test_a_crossing_has_its_errors() -> None:
    found = crossing(law(1.0, 0.32, error=0.05), law(2.0, 0.3, error=0.05))
    # Difference of exponents 0.02, with an error of 0.022: P(Z > -0.92) = 0.82 of the fits.
    assert found.chance == pytest.approx(0.82, abs=0.03)
    assert found.low < found.middle < found.high == math.inf
    # One that is ahead and probably faster can only be overtaken, by the fits that cross.
    ahead = crossing(law(2.0, 0.31, error=0.05), law(1.9, 0.3, error=0.05))
    assert 0 < ahead.chance < 0.5 and not ahead.then_ahead


def test_best_run_of_each_budget() -> None:
    one, other, third = Score(1e12, 2.0, 0.1), Score(1.01e12, 3.0, 0.1), Score(3e12, 1.0, 0.1)
    assert best_by_budget([third, one, other]) == (other, third)
    # Seeds 2 and 3: standard deviation 1/√2, of the mean 1/2; with the blocks' 0.5, 1/√2.
    assert score(1.0, [2.0, 3.0], 0.5, 9.0).error == pytest.approx(math.sqrt(0.5))
    assert score(1.0, [2.0], 0.3, 0.4).error == pytest.approx(0.5)


def test_what_cannot_be_fitted() -> None:
    with pytest.raises(UserError, match="1 budgets; at least 2"):
        fit("x", [Score(1e12, 1.0, 0.1)])
    with pytest.raises(UserError, match="no logarithm"):
        fit("x", [Score(1e12, 0.0, 0.1), Score(1e13, 1.0, 0.1)])


def test_published_models() -> None:
    """Slopes by hand from Table 1: two of three points nearly fix them."""
    transformer, calm = paper_growths()
    assert transformer.exponent == pytest.approx(
        math.log(8.98 / 6.05) / math.log(22.5 / 6.6), abs=0.01
    )
    assert calm.exponent == pytest.approx(math.log(8.53 / 5.72) / math.log(19.5 / 3.7), abs=0.01)


def run(name: str, kind: str, flops: float, brierlm: float) -> dict[str, Any]:
    return {
        "name": name, "kind": kind, "head": "energy", "diverged": False, "parameters": 1,
        "train_flops": flops, "tokens": 1, "brierlm": brierlm, "brierlm_stderr": 0.02 * brierlm,
        "brier": [0.3, 0.1, 0.03, 0.01], "brier_stderr": [0.001] * 4,
    }  # fmt: skip


def test_table_and_plot_of_a_page(tmp_path: Path) -> None:
    runs = [
        run(f"{kind}-{flops}-s{seed}", kind, flops, scale * (flops / 1e12) ** exponent)
        for kind, scale, exponent in (("transformer", 2.0, 0.3), ("calm", 1.0, 0.4))
        for flops in BUDGETS
        for seed in (0, 1)
    ]
    (tmp_path / "a.json").write_text(json.dumps({"plan": "a.yaml", "runs": runs}))
    page = "<!-- growth a.json: * -->\n<!-- end -->\n<!-- growth-plot a.json: * -->\n![x](p.png)\n"
    filled = fill_page(page, tmp_path)
    assert fill_page(filled, tmp_path) == filled
    rows = [line for line in filled.splitlines() if line.startswith("| ")]
    # At the end of three points: 0.02 · 7.96 · √(1/3 + 1/2) = 0.145.
    assert "| 0.300 ± 0.006 " in rows[2] and "| 7.96 ± 0.14 " in rows[2]
    assert "CALM, energy head" in rows[3] and "then ahead (100% of the fits cross)" in rows[3]
    assert "paper, CALM" in rows[5] and "then behind" in rows[5]
    plots = page_plots(page, tmp_path)
    assert plots["p.png"].legend == (
        "transformer", "CALM, energy head", "paper, Transformer", "paper, CALM",
    )  # fmt: skip
    assert plots["p.png"].png().startswith(b"\x89PNG")
