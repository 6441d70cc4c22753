"""The results page: its tables are those that the published results give."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from launches import ROOT, call

from calm_dist.errors import UserError
from calm_dist.study.page import fill_page, page_plots, results_table

PAGE = ROOT / "docs" / "results.md"
PUBLISHED = ROOT / "docs" / "results"


def result(name: str, brierlm: float | None = None, **more: Any) -> dict[str, Any]:
    score = [0.3, 0.1, 0.03, 0.01] if brierlm is not None else None
    return {
        "name": name, "kind": "calm", "head": "energy", "diverged": brierlm is None,
        "parameters": 1_230_000, "train_flops": 1e12, "tokens": 2_000_000, "brierlm": brierlm,
        "brierlm_stderr": 0.2, "brier": score, "brier_stderr": [0.001] * 4, **more,
    }  # fmt: skip


def write(directory: Path, *results: dict[str, Any]) -> None:
    (directory / "a.json").write_text(json.dumps({"plan": "a.yaml", "runs": results}))


def cells(lines: str, row: int) -> list[str]:
    found = [line for line in lines.splitlines() if line.startswith("|")]
    return [cell.strip() for cell in found[row].strip("|").split("|")]


def test_tables_of_the_page_are_those_of_the_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert fill_page(page, PUBLISHED) == page, "run the command at the end of docs/results.md"
    for path, plot in page_plots(page, PUBLISHED).items():
        assert (PAGE.parent / path).is_file()
        assert plot.png().startswith(b"\x89PNG")


def test_every_published_result_is_on_the_page() -> None:
    """No result is left out."""
    page = PAGE.read_text(encoding="utf-8")
    for file in PUBLISHED.glob("*.json"):
        for run in json.loads(file.read_text())["runs"]:
            name = run["name"].rpartition("-s")[0] if run["name"][-3:-1] == "-s" else run["name"]
            assert f"| {name} ".replace("_", r"\_") in page, f"{file.name}: {name}"


def test_seeds_share_a_row_with_both_errors(tmp_path: Path) -> None:
    write(tmp_path, result("a-s0", 2.0), result("a-s1", 3.0), result("b", 4.0), result("c"))
    page = "x\n<!-- results a.json: * -->\nold\n<!-- end -->\ny\n"
    filled = fill_page(page, tmp_path)
    assert filled.startswith("x\n<!-- results") and filled.endswith("<!-- end -->\ny\n")
    assert cells(filled, 0) == [
        "run", "parameters", "training FLOPs", "tokens", "seeds", "Brier-1, %", "Brier-2, %",
        "BrierLM",
    ]  # fmt: skip
    # The standard deviation of 2 and 3 is 1/√2.
    assert (
        cells(filled, 2)[0::4] == ["a", "2"] and cells(filled, 2)[-1] == "2.50 ± 0.20 (seeds 0.71)"
    )
    assert cells(filled, 3)[-1] == "4.00 ± 0.20"
    assert cells(filled, 4)[-1] == "diverged"
    assert fill_page(filled, tmp_path) == filled


def test_plots_have_a_line_for_each_kind(tmp_path: Path) -> None:
    write(
        tmp_path, result("a", 2.0), result("b", 3.0, train_flops=3e12),
        result("t", 4.0, kind="transformer"), result("u", kind="transformer"),
    )  # fmt: skip
    plots = page_plots("<!-- plot a.json: *, t -->\n![words](images/p.png)\n", tmp_path)
    assert list(plots) == ["images/p.png"]
    assert plots["images/p.png"].legend == ("CALM, energy head", "transformer")


def test_texts_are_those_of_the_best_run(tmp_path: Path) -> None:
    texts = [{"temperature": "1/2", "prompt": "a <b>", "text": "*c*\nd"}]
    write(tmp_path, result("a", 2.0, texts=texts), result("b", 3.0), result("c", 1.0, texts=[]))
    filled = fill_page("<!-- texts a.json: * -->\n<!-- end -->", tmp_path)
    assert "**a** (BrierLM 2.00)\n\n- T = 1/2: <code>a &lt;b&gt;*c* ⏎ d</code>\n" in filled
    with pytest.raises(UserError, match="b has none; add `texts`"):
        fill_page("<!-- texts a.json: b -->\n<!-- end -->", tmp_path)


def test_correlation_of_entropy_and_score(tmp_path: Path) -> None:
    entropies = (3.0, 2.0, 1.0, 0.5)
    runs = [
        result(f"t{i}", 10 - 2 * x, kind="transformer", cross_entropy=x)
        for i, x in enumerate(entropies)
    ]
    write(tmp_path, *runs, result("c", 1.0))
    filled = fill_page("<!-- correlation a.json: * -->\n<!-- end -->", tmp_path)
    assert cells(filled, 2) == [
        "transformer", "4", "0.50 to 3.00", "4.00 to 9.00", "-1.000", "-1.000",
    ]  # fmt: skip
    with pytest.raises(UserError, match="1 runs of transformer; 3 needed"):
        fill_page("<!-- correlation a.json: t0 -->\n<!-- end -->", tmp_path)


def test_what_cannot_be_shown_is_named(tmp_path: Path) -> None:
    write(tmp_path, result("a", 2.0))
    with pytest.raises(UserError, match="no run is named nothing"):
        fill_page("<!-- results a.json: a, nothing -->\n<!-- end -->", tmp_path)
    with pytest.raises(UserError, match=r"b.json: No such file"):
        fill_page("<!-- results b.json: a -->\n<!-- end -->", tmp_path)
    with pytest.raises(UserError, match="autoencoders and language models"):
        results_table([result("a", 2.0), {"name": "e", "kind": "autoencoder"}])


def test_the_tool_fills_a_page(tmp_path: Path) -> None:
    write(tmp_path, result("a", 2.0))
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- plot a.json: a -->\n![a](images/a.png)\n<!-- results a.json: a -->\n<!-- end -->"
    )
    tool = [sys.executable, str(ROOT / "tools" / "flops_report.py")]
    call([*tool, "--study", str(tmp_path), "--page", str(page)])
    assert "2.00 ± 0.20" in page.read_text()
    assert (tmp_path / "images" / "a.png").stat().st_size > 1000
    assert "must be given together" in call([*tool, "--study", str(tmp_path)], code=2).stderr


def test_a_mean_of_noise_is_marked_and_no_error_is_made_up(tmp_path: Path) -> None:
    noise = {"brier": [0.04, 0.01, 0.001, 0.0], "brier_stderr": [0.01] * 4}
    write(
        tmp_path,
        result("a-s0", 0.0, **noise | {"brierlm_stderr": None}),
        result("a-s1", 0.4, **noise | {"brierlm_stderr": 0.1}),
        result("b-s0", 2.0),
        result("b-s1", 0.4, **noise | {"brierlm_stderr": 0.1}),
    )
    filled = fill_page("<!-- results a.json: * -->\n<!-- end -->\n", tmp_path)
    assert cells(filled, 2)[-1] == r"0.20\* ± 0.10 (seeds 0.28)"
    assert cells(filled, 3)[-1] == r"1.20\* ± 0.20 (seeds 1.13)"
