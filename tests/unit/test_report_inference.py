"""A report's section on generation says what the benchmark measured."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from calm_dist.errors import UserError
from calm_dist.reports.inference import claims, inference_section, read_inference
from calm_dist.reports.report import summarize

ROOT = Path(__file__).parents[2]


def row(name: str, kind: str, batch: int, rate: float, **more: Any) -> dict[str, Any]:
    size = 4 if kind == "calm" else 1
    return {
        "model": f"runs/{name}/checkpoints/step_00000009",
        "kind": kind,
        "patch_size": size,
        "context": 64,
        "batch": batch,
        "tokens_per_second": rate,
        "first_token_seconds": 0.5,
        "cache_bytes_per_text": 4096 // size,
        "flops_per_token": 66.0 if kind == "calm" else 100.0,
    } | more


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    rows = [
        row(name, name, batch, rate * batch)
        for batch in (1, 8)
        for name, rate in (("calm", 30.0 - batch), ("transformer", 10.0))
    ]
    file = tmp_path / "inference.json"
    value = {"device": "x86_64", "threads": 1, "torch": "2", "temperature": 1.0, "rows": rows}
    file.write_text(json.dumps(value))
    return file


def test_the_claims_stand_beside_the_clock(measured: Path) -> None:
    result = read_inference(measured)
    one, eight = claims(result)
    assert (one["steps"], one["flops_per_token"], one["cache_bytes_per_text"]) == (0.25, 0.66, 0.25)
    assert (one["batch"], one["seconds"]) == (1, pytest.approx(10 / 29))
    assert (eight["batch"], eight["seconds"]) == (8, pytest.approx(10 / 22))
    section = inference_section(result)
    assert "1/4 here" in section.text[1] and "0.66 times the FLOPs" in section.text[1]
    assert "0.34 to 0.45 times the time" in section.text[1]
    compared, every = section.tables
    assert len(compared.rows) == 2 and len(every.rows) == 4
    assert [cell.text for cell in every.rows[1]] == [
        "transformer", "64", "1", "10", "0.5 s", "0.00391 MiB", "100",
    ]  # fmt: skip
    (plot,) = section.plots
    assert "calm at most 176" in plot.alternative and plot.png().startswith(b"\x89PNG")
    assert "<svg" in plot.svg() and plot.legend == ("calm", "transformer")
    summary = summarize([], None, inference=result)
    assert summary["inference"]["claims"] == claims(result)


def test_the_text_is_about_the_models_that_are_compared(measured: Path) -> None:
    """The first CALM and the first Transformer, whatever else was measured."""
    value = json.loads(measured.read_text())
    value["rows"].append(row("larger", "calm", 1, 50.0, patch_size=8))
    measured.write_text(json.dumps(value))
    assert "which is 1/4 here" in inference_section(read_inference(measured)).text[1]


def test_one_model_alone_is_compared_with_none(measured: Path) -> None:
    value = json.loads(measured.read_text())
    value["rows"] = [row("calm", "calm", 1, 5.0), row("calm", "calm", 1, 4.0, context=128)]
    measured.write_text(json.dumps(value))
    result = read_inference(measured)
    assert claims(result) == []
    section = inference_section(result)
    assert len(section.tables) == 1
    assert section.plots[0].legend == ("calm, context 64", "calm, context 128")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a result of tools/benchmark.py inference"),
        ('{"rows": []}', "missing or wrong: device, threads, temperature"),
        ('{"device": "x", "threads": null, "temperature": 1, "rows": []}', "has no rows"),
        (
            '{"device": "x", "threads": 1, "temperature": 1, "rows": [{"batch": 0}]}',
            r"missing or wrong: rows.0.model, rows.0.kind",
        ),
    ],
)
def test_other_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(UserError, match=rf"--inference .*f\.json: .*{message}"):
        read_inference(tmp_path / "f.json")
    with pytest.raises(UserError, match=r"--inference .*absent: "):
        read_inference(tmp_path / "absent")


def test_the_tool_shows_it_beside_the_papers_models(
    measured: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--inference", str(measured), "--json", str(tmp_path / "flops.json")]
    monkeypatch.setattr(sys, "argv", ["flops_report.py", *given])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / "flops_report.py"), run_name="__main__")
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert shown.index("CALM-XL") < shown.index("## Generation") < shown.index("| transformer |")
    assert json.loads((tmp_path / "flops.json").read_text())["inference"]["rows"]
