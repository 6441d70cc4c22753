"""Runs, stores and autoencoders of earlier versions are continued, read and exported."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from launches import ROOT, call
from safetensors import safe_open

HERE = Path(__file__).parent
VERSIONS = sorted(path.name for path in HERE.iterdir() if (path / "expected.json").is_file())
assert VERSIONS


def tool(name: str, *arguments: str, cwd: Path) -> str:
    done = call([sys.executable, str(ROOT / "tools" / f"{name}.py"), *arguments], cwd=cwd)
    return done.stdout + done.stderr


def later_steps(run: Path) -> dict[str, list[float]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return {str(r["step"]): [r["loss"], r["grad_norm"]] for r in records if r["step"] > 8}


@pytest.mark.parametrize("version", VERSIONS)
def test_work_of_an_earlier_version(version: str, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(HERE / version, work)
    expected: dict[str, Any] = json.loads((work / "expected.json").read_text(encoding="utf-8"))

    rows = json.loads(tool("runs", ".", "--json", "-", cwd=work))
    assert {(row["name"], row["state"], row["step"]) for row in rows} == {
        ("autoencoder", "finished", 8),
        ("run", "finished", 8),
    }
    assert "done in" in tool("train", "run/recipe.yaml", "training.steps=12", cwd=work)
    for step, values in later_steps(work / "run").items():
        assert values == pytest.approx(expected["run"].pop(step), rel=1e-5)
    assert not expected["run"]

    start = "run/checkpoints/step_00000008"
    tool("evaluate", "--checkpoint", start, "--data", "store", "--json", "scores.json", cwd=work)
    scores = json.loads((work / "scores.json").read_text(encoding="utf-8"))
    assert scores["brier"] == pytest.approx(expected["brier"], abs=1e-12)
    assert scores["energy_loss"] == pytest.approx(expected["energy_loss"], rel=1e-5)

    tool("convert_checkpoint", "export-hf", start, "exported", cwd=work)
    with safe_open(work / "exported" / "model.safetensors", "pt") as tensors:
        exported = {
            name: hashlib.sha256(tensors.get_tensor(name).numpy().tobytes()).hexdigest()[:16]
            for name in tensors.keys()  # noqa: SIM118  (no mapping)
        }
    # The tied matrix was written twice, which the authors' classes load as two parameters.
    untied = expected["exported"].keys() - exported.keys()
    assert untied <= {"ae_model.encoder.embed_tokens.weight"}
    assert {**expected["exported"], **exported} == expected["exported"]
    tool("report", "--run", "run", "--autoencoder", "autoencoder", "--out", "report", cwd=work)

    # Last, since the latents in the store are of the autoencoder as it was.
    resumed = ("autoencoder/recipe.yaml", "training.steps=12")
    assert "done in" in tool("train_autoencoder", *resumed, cwd=work)
    for step, values in later_steps(work / "autoencoder").items():
        assert values == pytest.approx(expected["autoencoder"].pop(step), rel=1e-5)
    assert not expected["autoencoder"]


def write_field(directory: Path, old: str, new: str) -> None:
    """Add a line to the recipe of a run and of its checkpoint, whose manifest then lists that."""
    (checkpoint,) = (directory / "checkpoints").glob("step_*")
    for file in (directory / "recipe.yaml", checkpoint / "recipe.yaml"):
        text = file.read_text(encoding="utf-8")
        assert text.count(old) == 1
        file.write_text(text.replace(old, new), encoding="utf-8")
    manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    recipe = (checkpoint / "recipe.yaml").read_bytes()
    sha256 = hashlib.sha256(recipe).hexdigest()
    manifest["recipe.yaml"] = {"bytes": len(recipe), "sha256": sha256}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_a_run_that_was_given_fields_which_its_version_ignored(tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(HERE / "before_rooms", work)
    expected: dict[str, Any] = json.loads((work / "expected.json").read_text(encoding="utf-8"))
    write_field(work / "run", "    sampling_steps:", "    width: 24\n    sampling_steps:")
    write_field(work / "autoencoder", "  recompute: false", "  recompute: true")

    start = "run/checkpoints/step_00000008"
    said = tool(
        "evaluate", "--checkpoint", start, "--data", "store", "--json", "scores.json", cwd=work
    )
    assert "model.head.width: 24 is left out" in said
    scores = json.loads((work / "scores.json").read_text(encoding="utf-8"))
    assert scores["energy_loss"] == pytest.approx(expected["energy_loss"], rel=1e-5)
    # Continued, not begun again.
    for name, program in (("run", "train"), ("autoencoder", "train_autoencoder")):
        said = tool(program, f"{name}/recipe.yaml", "training.steps=9", cwd=work)
        assert "is left out" in said and "step 8" in said
        (values,) = later_steps(work / name).values()
        assert values == pytest.approx(expected[name]["9"], rel=1e-5)
    assert "width: null" in (work / "run" / "recipe.yaml").read_text(encoding="utf-8")
