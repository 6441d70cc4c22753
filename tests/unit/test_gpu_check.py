"""`tools/gpu_check.py`: its parts end whatever happens, and its verdicts follow from the numbers.

Without a GPU: the parts run in small sizes on the CPU, and `tests/rehearsal` runs the code for GPUs
on fake tensors.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launches import ROOT, call
from warm import warm_python

from calm_dist.errors import UserError
from calm_dist.gpu_check import attention, parity, recovery, runner
from calm_dist.gpu_check.goals import goals
from calm_dist.gpu_check.model import covered
from calm_dist.gpu_check.page import BEGIN, END, markdown, put_into
from calm_dist.gpu_check.parts import PARTS
from calm_dist.gpu_check.worker import Check, run_part

TOOL = ROOT / "tools" / "gpu_check.py"
CPU = torch.device("cpu")


def values_of(file: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return values


def test_parts_end_on_a_cpu_and_become_a_section_of_a_page(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [warm_python(), str(TOOL), "--out", str(out)]
    done = call([*arguments, "--device", "cpu", "--only", "facts,attention"])
    assert "facts         done" in done.stdout and "| cuDNN | 64 | - |" in done.stdout
    results = values_of(out / "report.json")
    assert results.keys() == {"facts", "attention"}
    assert results["facts"] == values_of(out / "parts" / "facts.json")
    assert results["facts"]["bf16_tflops"] > 0
    rows = results["attention"]["kernels"]
    assert len(rows) == len(attention.HEADS) * (len(attention.KERNELS) + 1)
    assert all("seconds" in row or "why_not" in row for row in rows)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    call([*arguments, "--page", str(page)])
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{BEGIN}\n\n") and text.endswith(f"\n\n{END}\nafter\n")
    assert "old" not in text and (out / "report.md").read_text(encoding="utf-8").strip() in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_wrong_use_is_refused(tmp_path: Path) -> None:
    def refused(*more: str) -> str:
        done = subprocess.run(
            [warm_python(), str(TOOL), "--out", str(tmp_path / "out"), *more],
            capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""},
        )  # fmt: skip
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()
        return done.stderr

    assert "torch finds no GPU on this machine" in refused()
    assert "'calm': is not a part; give some of facts, kernel" in refused("--only", "calm")
    page = tmp_path / "page.md"
    page.touch()
    assert "report.json: cannot be read" in refused("--page", str(page))
    with pytest.raises(UserError, match="has no lines '<!-- gpu_check: begin -->'"):
        put_into(page, "text")


def test_late_dead_and_left_out_parts_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in a real process: one is ended at its limit, one cannot even begin."""
    facts = next(part for part in PARTS if part.name == "facts")
    late = replace(facts, seconds=0)
    dead = replace(facts, name="no such part")
    monkeypatch.setattr(runner, "PARTS", (late, dead))
    results = runner.run_parts(tmp_path, "cpu", 10)
    assert results["facts"]["status"] == "timed out"
    assert "had not ended after 0 s" in results["facts"]["why"]
    assert results["no such part"]["status"] == "failed"
    assert "exit code 1; see no such part.log" in results["no such part"]["why"]
    assert "StopIteration" in (tmp_path / "parts" / "no such part.log").read_text()
    results = runner.run_parts(tmp_path, "cpu", 0.1)
    assert results["facts"] == {"status": "not run", "why": "the 0.1 minutes were over"}
    assert "timed out" not in (tmp_path / "report.json").read_text(encoding="utf-8")


def test_a_part_that_fails_keeps_its_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(check: Check, *_: Any) -> None:
        check.row("kernels", name="first")
        raise RuntimeError("no more")

    monkeypatch.setattr(attention, "measure", rows)
    run_part("attention", Check(tmp_path / "a.json", CPU, small=True))
    values = values_of(tmp_path / "a.json")
    assert values["status"] == "failed" and values["error"] == "RuntimeError: no more"
    assert values["kernels"] == [{"name": "first"}] and "in rows" in values["traceback"]

    def refused(check: Check, *_: Any) -> None:
        raise UserError("needs something")

    monkeypatch.setattr(attention, "measure", refused)
    run_part("attention", Check(tmp_path / "a.json", CPU, small=True))
    assert values_of(tmp_path / "a.json")["status"] == "not run"


def test_the_recorded_losses_are_those_of_a_cpu() -> None:
    recorded = values_of(parity.RECORDED)
    for kind in parity.KINDS:
        losses = parity.losses(kind, "fp32", CPU)
        assert parity.largest_difference(losses, recorded["losses"][kind]) < 2e-6
        # They are those of a model that learns.
        assert sum(losses[-5:]) < sum(losses[:5])


def results() -> dict[str, Any]:
    """Results of a check that meets all goals."""
    planned = {"step_seconds": 0.5, "peak_bytes": 32e9}
    model = {
        "status": "done", "tokens_per_second": 5e5, "step_seconds": 0.45, "peak_bytes": 31e9,
        "mfu": 0.46, "mfu_causal": 0.43, "planned": planned, "micro_batches": 4,
        "micro_batch_size": 8, "profiled_micro_batches": 4, "kernels": 8_000, "launches": 8_000,
        "copies": 20, "waits": [{"where": "a.py:1", "count": 5}], "host_waits": {},
        "profiled_seconds": 0.5, "device_busy_seconds": 0.4,
        "parts": {"head": {"forward": 0.1, "backward": 0.2}},
    }  # fmt: skip
    row = {"name": "calm", "fp32_to_cpu": 1e-6, "bf16_to_fp32": 1e-4, "is_right": True}
    return {
        "facts": {"status": "done", "gpu": {"name": "NVIDIA H200"}, "packages": {"torch": "2.11"},
                  "bf16_tflops": 790.0, "launch_seconds": 5e-6},
        "kernel": {"status": "done", "tolerance": 1e-5, "is_right": True, "cut": {"equal": True},
                   "formula": [{"largest_difference": 2e-6}], "draws": {"standard_errors": -1.2},
                   "times": {"positions": 65_536, "kernel": 5e-3, "predicted": 4.5e-3}},
        "calm_m": model,
        "transformer_m": model,
        "parity": {"status": "done", "models": [row, row | {"name": "transformer"}]},
        "recovery": {"status": "done", "equal": True, "repeats": True},
        "rehearsal": {"status": "done", "variants": [
            {"name": "calm_m", "peak_bytes": 31.5e9, "kernels": 8_629, "waits": 5},
            {"name": "calm_m_1", "why_not": "RuntimeError: two devices"}]},
    }  # fmt: skip


def test_goals_are_met_missed_or_not_measured() -> None:
    assert all(goal.met for goal in goals(results()))
    assert all(goal.met is None for goal in goals({}))
    slow = results()
    slow["calm_m"] = slow["calm_m"] | {"mfu": 0.44, "step_seconds": 0.8, "peak_bytes": 50e9}
    slow["kernel"] |= {"times": {"kernel": 1e-2, "predicted": 4.5e-3}, "cut": {"equal": False},
                       "draws": {"standard_errors": 9.0}}  # fmt: skip
    slow["recovery"] |= {"equal": False}
    missed = [goal.name for goal in goals(slow) if goal.met is False]
    assert missed == [
        "MFU of CALM-M, full attention counted",
        "time of the energy kernel",
        "planner: step, CALM-M, the recipe",
        "planner: peak memory, CALM-M, the recipe",
        "energy kernel beyond 2^31 elements",
        "energy kernel's draws against torch's",
        "a killed run after its resumption",
    ]
    # Another variant of the model may be the one that is fast enough.
    slow["calm_m_16"] = {"mfu": 0.5}
    assert goals(slow)[0].met and goals(slow)[0].found == "50.0% (calm_m_16)"


def test_the_page_shows_numbers_and_what_is_missing() -> None:
    values = results() | {"attention": {"status": "timed out", "why": "it had not ended"}}
    text = markdown(values)
    assert "NVIDIA H200, CUDA None, Python None, torch 2.11." in text
    assert "| CALM-M, the recipe, 4 x 8 | 500,000 | 450 ms | 46.0% | 43.0% | 31.0 GB | 80.0% |" in (
        text
    )
    assert "| CALM-M, the recipe: peak memory | 31.0 GB | 31.5 GB | 32.0 GB |" in text
    assert "| kernels and copies of 4 micro-batches | 8,020 | 8,629 | |" in text
    assert "- attention kernels: timed out: it had not ended" in text
    assert "| MFU of CALM-M, full attention counted | >= 45% | 46.0% (calm_m) | met |" in text
    # Nothing at all is a page, too.
    assert "not measured" in markdown({})


def test_a_resumed_run_is_equal_or_says_why_not() -> None:
    steps = {number: 1.0 + number for number in range(1, recovery.STEPS + 1)}
    other = steps | {20: 21.5}
    found = recovery.compare({"killed": steps, "first": steps, "second": steps})
    assert found["equal"] and found["repeats"] and found["largest_difference"] == 0
    found = recovery.compare({"killed": other, "first": steps, "second": steps})
    assert not found["equal"] and found["first_different_step"] == 20
    assert found["why_not_equal"].startswith("unknown")
    found = recovery.compare({"killed": other, "first": steps, "second": steps | {3: 4.1}})
    assert "two runs that nothing interrupts differ" in found["why_not_equal"]
    with pytest.raises(RuntimeError, match=r"'second': \[30\]"):
        recovery.compare({"killed": steps, "first": steps,
                          "second": {n: x for n, x in steps.items() if n < 30}})  # fmt: skip


def test_the_device_is_busy_once_where_kernels_overlap() -> None:
    assert covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    assert covered([]) == 0
