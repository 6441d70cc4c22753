"""Imported checkpoints, trained by the real parts in real ranks, against the authors' numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launches import ROOT, run_worker, training_records
from safetensors.torch import load_file

from calm_dist.inference.load import load_model
from calm_dist.interop.convert import export_checkpoint, import_checkpoint
from calm_dist.interop.huggingface import load_calm
from calm_dist.recipe import CalmModel, load_recipe
from calm_dist.released.calm import released_calm

GOLDEN = ROOT / "tests" / "golden"
WORKER = Path(__file__).with_name("golden_worker.py")
ADAMW = json.loads((GOLDEN / "adamw_k4.json").read_text(encoding="utf-8"))
# max|a-b| / max|b|
GRADIENT = 2e-5

# By number of ranks.
LAYOUTS: dict[int, dict[str, dict[str, object]]] = {
    1: {"alone": {}, "two_micro_batches": {"training.micro_batch_size": 1}},
    2: {
        "tp2sp": {"parallel.tensor_parallel_size": 2, "parallel.sequence_parallel": True},
        "tp2": {"parallel.tensor_parallel_size": 2},
        "pp2": {"parallel.pipeline_parallel_size": 2},
        "dp2": {"training.micro_batch_size": 1},
    },
}


def overrides(patch_size: int, layout: dict[str, object]) -> list[str]:
    """The settings of the golden AdamW steps, whose batch is the whole input."""
    tokens = load_file(GOLDEN / f"calm_k{patch_size}" / "io.safetensors")["input_ids"]
    beta1, beta2 = ADAMW["betas"]
    values: dict[str, object] = {
        "precision": "fp32",
        "data.latents": "on_the_fly",
        "data.block_size": tokens.shape[1],
        "training.global_batch_size": len(tokens),
        "training.micro_batch_size": len(tokens),
        "training.warmup_steps": 0,
        "training.learning_rate": ADAMW["lr"],
        "training.weight_decay": ADAMW["weight_decay"],
        "training.clip_grad_norm": ADAMW["clip"],
        "training.adam_beta1": beta1,
        "training.adam_beta2": beta2,
        "training.adam_eps": f"{ADAMW['eps']:.1e}",
    }
    return [f"{key}={value}" for key, value in (values | layout).items()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """Results of both models on all layouts, one launch for each number of ranks."""
    directory = tmp_path_factory.mktemp("golden")
    for patch_size in (2, 4):
        import_checkpoint(GOLDEN / f"calm_k{patch_size}", directory / f"run_k{patch_size}")
    import_for_store(directory, store)
    for ranks, layouts in LAYOUTS.items():
        jobs = [
            {
                "kind": "golden",
                "run": str(directory / f"run_k{patch_size}"),
                "golden": str(GOLDEN / f"calm_k{patch_size}"),
                "overrides": overrides(patch_size, layout),
                "steps": len(ADAMW["grad_norms"]),
                "out": str(directory / f"{name}_k{patch_size}.json"),
            }
            for patch_size in (2, 4)
            for name, layout in layouts.items()
        ]
        jobs += [
            train_job(directory, name, layout, store)
            for name, layout in layouts.items()
            if name in ("alone", "tp2sp", "pp2")
        ]
        if ranks == 1:
            rounded = ["precision=bf16", *overrides(4, {})[1:]]
            run, out = str(directory / "run_k4"), str(directory / "start.safetensors")
            jobs.append({"kind": "start", "run": run, "overrides": rounded, "out": out})
        run_worker(ranks, WORKER, jobs, directory)
    return directory


def import_for_store(directory: Path, store: Path) -> None:
    """A released model that fits the tests' store, and its run: the golden one with two layers,
    half as many keys and values, another vocabulary, and the store's autoencoder."""
    source = directory / "source"
    shutil.copytree(GOLDEN / "calm_k4", source)
    weights = torch.load(source / "pytorch_model.bin", weights_only=True)
    generator = torch.Generator().manual_seed(0)
    weights["transformer.embed_tokens.weight"] = torch.randn(300, 32, generator=generator)
    for name in weights:
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            weights[name] = weights[name][:16].clone()
    kept = {n: t for n, t in weights.items() if "layers.2." not in n and "ae_model" not in n}
    torch.save(kept, source / "pytorch_model.bin")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config |= {"vocab_size": 300, "num_hidden_layers": 2, "num_key_value_heads": 2}
    config["ae_path"] = str(store.parent / "autoencoder")
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    import_checkpoint(source, directory / "imported")


def train_job(directory: Path, name: str, layout: dict[str, object], store: Path) -> dict[str, Any]:
    """Three steps of tools/train.py from a copy of the imported run."""
    run_dir = directory / f"trained_{name}"
    shutil.copytree(directory / "imported", run_dir)
    values = {
        "run.dir": run_dir,
        "precision": "fp32",
        "data.path": store,
        "data.block_size": 64,
        "training.steps": 3,
        "training.global_batch_size": 4,
        "training.micro_batch_size": 2,
        "training.warmup_steps": 0,
        "training.learning_rate": 1e-2,
        "logging.every": 1,
    }
    listed = [f"{key}={value}" for key, value in (values | layout).items()]
    return {"kind": "train", "run": str(run_dir), "overrides": listed}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def tolerance(layout: str) -> float:
    """Of hidden states and losses: sums over tensor-parallel ranks round differently."""
    return 5e-6 if layout.startswith("tp2") else 2e-6


CASES = [
    (patch_size, name) for layouts in LAYOUTS.values() for name in layouts for patch_size in (2, 4)
]


@pytest.mark.parametrize(("patch_size", "layout"), CASES)
def test_hidden_states_loss_and_gradients(runs: Path, patch_size: int, layout: str) -> None:
    found = load_file(runs / f"{layout}_k{patch_size}.json.tensors")
    numbers = json.loads((runs / f"{layout}_k{patch_size}.json").read_text(encoding="utf-8"))
    golden = GOLDEN / f"calm_k{patch_size}"
    io = load_file(golden / "io.safetensors")
    if layout != "dp2":
        assert error(found["hidden_states"], io["hidden_states"]) < tolerance(layout)
    loss = float(io["loss_fp32"])
    assert abs(numbers["losses"][0] - loss) < tolerance(layout) * abs(loss)

    model = load_recipe(runs / f"run_k{patch_size}" / "recipe.yaml").model
    assert isinstance(model, CalmModel)
    gradients = {name[5:]: tensor for name, tensor in found.items() if name.startswith("grad.")}
    of_head = {name[5:]: gradients.pop(name) for name in list(gradients) if name[:5] == "head."}
    released = released_calm(model, gradients, of_head)
    stored = {name[5:]: tensor for name, tensor in io.items() if name.startswith("grad.")}
    for name, expected in stored.items():
        assert error(released[name], expected) < GRADIENT, name
    norms = json.loads((golden / "io.json").read_text(encoding="utf-8"))["grad_norms"]["fp32"]
    for name, expected_norm in norms.items():
        assert abs(float(released[name].norm()) - expected_norm) < GRADIENT * expected_norm, name
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    assert abs(numbers["grad_norms"][0] - total) < GRADIENT * total


@pytest.mark.parametrize("layout", [name for patch_size, name in CASES if patch_size == 4])
def test_three_adamw_steps(runs: Path, layout: str) -> None:
    numbers = json.loads((runs / f"{layout}_k4.json").read_text(encoding="utf-8"))
    for found, expected in zip(numbers["losses"], ADAMW["losses"], strict=True):
        assert abs(found - expected) < tolerance(layout) * expected
    # The last norm is of the step after the golden ones.
    for found, expected in zip(numbers["grad_norms"][:-1], ADAMW["grad_norms"], strict=True):
        assert abs(found - expected) < GRADIENT * expected


def test_training_starts_from_the_weights_unrounded(runs: Path) -> None:
    """bf16 run of fp32 weights: the masters are exact, the backbone is rounded, Adam is fresh."""
    found = load_file(runs / "start.safetensors")
    weights = torch.load(GOLDEN / "calm_k4" / "pytorch_model.bin", weights_only=True)
    model = load_recipe(runs / "run_k4" / "recipe.yaml").model
    assert isinstance(model, CalmModel)
    of_backbone, of_master, of_head = (
        {name.removeprefix(prefix): t for name, t in found.items() if name.startswith(prefix)}
        for prefix in ("backbone.", "master.", "fp32.")
    )
    masters = released_calm(model, of_master, of_head)
    rounded = released_calm(model, of_backbone, of_head)
    assert {tensor.dtype for tensor in of_backbone.values()} == {torch.bfloat16}
    assert masters.keys() == {name for name in weights if not name.startswith("ae_model.")}
    for name, tensor in masters.items():
        assert torch.equal(tensor, weights[name]), name
        if name.startswith(("transformer.", "embed_proj.")):
            assert torch.equal(rounded[name], weights[name].bfloat16()), name
    moments = [tensor for name, tensor in found.items() if name.startswith("exp_avg")]
    assert moments and not any(bool(tensor.any()) for tensor in moments)


@pytest.mark.parametrize("layout", ["tp2sp", "pp2"])
def test_imported_run_trains_on_any_layout(runs: Path, tmp_path: Path, layout: str) -> None:
    alone, cut = (training_records(runs / f"trained_{name}") for name in ("alone", layout))
    assert sorted(cut) == sorted(alone) == [1, 2, 3]
    for step, expected in alone.items():
        for name in ("loss", "grad_norm"):
            assert abs(cut[step][name] - expected[name]) <= 1e-5 * expected[name], (step, name)
    assert alone[3]["loss"] < alone[1]["loss"]

    # What was trained in several parts goes out whole.
    export_checkpoint(runs / f"trained_{layout}", tmp_path / "released")
    tokens = torch.arange(64)[None] * 4
    trained = load_model(runs / f"trained_{layout}")
    assert trained.step == 3
    released = load_calm(tmp_path / "released")
    assert torch.equal(released.hidden(tokens), trained.hidden(tokens))
    before = load_model(runs / "imported").hidden(tokens)
    assert not torch.allclose(trained.hidden(tokens), before, atol=1e-2)
