"""The optimizer of docs/howto/add_an_optimizer.md, installed as a package of its own.

Beside it a twin of AdamW, which takes the way of every other optimizer through Megatron and must
train as AdamW itself does.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launches import ALONE, ROOT, call, recipe, torchrun, training_records

PAGE = ROOT / "docs" / "howto" / "add_an_optimizer.md"
TWIN = """
from calm_dist.optimizers import OptimizerSpec
TWIN = OptimizerSpec(
    "twin", "calm_dist.optimizers.adamw:adamw", ("exp_avg", "exp_avg_sq"), accesses=(11, 15)
)
"""
# The stage's row of the dry run: weights, gradients, optimizer.
OPTIMIZER_COLUMN = re.compile(r"^0 .*?% +[\d.]+ GB +[\d.]+ GB +([\d.]+) GB", re.MULTILINE)
Tool = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def tool(tmp_path_factory: pytest.TempPathFactory) -> Tool:
    directory = tmp_path_factory.mktemp("site")
    spec, build = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (directory / "nesterov").mkdir()
    for name, text in (("__init__", ""), ("spec", spec + TWIN), ("build", build)):
        (directory / "nesterov" / f"{name}.py").write_text(text, encoding="utf-8")
    facts = directory / "nesterov-0.1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: nesterov\nVersion: 0.1\n")
    (facts / "entry_points.txt").write_text(
        "[calm_dist.optimizers]\nnesterov = nesterov.spec:NESTEROV\ntwin = nesterov.spec:TWIN\n"
    )
    path = f"{directory}:{ROOT}"
    return lambda *command, code=0: call(list(map(str, command)), code=code, PYTHONPATH=path)


def curve(run_dir: Path) -> list[float]:
    return [record["loss"] for _, record in sorted(training_records(run_dir).items())]


def test_an_installed_optimizer_trains(
    tmp_path: Path, tiny: Callable[..., list[str]], tool: Tool
) -> None:
    train = ROOT / "tools" / "train.py"

    def run(name: str, optimizer: str, ranks: int, layout: dict[str, object]) -> list[float]:
        more = {"training__steps": 4, "training__warmup_steps": 0, "checkpoint__every": 2}
        overrides = tiny(tmp_path / name, "calm", **more, **layout)
        overrides += ["training.learning_rate=0.01", "training.schedule=constant"]
        command = torchrun(ranks, train) if ranks > 1 else [sys.executable, train]
        tool(*command, recipe("calm"), *overrides, f"training.optimizer={optimizer}")
        return curve(tmp_path / name)

    alone = run("alone", "nesterov", 1, ALONE)
    assert alone == pytest.approx(run("cut", "nesterov", 4, {}), rel=1e-5)
    adamw = run("adamw", "adamw", 1, ALONE)
    assert run("twin", "twin", 1, ALONE) == adamw
    assert max(abs(a - b) for a, b in zip(alone, adamw, strict=True)) > 1e-3
    # Continued from its middle in another layout, the run is that of one process.
    last = shutil.copytree(tmp_path / "cut", tmp_path / "continued") / "checkpoints/step_00000004"
    shutil.rmtree(last)
    assert run("continued", "nesterov", 1, ALONE) == pytest.approx(alone, rel=1e-5)
    assert last.is_dir()

    again = [sys.executable, train, tmp_path / "alone" / "recipe.yaml", "training.steps=6"]
    other = tool(*again, "training.optimizer=adamw", code=2)
    assert "training.optimizer" in other.stderr
    stage = tiny(tmp_path / "stage", "calm", run__continue_from=tmp_path / "alone", **ALONE)
    refused = tool(sys.executable, train, recipe("calm"), *stage, code=2)
    assert "training.optimizer" in refused.stderr
    sharded = tool(*again, "training.optimizer=nesterov", "parallel.distributed_optimizer=true",
                   code=2)  # fmt: skip
    assert "Megatron cannot gather the state of training.optimizer nesterov" in sharded.stderr


def test_an_autoencoder_with_an_installed_optimizer(
    tmp_path: Path, tiny: Callable[..., list[str]], tool: Tool
) -> None:
    train = ROOT / "tools" / "train_autoencoder.py"

    def run(name: str, steps: int) -> list[float]:
        more = {"training__steps": steps, "training__warmup_steps": 0, "checkpoint__every": 2}
        overrides = tiny(tmp_path / name, "autoencoder", **more)
        tool(sys.executable, train, recipe("autoencoder"), *overrides,
             "training.optimizer=nesterov", "training.schedule=constant")  # fmt: skip
        return curve(tmp_path / name)

    unbroken = run("unbroken", 4)
    run("broken", 2)
    assert run("broken", 4) == unbroken


def test_dry_run_and_plan_count_its_state(tool: Tool, tmp_path: Path) -> None:
    """One number for each parameter, in fp32, where AdamW has two."""
    calm_m = ROOT / "recipes" / "calm_m.yaml"
    dry = [sys.executable, ROOT / "tools" / "train.py", calm_m, "--dry-run"]
    plan = [sys.executable, ROOT / "tools" / "plan.py", calm_m, "--nodes", "1"]
    in_memory, in_checkpoint = {}, {}
    for name in ("adamw", "nesterov"):
        shown = tool(*dry, f"training.optimizer={name}").stdout
        (in_memory[name],) = map(float, OPTIMIZER_COLUMN.findall(shown))
        file = tmp_path / f"{name}.json"
        tool(*plan, "--json", file, f"training.optimizer={name}")
        planned = json.loads(file.read_text())
        in_checkpoint[name] = planned["recipe"]["run"]["checkpoint"]["bytes"]
    saved = in_checkpoint["adamw"] - in_checkpoint["nesterov"]
    assert saved == pytest.approx(4 * planned["parameters"], rel=1e-3)
    # In memory there is the fp32 weight, too: 8 bytes instead of 12.
    assert in_memory["nesterov"] == pytest.approx(in_memory["adamw"] * 8 / 12, abs=0.1)
    unknown = tool(*dry, "training.optimizer=lion", code=2).stderr
    assert "training.optimizer: found 'lion'; use one of adamw, nesterov, twin" in unknown
