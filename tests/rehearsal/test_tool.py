"""The command line of `tools/rehearse.py`, and what it prints, without a CUDA build of torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launches import ROOT, call

from calm_dist.costs.clusters import PRESETS
from calm_dist.costs.memory import Memory
from calm_dist.errors import UserError
from calm_dist.recipe import LanguageModelRecipe, load_recipe
from calm_dist.rehearsal import stand_in
from calm_dist.rehearsal.rehearse import NOT_PROVEN, compare, first_ranks, layout, stage_of
from calm_dist.rehearsal.terminal import format_rehearsal

CALM_XL = str(ROOT / "recipes" / "calm_xl_tp2pp2.yaml")
GPU = PRESETS["h100-sxm"]


def rehearse(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A rehearsal that is refused."""
    return call([sys.executable, str(ROOT / "tools" / "rehearse.py"), *arguments], code=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "0,x"], "--rank: invalid _ranks value: '0,x'"),
        (["--rank", "-1"], "--rank"),
        (["--world", "0"], "0: give a whole number from 1"),
        (["--gpu", "h100"], "invalid choice: 'h100'"),
        (["--world", "128", "--rank", "128"], "--rank 128: the run has ranks 0 to 127"),
        (["--world", "3"], "parallel"),
        (["--world", "8", "parallel.world_size=16"], "contradicts --world 8; omit one"),
        (["parallel.device=cpu"], "parallel.device: cpu; a rehearsal is of a run on GPUs"),
        (["model.vocab_size=null"], "vocab_size"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], message: str) -> None:
    assert message in rehearse(CALM_XL, *arguments).stderr


def test_a_cpu_build_says_what_to_install() -> None:
    import torch

    if torch.version.cuda:
        pytest.skip("torch is a CUDA build")
    done = rehearse(CALM_XL)
    assert f"torch {torch.__version__} is a CPU build" in done.stderr
    assert "pip install torch" in done.stderr


def test_every_kind_of_gpu_has_a_chip() -> None:
    assert stand_in.CHIPS.keys() == PRESETS.keys()


def test_a_missing_compiler_and_missing_headers_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(stand_in, "_roots", lambda package: [])
    with pytest.raises(UserError, match=r"cuda_runtime_api\.h: not found"):
        stand_in.compile_libraries()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / stand_in.HEADER).touch()
    # It has none of the types.
    with pytest.raises(UserError, match="cannot compile"):
        stand_in.compile_libraries()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="install gcc"):
        stand_in.compile_libraries()


def test_ranks_of_the_stages() -> None:
    recipe = load_recipe(CALM_XL, ["parallel.context_parallel_size=2"])
    assert isinstance(recipe, LanguageModelRecipe)
    # Tensor and context parallel ranks come first.
    assert first_ranks(recipe) == [0, 4]
    assert [stage_of(recipe, rank) for rank in range(10)] == [0] * 4 + [1] * 4 + [0] * 2


def results() -> dict[str, Any]:
    recipe = load_recipe(CALM_XL)
    assert isinstance(recipe, LanguageModelRecipe)
    kernels = [{"part": "head", "forward": 2, "backward": 3.5}]
    wait = {"what": "a number is read", "where": "calm_dist/training/optimizer.py:1", "count": 1}
    moved = {"operation": "all-reduce", "group": "DP (32)", "calls": 1, "bytes": 3_000_000}
    rank: dict[str, Any] = {
        "rank": 2,
        "stage": 1,
        "micro_batches": 8,
        "peak": 90_000_000_000,
        "built": 0,
        "at_peak": {"weights": 60_000_000_000, "activations: head": 30_000_000_000},
        "each": {"kernels": kernels, "waits": [], "collectives": []},
        "step": {"kernels": [{"part": "head", "forward": 16, "backward": 28}], "waits": [wait],
                 "collectives": [moved]},
    }  # fmt: skip
    rank |= compare(rank, Memory(weights=60_000_000_000, head_samples=40_000_000_000), GPU)
    failed = {"rank": 0, "stage": 0, "failed": {
        "error": "RuntimeError: two devices, cuda:0, cpu", "where": ["calm_dist/x.py:3: a + b"],
        "traceback": "Traceback"}}  # fmt: skip
    return {"name": "calm_xl", "gpu": "h100-sxm", "world_size": 128, "layout": layout(recipe),
            "ranks": [failed, rank], "not_proven": list(NOT_PROVEN)}  # fmt: skip


def test_the_text_names_what_a_reader_needs() -> None:
    values = results()
    json.dumps(values, allow_nan=False)
    text = format_rehearsal(values)
    assert "TP 2, PP 2, DP 32, 8 micro-batches of 1" in text
    assert "FAILED: RuntimeError: two devices, cuda:0, cpu\n    calm_dist/x.py:3: a + b\n" in text
    assert "90.0 GB of 77.0 GB: DOES NOT FIT; planner 100.0 GB (rehearsed -10.0%)" in text
    lines = text.splitlines()
    assert ["head", "2", "3.5", "44"] in [line.split() for line in lines]
    assert any(line.endswith("calm_dist/training/optimizer.py:1") for line in lines)
    assert any("all-reduce, DP (32)" in line and line.endswith("3.0 MB") for line in lines)
    assert all(what.split(":")[0] in text for what in NOT_PROVEN)
    assert max(map(len, lines)) <= 100
