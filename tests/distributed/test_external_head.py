"""The head of docs/howto/add_a_head.md, installed as a package of its own, through every tool."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launches import ALONE, ROOT, call, recipe, torchrun, training_records

from calm_dist.heads import all_specs

PAGE = ROOT / "docs" / "howto" / "add_a_head.md"
HEAD = ["model.head.kind=gaussian", "model.head.min_std=0.02"]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for PYTHONPATH that holds the page's package as an installation would."""
    directory = tmp_path_factory.mktemp("site")
    spec, module = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (directory / "gaussian_head").mkdir()
    for name, text in (("__init__", ""), ("spec", spec), ("module", module)):
        (directory / "gaussian_head" / f"{name}.py").write_text(text, encoding="utf-8")
    facts = directory / "gaussian_head-0.1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: gaussian-head\nVersion: 0.1\n")
    (facts / "entry_points.txt").write_text(
        "[calm_dist.heads]\ngaussian = gaussian_head.spec:GAUSSIAN\n"
    )
    return directory


@pytest.fixture(scope="module")
def tool(package: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    # The tools come from this checkout; the package stands beside what is on the path already.
    path = f"{package}:{ROOT}"
    return lambda *command, code=0: call(list(map(str, command)), code=code, PYTHONPATH=path)


def python(name: str) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / name)]


def test_an_installed_head_works_in_every_tool(
    tmp_path: Path,
    tiny: Callable[..., list[str]],
    store: Path,
    tool: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    plan = tmp_path / "plan.json"
    dry = tool(*python("train.py"), ROOT / "recipes" / "calm_m.yaml", *HEAD, "--dry-run")
    # 4 x Linear(1024, 1024) and Linear(1024, 256), with biases.
    assert "4.46M" in dry.stdout or "4,460,800" in dry.stdout, dry.stdout
    tool(*python("plan.py"), ROOT / "recipes" / "calm_m.yaml", *HEAD, "--json", plan)
    assert json.loads(plan.read_text())

    losses = []
    for name, ranks, layout in (("alone", 1, ALONE), ("cut", 4, {})):
        overrides = tiny(tmp_path / name, "calm", training__steps=3, **layout)
        train = ROOT / "tools" / "train.py"
        command = torchrun(ranks, train) if ranks > 1 else [sys.executable, train]
        tool(*command, recipe("calm"), *overrides, *HEAD)
        records = training_records(tmp_path / name)
        losses.append([records[step]["loss"] for step in (1, 2, 3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    saved = (tmp_path / "cut" / "recipe.yaml").read_text(encoding="utf-8")
    assert "kind: gaussian" in saved and "min_std: 0.02" in saved

    scores = tmp_path / "scores.json"
    tool(*python("evaluate.py"), "--checkpoint", tmp_path / "cut", "--data", store,
         "--blocks", "2", "--json", scores)  # fmt: skip
    assert "gaussian" in scores.read_text()
    text = tool(*python("generate.py"), "--checkpoint", tmp_path / "cut", "--prompt", "def",
                "--max-new-tokens", "8")  # fmt: skip
    assert "def" in text.stdout
    export = tool(*python("convert_checkpoint.py"), "export-hf", tmp_path / "cut",
                  tmp_path / "released", code=2)  # fmt: skip
    assert "gaussian" in export.stderr and "layout has no such head" in export.stderr
    assert not (tmp_path / "released").exists()


def test_faults_of_a_registered_head_are_named(
    package: Path, tool: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    calm_m = ROOT / "recipes" / "calm_m.yaml"
    wrong = tool(*python("train.py"), calm_m, HEAD[0], "model.head.min_std=-1", "--dry-run", code=2)
    assert "model.head.min_std: found -1" in wrong.stderr
    unknown = tool(*python("train.py"), calm_m, "model.head.kind=gauss", "--dry-run", code=2)
    known = ", ".join(all_specs())
    assert f"model.head.kind: found 'gauss'; use one of {known}, gaussian;" in unknown.stderr
    without = tool(*python("train.py"), calm_m, "model.head.min_std=1", "--dry-run", code=2)
    assert "model.head.min_std: unknown key" in without.stderr
    # A package whose entry point leads nowhere, beside it.
    other = tmp_path / "broken-0.1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 0.1\n")
    (other / "entry_points.txt").write_text("[calm_dist.heads]\nbroken = no_such_module:HEAD\n")
    broken = call(
        [*python("train.py"), str(calm_m), "--dry-run"], code=2, PYTHONPATH=f"{tmp_path}:{ROOT}"
    )
    assert "calm_dist.heads broken = no_such_module:HEAD of broken" in broken.stderr
