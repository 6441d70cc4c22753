"""Plans of many trainings: what they stand for, and a small one from corpus to results."""

from __future__ import annotations

import json
import lzma
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launches import ROOT, call, language_recipe

from calm_dist.errors import DataError, RecipeError
from calm_dist.study import runner
from calm_dist.study.data import find_splits
from calm_dist.study.plan import read_plan
from calm_dist.study.runner import Runner, steps_for

STUDY = ROOT / "recipes" / "study"
PLANS = [path for path in sorted(STUDY.glob("*.yaml")) if "runs:" in path.read_text()]


def plan_file(directory: Path, **fields: Any) -> Path:
    file = directory / "plan.yaml"
    file.write_text(json.dumps({"block_size": 32, "vocabulary": 259, **fields}))
    return file


def entry(name: str, recipe: str = "calm", **fields: Any) -> dict[str, Any]:
    return {"name": name, "recipe": str(STUDY / f"{recipe}.yaml"), **fields}


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_plans_of_the_repository(path: Path) -> None:
    _, runs = read_plan(path)
    places = {run.name: place for place, run in enumerate(runs)}
    assert len(places) == len(runs) > 3
    assert all(places[run.autoencoder] < places[run.name] for run in runs if run.autoencoder)


def test_a_grid_stands_for_every_combination(tmp_path: Path) -> None:
    grid = {"training.learning_rate": [1e-3, 0.002], "model.head.kind": ["flow", "energy"]}
    runs = [
        entry("ae", "autoencoder"),
        entry("a", autoencoder="ae", grid=grid, seeds=[3, 4], overrides={"training.steps": 7}),
    ]
    _, planned = read_plan(plan_file(tmp_path, runs=runs))
    assert [run.name for run in planned][:2] == ["ae", "a-learning_rate=0.001-kind=flow-s3"]
    assert len(planned) == 1 + 8
    assert planned[2].overrides == (
        "training.steps=7", "training.learning_rate=0.001", "model.head.kind=flow", "run.seed=4",
        "data.seed=4",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "runs: "),
        ([entry("a"), entry("a")], "a occurs twice"),
        ([entry("a/b")], "a/b cannot name a directory"),
        ([entry("a", autoencoder="b")], "autoencoder b is not a run of this plan; use one of a"),
        ([{"name": "a", "recipe": "none.yaml"}], "none.yaml: no such recipe"),
        ([entry("a", flop=1e12)], "runs.0.flop: unknown key"),
        ([entry("a", flops=-1)], "runs.0.flops: found -1"),
        ([entry("a", grid={"run.seed": []})], "runs.0.grid.run.seed: found"),
        ([entry("a", grid={"data.seed": [1, 2]})], "a: data.seed: is set by seeds"),
        ([entry("a", overrides={"run.seed": 5})], "a: run.seed: is set by seeds"),
    ],
)
def test_faults_of_a_plan_are_named(
    tmp_path: Path, runs: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        read_plan(plan_file(tmp_path, runs=runs))
    assert message in str(caught.value)


def test_a_plan_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_bytes(b"# \xe9\n")
    with pytest.raises(RecipeError, match=r"plan\.yaml: is not UTF-8 text"):
        read_plan(tmp_path / "plan.yaml")


def test_a_calm_without_its_autoencoder_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that diverged has a result and no finished training: nothing waits for it."""
    runs = [entry("ae", "autoencoder"), entry("a", autoencoder="ae")]
    plan, planned = read_plan(plan_file(tmp_path, runs=runs))
    monkeypatch.setattr(Runner, "run_one", lambda self, run: {"name": run.name})
    monkeypatch.setattr(runner, "_line", str)
    (message,) = Runner(plan, tmp_path / "out").run_all(planned, jobs=2)
    assert message.startswith("a: its autoencoder ae has no finished training in ")


def test_splits_of_a_corpus(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"0 files train.\*"):
        find_splits(tmp_path)
    for name in ("train.jsonl.xz", "valid.txt", "test.jsonl", "test.txt"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"2 files test.\*"):
        find_splits(tmp_path)
    (tmp_path / "test.txt").unlink()
    assert find_splits(tmp_path)["train"] == tmp_path / "train.jsonl.xz"


def test_steps_of_a_budget() -> None:
    overrides = ["model.vocab_size=300", "data.block_size=64"]
    recipe = language_recipe(STUDY / "transformer.yaml", overrides)
    # d 64, f 160, 2 layers, attention over 64 steps, 300 words, forward and backward.
    token = 3 * (2 * (8 * 64**2 + 4 * 64 * 64 + 6 * 64 * 160) + 2 * 64 * 300)
    assert steps_for(recipe, 50.4 * token * 4 * 64) == 50


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    text = Path(json.__file__).with_name("decoder.py").read_text(encoding="utf-8")
    lines = [json.dumps({"id": str(i), "text": text[i * 900 : (i + 1) * 900]}) for i in range(10)]
    with lzma.open(directory / "train.jsonl.xz", "wt") as file:
        file.write("\n".join(lines[:6]))
    for split, part in (("valid", lines[6:8]), ("test", lines[8:])):
        (directory / f"{split}.jsonl").write_text("\n".join(part))
    return directory


def test_a_plan_from_corpus_to_results(corpus: Path, tmp_path: Path) -> None:
    """A chain on an autoencoder with slots, the control, and a run that cannot be trained; then
    again, where only the last is tried."""
    small = {"training.steps": 2, "training.warmup_steps": 1}
    runs = [
        entry("chain", autoencoder="ae", overrides={**small, "model.head.kind": "chain"}),
        entry("control", "tokens", flops=2e8, all_checkpoints=True,
              overrides={"checkpoint.every": 1, "checkpoint.keep": 99}),
        entry("wrong", autoencoder="ae", overrides={**small, "model.latent_size": 8}),
        entry("ae", "autoencoder", overrides={**small, "model.latent_slots": 4}),
    ]  # fmt: skip
    evaluation = {"split": "test", "blocks": 3, "samples": 2}
    texts = {"prompts": ["def", "The <x>"], "temperatures": ["1", "1/2"], "tokens": 5}
    plan = plan_file(tmp_path, runs=runs, evaluation=evaluation, texts=texts)
    out = tmp_path / "out"
    study = [sys.executable, str(ROOT / "tools" / "study.py"), str(plan), "--out", str(out)]
    first = call([*study, "--corpus", str(corpus), "--jobs", "2"], code=2)
    assert "1 of 4 runs failed\n  wrong: " in first.stderr and "3/4  " in first.stdout
    listed = call([*study, "--list"]).stdout.splitlines()
    assert sorted(listed) == ["done  ae", "done  chain", "done  control", "left  wrong"]

    assert "model.latent_size: 8 in the recipe, 32 in the autoencoder" in first.stderr
    again = call([*study, "--corpus", str(corpus)], code=2)
    assert again.stdout.count("BrierLM") == 0
    call([*study, "--collect", str(tmp_path / "results.json")])
    collected = json.loads((tmp_path / "results.json").read_text())["runs"]
    results = {result["name"]: result for result in collected}
    chain, control, encoder = (results[name] for name in ("chain", "control", "ae"))
    assert chain["head"] == "chain" and chain["autoencoder"] == "ae" and chain["steps"] == 2
    assert chain["encoding_flops"] > 0 and "model.latent_slots" not in str(chain["overrides"])
    assert control["kind"] == "tokens" and control["encoding_flops"] == 0
    # The budget is met within half a step.
    step = control["train_flops"] / control["steps"]
    assert abs(control["train_flops"] - 2e8) <= step / 2
    assert control["steps"] > 1
    assert [one["step"] for one in control["earlier"]] == list(range(1, control["steps"]))
    assert control["cross_entropy"] > 0 and control["protocol"]["blocks"] == 3
    assert len(control["brier"]) == 4 and control["brierlm_of_samples"] >= 0
    written = [(one["temperature"], one["prompt"]) for one in chain["texts"]]
    assert written == [("1", "def"), ("1", "The <x>"), ("1/2", "def"), ("1/2", "The <x>")]
    assert "texts" not in encoder
    assert encoder["kind"] == "autoencoder" and 0 <= encoder["token_accuracy"] <= 1
    assert str(tmp_path) not in json.dumps([r["overrides"] for r in collected])

    # A plan that asks for texts later gets them without another training.
    result = out / "results" / "control.json"
    result.write_text(json.dumps({k: v for k, v in control.items() if k != "texts"}))
    call([*study, "--corpus", str(corpus), "--only", "control"])
    assert json.loads(result.read_text()) == control

    # On another machine: only the run that is left, and the autoencoder that it needs.
    known = tmp_path / "known.json"
    known.write_text(json.dumps({"runs": [encoder, control]}))
    elsewhere = [*study[:-1], str(tmp_path / "elsewhere"), "--corpus", str(corpus)]
    done = call([*elsewhere, "--known", str(known), "--only", "chain"])
    assert f"2 results taken from {known}" in done.stdout
    lines = [line.split(":")[0] for line in done.stdout.splitlines() if "/2  " in line]
    assert lines == ["1/2  ae", "2/2  chain"]
    known.write_text(json.dumps({"runs": [{"name": "../chain"}]}))
    refused = call([*elsewhere, "--known", str(known)], code=2)
    assert "'../chain' cannot name a run" in refused.stderr


def test_a_recipe_that_cannot_be_trained_is_refused_first(corpus: Path, tmp_path: Path) -> None:
    wrong = {"model.num_attention_heads": 3}
    runs = [entry("a", "tokens"), entry("b", "transformer", overrides=wrong)]
    plan, out = plan_file(tmp_path, runs=runs), tmp_path / "out"
    study = [sys.executable, str(ROOT / "tools" / "study.py"), str(plan), "--out", str(out)]
    done = call([*study, "--corpus", str(corpus)], code=2)
    assert "run b: " in done.stderr and "model.hidden_size: 64 is not a" in done.stderr
    assert not (out / "runs").exists()


def test_a_study_without_a_tokenizer(corpus: Path, tmp_path: Path) -> None:
    plan = plan_file(tmp_path, runs=[entry("a", "tokens")], vocabulary=None)
    study = [sys.executable, str(ROOT / "tools" / "study.py"), str(plan), "--out", str(tmp_path)]
    done = subprocess.run(
        [*study, "--corpus", str(corpus)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "the plan's vocabulary is None; give exactly one of them" in done.stderr
