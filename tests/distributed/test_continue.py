"""A second stage begins with weights, moments and update count of another run, on any layout."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launches import (
    ALONE,
    ROOT,
    TIMEOUT_SECONDS,
    environment,
    language_recipe,
    recipe,
    run_jobs,
    training_records,
)
from warm import warm_python

from calm_dist.files import file_sha256
from calm_dist.parallel.launch import World
from calm_dist.runs import checkpoints
from calm_dist.runs.checkpoints.run_state import RunState
from calm_dist.training.resolve import resolve

TOOLS = {"calm": "train.py", "transformer": "train.py", "autoencoder": "train_autoencoder.py"}
SOURCE_STEPS, STEPS = 4, 3
TOLERANCE = 1e-5
MOMENTS = ("exp_avg", "exp_avg_sq")
CONSTANT: dict[str, object] = {
    "training__schedule": "constant",
    "training__warmup_steps": 0,
    "training__learning_rate": 1e-3,
    "logging__every": 1,
}
LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "tp2_pp2": (4, {}),
    "dp2_zero": (2, ALONE | {"parallel__distributed_optimizer": True}),
    "zero3": (2, ALONE | {"parallel__zero_stage": 3}),
}


def start(kind: str, overrides: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [warm_python(), str(ROOT / "tools" / TOOLS[kind]), recipe(kind), *overrides],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )


def alone(kind: str) -> dict[str, object]:
    return CONSTANT | ({} if kind == "autoencoder" else ALONE)


@pytest.fixture(scope="module")
def other_store(store: Path) -> Path:
    """Half of the text in blocks of another size."""
    from calm_dist.data.latents import plan_store, write_store
    from calm_dist.interop.huggingface import load_autoencoder
    from calm_dist.text.tokenizer import load_tokenizer

    root = store.parent
    text = (root / "corpus.txt").read_text(encoding="utf-8")
    corpus = root / "half.txt"
    corpus.write_text(text[: len(text) // 2])
    tokenizer, autoencoder = load_tokenizer(root / "t.json"), root / "autoencoder"
    plan = plan_store(
        [str(corpus)],
        tokenizer,
        variant="fp16",
        block_size=32,
        patch_size=None,
        autoencoder=autoencoder,
        seed=0,
    )
    model = load_autoencoder(autoencoder)
    write_store(root / "other", [str(corpus)], tokenizer, plan, autoencoder=model)
    return root / "other"


@pytest.fixture(scope="module")
def sources(
    tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., list[str]]
) -> dict[str, Path]:
    """Run directories of one process."""
    root = tmp_path_factory.mktemp("sources")
    for kind in TOOLS:
        more = alone(kind) | {"training__steps": SOURCE_STEPS}
        done = start(kind, tiny(root / kind, kind, **more))
        assert done.returncode == 0, done.stderr
    return {kind: root / kind for kind in TOOLS}


def contents(run_dir: Path) -> dict[str, str]:
    return {str(p): file_sha256(p) for p in sorted(run_dir.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("kind", ["calm", "transformer"])
def test_weights_moments_and_count_are_those_of_the_source(
    kind: str, sources: dict[str, Path], tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Beside an ordinary resume of the source: equal to the bit, and so is a step of both."""
    from calm_dist.inference.load import single_process_topology
    from calm_dist.training.checkpoint import model_state
    from calm_dist.training.language_model import Trainer

    World(0, 1, 0, 1, "", 0, "test").export()
    trainers = []
    for run_dir, source in ((sources[kind], "null"), (tmp_path / "run", sources[kind])):
        run_dir.mkdir(exist_ok=True)
        more = alone(kind) | {"run__continue_from": source, "parallel__device": "cpu"}
        given = resolve(language_recipe(recipe(kind), tiny(run_dir, kind, **more)))
        topology = single_process_topology(given, torch.device("cpu"))
        trainers.append((Trainer(given, topology), topology))
    (resumed, _), (continued, _) = trainers
    assert (resumed.progress.step, continued.progress.step) == (SOURCE_STEPS, 0)
    assert resumed.progress.adam_steps == continued.progress.adam_steps == SOURCE_STEPS

    def tensors(pair: tuple[Trainer, Any]) -> dict[str, torch.Tensor]:
        parts = pair[0].parts
        state = model_state.training_state(parts.chunks, parts.optimizer, parts.head, MOMENTS)
        found = {**state, **state.pop("optimizer")}
        data = {name: getattr(tensor, "data", None) for name, tensor in found.items()}
        return {n: t.clone() for n, t in data.items() if isinstance(t, torch.Tensor)}

    def assert_equal() -> None:
        ours, theirs = map(tensors, trainers)
        assert ours.keys() == theirs.keys() and len(ours) > 10
        assert any("exp_avg_sq" in name and value.abs().sum() > 0 for name, value in ours.items())
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), name

    assert_equal()
    # The same step with the same data: the updates agree only if Adam counts the same.
    continued._batches.read()
    batch = continued._batches.take()
    resumed.progress.step = 0
    results = [trainer.train_step(batch) for trainer in (resumed, continued)]
    assert results[0] == results[1]
    assert_equal()


@pytest.fixture(scope="module")
def one_process(
    sources: dict[str, Path],
    other_store: Path,
    tiny: Callable[..., list[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[int, dict[str, float]]:
    """The second stage on other data, blocks and batches, in one process."""
    root = tmp_path_factory.mktemp("one")
    overrides = second_stage(tiny, root / "run", sources["calm"], other_store, **ALONE)
    before = contents(sources["calm"])
    done = start("calm", overrides)
    assert done.returncode == 0, done.stderr
    assert f"continuing from {sources['calm']}/checkpoints/step_00000004 (step 4)" in done.stdout
    assert "count of 4 updates; data, step counter and learning-rate" in done.stdout
    assert contents(sources["calm"]) == before
    state = RunState.read(checkpoints.find_checkpoint(root / "run"))
    assert (state.step, state.adam_steps, state.adam_steps_before) == (STEPS, 7, 4)
    assert state.continued_from is not None and state.continued_from.endswith("step_00000004")
    # Its own checkpoint wins, even where the source is gone.
    again = start(
        "calm", [*overrides, f"training.steps={STEPS + 1}", "run.continue_from=no/such/run"]
    )
    assert again.returncode == 0, again.stderr
    assert f"at step {STEPS}" in again.stdout and "continuing from" not in again.stdout
    state = RunState.read(checkpoints.find_checkpoint(root / "run"))
    assert (state.step, state.adam_steps, state.adam_steps_before) == (STEPS + 1, 8, 4)
    return training_records(root / "run")


def second_stage(
    tiny: Callable[..., list[str]], run_dir: Path, source: Path, data: Path, **more: object
) -> list[str]:
    changes = {
        "run__continue_from": source,
        "data__path": data,
        "data__block_size": 32,
        "training__steps": STEPS,
        "training__global_batch_size": 4,
        "training__micro_batch_size": 1,
    }
    return tiny(run_dir, "calm", **(CONSTANT | changes | more))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_continue_alike(
    layout: str,
    sources: dict[str, Path],
    other_store: Path,
    one_process: dict[int, dict[str, float]],
    tiny: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    """The worker checks that every optimizer counts all updates, the source's among them."""
    ranks, more = LAYOUTS[layout]
    overrides = second_stage(tiny, tmp_path / "run", sources["calm"], other_store, **more)
    run_jobs(ranks, [("calm", overrides)], tmp_path)
    records = training_records(tmp_path / "run")
    assert sorted(records) == list(range(1, STEPS + 1))
    for step, record in records.items():
        for name in ("loss", "grad_norm"):
            assert record[name] == pytest.approx(one_process[step][name], rel=TOLERANCE), step


def test_autoencoder_continues(
    sources: dict[str, Path], tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    """With another weight of the KL term, as for annealing."""
    from safetensors.torch import load_file

    more = alone("autoencoder") | {
        "run__continue_from": sources["autoencoder"] / "checkpoints",
        "training__learning_rate": 1e-30,
        "training__weight_decay": 0.0,
        "training__steps": 1,
        "model__kl_weight": 0.01,
    }
    done = start("autoencoder", tiny(tmp_path / "run", "autoencoder", **more))
    assert done.returncode == 0, done.stderr
    assert "continuing from" in done.stdout and "step_00000004 (step 4)" in done.stdout
    before, after = map(checkpoints.find_checkpoint, (sources["autoencoder"], tmp_path / "run"))
    assert json.loads((after / "config.json").read_text())["kl_weight"] == 0.01
    # So small a rate changes no weight.
    weights = [load_file(path / "model.safetensors") for path in (before, after)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    # The second moment decays from what it was.
    moments = [load_file(path / "optimizer.safetensors") for path in (before, after)]
    for name, value in moments[0].items():
        if name.startswith("exp_avg_sq"):
            assert bool((moments[1][name] >= 0.95 * value * (1 - 1e-6)).all()), name
    state = RunState.read(after)
    assert (state.step, state.adam_steps, state.adam_steps_before) == (1, 5, 4)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("calm", "model.hidden_size=64", "model.hidden_size: 32 -> 64"),
        ("calm", "model.num_hidden_layers=6", "model.num_hidden_layers: 4 -> 6"),
        ("calm", "model.head.num_mlp_layers=3", "model.head.num_mlp_layers: "),
        ("calm", "precision=bf16", "precision: fp32 -> bf16"),
        ("calm", "run.continue_from=no/such/run", "run.continue_from: no/such/run: no such dir"),
        ("calm", "run.continue_from={tmp}", "holds no checkpoint; give another"),
        ("calm", "run.continue_from={sources}/transformer", "model.kind: transformer -> calm"),
        ("autoencoder", "model.hidden_size=64", "model.hidden_size: 32 -> 64"),
        ("autoencoder", "run.continue_from={sources}/calm", "model.kind: calm -> autoencoder"),
    ],
)
def test_what_does_not_fit_is_refused(
    kind: str,
    change: str,
    words: str,
    sources: dict[str, Path],
    tiny: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    more = alone(kind) | {"run__continue_from": sources[kind], "training__steps": 1}
    change = change.format(sources=sources["calm"].parent, tmp=tmp_path)
    refused = start(kind, [*tiny(tmp_path / "run", kind, **more), change])
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert words in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "run" / "recipe.yaml").exists()
