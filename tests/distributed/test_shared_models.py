"""A model that several processes share scores and generates as in one process."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from launches import ROOT, Tiny, run_worker, untrained_run

from calm_dist.errors import UserError
from calm_dist.inference.loading import load_model, load_released
from calm_dist.interop.convert import export_checkpoint
from calm_dist.parallel.launch import World, tensor_parallel_world

WORKER = Path(__file__).parent / "tools_worker.py"


def jobs(runs: dict[str, Path], store: Path, out: Path) -> list[dict[str, Any]]:
    listed = []
    for kind, run in runs.items():
        model = ["--checkpoint", str(run), "--device", "cpu"]
        scored = [
            *model,
            "--data",
            str(store),
            "--blocks",
            "2",
            "--json",
            str(out / f"{kind}.json"),
        ]
        texts = [*model, "--prompt", "def read", "--prompt", "a", "--max-new-tokens", "12"]
        texts += ["--temperature", "1", "--json", str(out / f"{kind}.texts.json")]
        listed += [
            {"tool": str(ROOT / "tools/evaluate.py"), "arguments": scored},
            {"tool": str(ROOT / "tools/generate.py"), "arguments": texts},
        ]
    return listed


def test_two_processes_score_and_generate_as_one(
    tiny: Tiny, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {kind: untrained_run(tiny, tmp_path / kind, kind) for kind in ("calm", "transformer")}
    outs = [tmp_path / name for name in ("one", "two")]
    for out in outs:
        out.mkdir()
    for job in jobs(runs, store, outs[0]):
        monkeypatch.setattr(sys, "argv", [job["tool"], *job["arguments"]])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(job["tool"], run_name="__main__")
        assert not ended.value.code
    for run in runs.values():
        (run / "metrics.jsonl").unlink()
    run_worker(2, WORKER, jobs(runs, store, outs[1]), tmp_path)
    for kind, run in runs.items():
        one, two = (json.loads((out / f"{kind}.json").read_text()) for out in outs)
        assert one["protocol"] == two["protocol"]
        loss = "energy_loss" if kind == "calm" else "cross_entropy"
        assert two[loss] == pytest.approx(one[loss], rel=1e-5)
        assert two["brier"] == pytest.approx(one["brier"], rel=1e-4, abs=1e-6) and any(one["brier"])
        one, two = (json.loads((out / f"{kind}.texts.json").read_text()) for out in outs)
        assert one == two and len(one[0]["tokens"]) == 12
        # One process writes.
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 1


def test_what_processes_cannot_share(tiny: Tiny, tmp_path: Path) -> None:
    def load(run: Path, processes: int) -> None:
        load_model(run, world=World(0, processes, 0, processes, "127.0.0.1", 1, "torchrun"))

    run = untrained_run(tiny, tmp_path / "calm", "calm")
    with pytest.raises(UserError, match=r"(?s)by 3 processes; start .*num_attention_heads 4"):
        load(run, 3)
    with pytest.raises(UserError, match=r"tokens.*: has the tokens head, which 2 processes cannot"):
        load(untrained_run(tiny, tmp_path / "tokens", "tokens"), 2)
    export_checkpoint(run, tmp_path / "released")
    assert load_released(tmp_path / "released").kind == "calm"
    with pytest.raises(UserError, match=r"released: a directory in the released .*import-hf"):
        load(tmp_path / "released", 2)


def test_the_world_of_a_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    # A task of srun is one of several independent ones.
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "2")
    assert tensor_parallel_world().size == 1
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert tensor_parallel_world().size == 1
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert (tensor_parallel_world().rank, tensor_parallel_world().size) == (1, 2)
