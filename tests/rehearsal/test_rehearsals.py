"""Whole rehearsals in an environment with a CUDA build of torch, held to the planner.

The environment takes 7 GB and some minutes; CALM_CUDA_PYTHON names the interpreter of one that is
there already.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launches import ROOT
from random_layouts import random_layout

from calm_dist.costs.clusters import PRESETS
from calm_dist.gpu_check.recovery import write_recipe
from calm_dist.rehearsal.stand_in import environment

pytestmark = pytest.mark.full

# What the planner and a rehearsal may differ by.
TOLERANCE = 0.05
SMALL = (
    "model.num_hidden_layers=8",
    "training.global_batch_size=32",
    "training.micro_batch_size=1",
)
OVERLAPS = (
    "parallel.distributed_optimizer=true",
    "parallel.overlap_grad_reduce=true",
    "parallel.overlap_param_gather=true",
)


def cut(**sizes: object) -> tuple[str, ...]:
    return tuple(f"parallel.{name}={value}" for name, value in sizes.items())


TP2 = cut(tensor_parallel_size=2, sequence_parallel="true")
LAYOUTS = {
    "calm_m": ("calm_m",),
    "calm_xl": ("calm_xl", "--world", "128"),
    "calm_xl_tp2pp2": ("calm_xl_tp2pp2", "--world", "128"),
    "calm_7b": ("calm_7b", "--world", "512"),
    "transformer_m": ("transformer_m",),
    "interleaved": ("calm_m", *SMALL, *TP2, *OVERLAPS,
                    *cut(pipeline_parallel_size=2, virtual_pipeline_size=2, overlap_p2p="true")),
    "context": ("calm_m", *SMALL, *TP2, *cut(context_parallel_size=2)),
    "torch_score": ("calm_m", *SMALL, "training.energy_kernel=torch"),
    "zero3": ("calm_m", *SMALL, *cut(zero_stage=3), "training.micro_batch_size=2"),
    "fp32_zero1": ("calm_m", *SMALL, *cut(zero_stage=1), "precision=fp32",
                   "model.num_key_value_heads=4"),
    "flow": ("calm_m", *SMALL, "model.head={kind: flow, num_mlp_layers: 4}"),
    "diffusion": ("calm_m", *SMALL, "model.head={kind: diffusion, num_mlp_layers: 4}"),
    "chain": ("calm_m", *SMALL, "model.head={kind: chain}"),
    "tokens": ("calm_m", *SMALL, "model.head={kind: tokens}"),
    "transformer": ("transformer_m", "model.num_hidden_layers=8", *TP2, *OVERLAPS,
                    *cut(pipeline_parallel_size=2)),
    "on_the_fly": ("calm_m", *SMALL, "data.latents=on_the_fly",
                   "model.autoencoder=runs/autoencoder"),
    "autoencoder": ("autoencoder",),
    "autoencoder_fp32": ("autoencoder", "precision=fp32", "training.micro_batch_size=4"),
    "recompute": ("calm_m", *SMALL, *TP2, *cut(pipeline_parallel_size=4, recompute="true")),
}  # fmt: skip


# Where the host may wait besides once a step for loss, norm and flags, by layout.
ENCODER, ZERO_3 = "calm_dist/models/autoencoder.py", "deepspeed/runtime/zero/"
ALLOWED_WAITS = {
    "on_the_fly": (ENCODER,),
    "autoencoder": (ENCODER,),
    "autoencoder_fp32": (ENCODER,),
    "zero3": (ZERO_3,),
}


@pytest.fixture(scope="session")
def cuda_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of an environment with a CUDA build of torch."""
    if given := os.environ.get("CALM_CUDA_PYTHON"):
        return given
    place = tmp_path_factory.mktemp("cuda_env")
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    pip = [str(place / "bin" / "pip"), "install", "-qq"]
    subprocess.run([*pip, "torch"], check=True)
    python = str(place / "bin" / "python")
    show = "from importlib.metadata import version; print(version('torch').split('+')[0])"
    torch = subprocess.run([python, "-c", show], check=True, capture_output=True, text=True)
    # The other packages as pinned, but for the one that pins torch.
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    constraints = place / "constraints.txt"
    constraints.write_text(re.sub(r"^(torch|torchvision|triton)==.*\n", "", pins, flags=re.M))
    subprocess.run(
        [*pip, "-c", str(constraints), f"torch=={torch.stdout.strip()}", str(ROOT)],
        check=True,
        env={**os.environ, "DS_BUILD_OPS": "0"},
    )
    return python


def rehearse(python: str, place: Path, recipe: str, *arguments: str) -> dict[str, Any]:
    result = place / "rehearsal.json"
    done = subprocess.run(
        [python, str(ROOT / "tools" / "rehearse.py"),
         # An absolute path stays as it is.
         str(ROOT / "recipes" / recipe) + ("" if recipe.endswith(".yaml") else ".yaml"),
         *arguments, "--json", str(result)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    print(done.stdout)
    return json.loads(result.read_text(encoding="utf-8"))


def launches(counts: dict[str, Any]) -> float:
    return sum(row.get("forward", 0) + row.get("backward", 0) for row in counts["kernels"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_runs_and_needs_what_the_planner_says(
    name: str, cuda_python: str, tmp_path: Path
) -> None:
    values = rehearse(cuda_python, tmp_path, *LAYOUTS[name])
    assert [rank["stage"] for rank in values["ranks"]] == list(range(values["layout"]["pipeline"]))
    for rank in values["ranks"]:
        assert abs(rank["difference"]) < TOLERANCE, rank
        assert rank["fits"]
        assert sum(rank["memory"].values()) == rank["peak"]
        # What a micro-batch does is a whole number: work grows with their number.
        assert launches(rank["each"]) == pytest.approx(round(launches(rank["each"])), abs=1e-6)
        assert all(row["count"] >= 0 for row in rank["each"]["waits"])
        # Loss, norm and flags are read together. A library's wait is named before its caller.
        step = rank["step"]["waits"]
        waits = [row for row in step if row["where"].startswith("calm_dist/training/")]
        assert sum(row["count"] for row in waits) == 1, waits
        others = [
            row for row in (*step, *rank["each"]["waits"]) if row["count"] and row not in waits
        ]
        allowed = ALLOWED_WAITS.get(name, ())
        assert all(any(place in row["where"] for place in allowed) for row in others), others


@pytest.mark.parametrize("seed", range(20))
def test_a_layout_drawn_at_random_needs_what_the_planner_says(
    seed: int, cuda_python: str, tmp_path: Path
) -> None:
    values = rehearse(cuda_python, tmp_path, *random_layout(seed))
    for rank in values["ranks"]:
        assert abs(rank["difference"]) < TOLERANCE, (seed, rank["rank"], rank["difference"])


def test_the_check_of_a_gpu_runs_on_fake_tensors(cuda_python: str, tmp_path: Path) -> None:
    """Its code for GPUs at its own sizes, but for what depends on data: no tensor is on the wrong
    device."""
    parts = ("facts", "kernel", "attention", "calm_m", "transformer_m", "parity", "autoencoder",
             "inference")  # fmt: skip
    gpu = PRESETS["h200-sxm"]
    compile_code = "from calm_dist.rehearsal.stand_in import *; print(compile_libraries())"
    shared = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    libraries = subprocess.run([cuda_python, "-c", compile_code], env=shared, check=True,
                               capture_output=True, text=True).stdout.strip()  # fmt: skip
    faked = environment(Path(libraries), gpu) | {"TORCHDYNAMO_DISABLE": "1"}
    worker = Path(__file__).with_name("fake_gpu_check.py")
    done = subprocess.run(
        [cuda_python, str(worker), str(tmp_path), *parts],
        env={**shared, **faked, "CUDA_VISIBLE_DEVICES": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = {part: json.loads((tmp_path / f"{part}.json").read_text()) for part in parts}
    assert {part: values["status"] for part, values in found.items()} == dict.fromkeys(
        parts, "done"
    ), found
    assert found["facts"]["gpu"]["name"] == "NVIDIA H200"
    assert found["calm_m"]["planned"]["peak_bytes"] > 2.5e10
    # cuDNN's attention takes heads of 64 and 128.
    rows = found["attention"]["kernels"]
    assert all("seconds" in row for row in rows if row["head_dim"] < 160 and row["name"] == "cuDNN")


def test_the_run_that_the_check_kills_is_rehearsed(cuda_python: str, tmp_path: Path) -> None:
    """The part ``recovery`` trains in processes of its own, which need real numbers."""
    recipe = write_recipe(tmp_path, "killed", torch.device("cuda"))
    (rank,) = rehearse(cuda_python, tmp_path, str(recipe), "model.vocab_size=300")["ranks"]
    assert rank["fits"] and rank["each"]["waits"] == []


def test_what_a_step_of_calm_m_costs(cuda_python: str, tmp_path: Path) -> None:
    """The host waits once, for loss, norm and flags, and the head's gradient is reduced once."""
    (rank,) = rehearse(cuda_python, tmp_path, "calm_m")["ranks"]
    each, step = rank["each"], rank["step"]
    assert each["waits"] == [] and each["collectives"] == []
    (wait,) = step["waits"]
    assert wait["count"] == 1 and "calm_dist/training/optimizer.py" in wait["where"]
    moved = {(row["operation"], row["group"]): row["bytes"] for row in step["collectives"]}
    gathered = moved["all-gather", "head (8)"]
    assert moved["all-reduce", "head (8)"] == pytest.approx(gathered, rel=0.01)
    # Those of a micro-batch beyond the first two.
    assert launches(each) <= 900


def test_a_device_mismatch_is_named(cuda_python: str, tmp_path: Path) -> None:
    """A copy of the package in which the weights of positions stay on the host."""
    package = tmp_path / "calm_dist"
    subprocess.run(["cp", "-r", str(ROOT / "calm_dist"), str(package)], check=True)
    pipeline = package / "parallel" / "pipeline.py"
    text = pipeline.read_text(encoding="utf-8")
    broken = text.replace("self._weight = valid.float() / count",
                          "self._weight = valid.float().cpu() / count")  # fmt: skip
    assert broken != text
    pipeline.write_text(broken, encoding="utf-8")
    done = subprocess.run(
        [cuda_python, str(ROOT / "tools" / "rehearse.py"), str(ROOT / "recipes/calm_m.yaml"),
         *SMALL],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search("FAILED: .*same device.* cuda:0 and cpu", done.stdout), done.stdout
    assert re.search(r"calm_dist/models/heads/\w+\.py:\d+: ", done.stdout), done.stdout
