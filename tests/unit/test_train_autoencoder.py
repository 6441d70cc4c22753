"""Training of the autoencoder: the optimizer, data parallelism, resume after a kill, bad input."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from launches import autoencoder_recipe
from safetensors.torch import load_file
from warm import warm_python

from calm_dist.data.latents import plan_store, write_store
from calm_dist.data.store import read_meta
from calm_dist.data.stream import open_training_stream
from calm_dist.errors import CheckpointError, DataError, StoppedError
from calm_dist.inference.load import load_model
from calm_dist.interop.huggingface import load_autoencoder
from calm_dist.parallel.launch import World, join_world
from calm_dist.runs.checkpoints import find_checkpoint
from calm_dist.runs.listing import describe
from calm_dist.runs.metrics_file import read_records
from calm_dist.text.tokenizer import train_tokenizer
from calm_dist.training.autoencoder import AutoencoderTrainer, autoencoder_config, block_noise
from calm_dist.training.resolve import resolve

REPOSITORY = Path(__file__).parents[2]
TOOL = REPOSITORY / "tools" / "train_autoencoder.py"
ENCODE = REPOSITORY / "tools" / "encode_latents.py"
SECONDS = 240
STEPS = 12
WORDS = "the cat sat on a mat and saw that dog run"

# Runs the tool and dies while it writes the checkpoint of step 8, before that one is whole.
DIES_IN_SECOND_CHECKPOINT = """
import os, runpy, signal, sys
from calm_dist.runs import checkpoints

commit = checkpoints.Rotation.commit

def commit_once(self, temporary):
    if "00000008" in temporary.name:
        os.kill(os.getpid(), signal.SIGKILL)
    return commit(self, temporary)

checkpoints.Rotation.commit = commit_once
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def write_tokens_store(
    root: Path, split: str, num_documents: int, vocab_size: int = 270, patch_size: int = 4
) -> None:
    root.mkdir(exist_ok=True)
    corpus = root / f"{split}.jsonl"
    words = WORDS.split()
    texts = [" ".join(words[i * j % 11] for j in range(30)) for i in range(num_documents)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_tokenizer([WORDS], vocab_size, root / "tokenizer.json")
    plan = plan_store([corpus], tokenizer, variant="tokens", block_size=32, patch_size=patch_size)
    write_store(root / split, [corpus], tokenizer, plan)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens stores ``train`` and ``valid``."""
    root = tmp_path_factory.mktemp("tokens")
    write_tokens_store(root, "train", 20)
    write_tokens_store(root, "valid", 5)
    return root


@pytest.fixture(scope="module")
def recipe_file(stores: Path) -> Path:
    """All regularisers on; two micro-batches a step in one process; 3 epochs."""
    recipe = {
        "run": {"dir": "not/given", "seed": 3},
        "model": {
            "kind": "autoencoder",
            "latent_size": 6,
            "hidden_size": 16,
            "intermediate_size": 24,
        },
        "data": {"path": str(stores / "train"), "seed": 5},
        "parallel": {"device": "cpu"},
        "training": {
            "steps": STEPS,
            "micro_batch_size": 8,
            "global_batch_size": 16,
            "learning_rate": 4e-3,
            "warmup_steps": 2,
            "schedule": "cosine",
        },
        "checkpoint": {"every": 4},
        "logging": {"every": 1},
    }
    path = stores / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(autouse=True)
def own_process_state() -> Iterator[None]:
    """Runs in this process export the world and share its threads; give both back."""
    environment, threads = dict(os.environ), torch.get_num_threads()
    # The number of threads is part of what makes two runs equal to the bit.
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)


def run_tool(*arguments: str | Path, tool: Path = TOOL) -> int:
    """The tool in this process; its exit code."""
    before = sys.argv
    sys.argv = [str(tool), *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(str(tool), run_name="__main__")
    finally:
        sys.argv = before
        # A process that ends in an error leaves that to its end.
        if dist.is_initialized():
            dist.destroy_process_group()
    return exit_info.value.code  # type: ignore[return-value]


def run_process(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [warm_python(), *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@pytest.fixture(scope="module")
def unbroken(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of one process that trained without a stop."""
    run_dir = tmp_path_factory.mktemp("unbroken") / "exp #3 'a' \"b\" $HOME [x]"
    done = run_process(TOOL, recipe_file, f"run.dir={run_dir}")
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.fixture
def trainer(recipe_file: Path, tmp_path: Path) -> Iterator[AutoencoderTrainer]:
    """A trainer in a one-process world, before its first step."""
    device = torch.device("cpu")
    join_world(World(0, 1, 0, 1, "", 0, "test"), device, 10)
    recipe = autoencoder_recipe(recipe_file, [f"run.dir={tmp_path}", "health.max_skipped_steps=2"])
    yield AutoencoderTrainer(resolve(recipe), device)
    dist.destroy_process_group()


def records_of(run_dir: Path) -> list[dict[str, Any]]:
    return [dict(record) for record in read_records(run_dir)]


def losses(run_dir: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records_of(run_dir) if "loss" in record}


def final_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    directory = find_checkpoint(run_dir)
    assert directory.name == f"step_{STEPS:08d}"
    return {
        **load_file(directory / "model.safetensors"),
        **load_file(directory / "optimizer.safetensors"),
    }


def test_an_autoencoder_is_no_language_model(unbroken: Path) -> None:
    with pytest.raises(CheckpointError, match="is an autoencoder; give the checkpoint of"):
        load_model(unbroken)


def test_a_run_leaves_records_and_a_loadable_autoencoder(unbroken: Path, stores: Path) -> None:
    curve = losses(unbroken)
    assert list(curve) == list(range(1, STEPS + 1))
    # Uniform guesses cost K·ln V; the first logits are of size 1, the KL term is small.
    assert curve[1] == pytest.approx(4 * math.log(270), rel=0.15)
    assert curve[STEPS] < 0.92 * curve[1]
    training = next(record for record in records_of(unbroken) if "loss" in record)
    assert training["tokens"] == 16 * 32 and training["skipped"] == 0
    expected = 4 * training["cross_entropy"] + 1e-3 * training["kl"]
    assert training["loss"] == pytest.approx(expected)

    scores = [record for record in read_records(unbroken) if "eval" in record]
    assert [record["step"] for record in scores] == [4, 8, 12]
    values = scores[-1]["eval"]
    assert values["blocks"] == read_meta(stores / "valid").num_blocks
    assert len(values["kl_per_dim"]) == 6
    assert values["token_accuracy"] > scores[0]["eval"]["token_accuracy"]
    assert list(values["token_accuracy_under_noise"]) == ["0.1", "0.3", "0.5", "1.0"]

    model = load_autoencoder(find_checkpoint(unbroken))
    mean, log_std = model.encode(torch.zeros(2, 32, dtype=torch.int64))
    assert mean.shape == log_std.shape == (2, 8, 6)
    # Tokens that are dropped become the store's padding token.
    assert model.config.replaced_token_id == 2


def test_a_killed_run_goes_on_to_the_same_bits(
    unbroken: Path, recipe_file: Path, tmp_path: Path
) -> None:
    arguments = (TOOL, recipe_file, f"run.dir={tmp_path}")
    killed = run_process("-c", DIES_IN_SECOND_CHECKPOINT, *arguments)
    assert killed.returncode == -9, killed.stderr
    assert find_checkpoint(tmp_path).name == "step_00000004"
    resumed = run_process(*arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert "at step 4" in resumed.stdout

    assert losses(tmp_path) == losses(unbroken)
    expected = final_tensors(unbroken)
    found = final_tensors(tmp_path)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_two_ranks_train_as_one_process(unbroken: Path, recipe_file: Path, tmp_path: Path) -> None:
    """Same global batch and, since noise belongs to blocks, the same noise: equal to rounding."""
    done = run_process(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        TOOL, recipe_file, f"run.dir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = losses(unbroken)
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-5)
    norms = [
        [record["grad_norm"] for record in read_records(run_dir) if "loss" in record]
        for run_dir in (tmp_path, unbroken)
    ]
    assert norms[0][0] == pytest.approx(norms[1][0], rel=1e-5)
    # Rounding grows from step to step.
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    scores = [
        [record["eval"] for record in read_records(run_dir) if "eval" in record]
        for run_dir in (tmp_path, unbroken)
    ]
    assert scores[0][-1]["blocks"] == scores[1][-1]["blocks"]
    assert scores[0][-1]["mean_std"] == pytest.approx(scores[1][-1]["mean_std"], rel=1e-4)
    # Rounding may turn a guess or two.
    for name in ("token_accuracy", "token_accuracy_under_noise"):
        assert scores[0][-1][name] == pytest.approx(scores[1][-1][name], rel=0.05)


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_every_patch_size_trains_encodes_and_loads(
    patch_size: int, recipe_file: Path, tmp_path: Path
) -> None:
    for split in ("train", "valid"):
        write_tokens_store(tmp_path, split, 20, patch_size=patch_size)
    overrides = [f"run.dir={tmp_path / 'run'}", f"data.path={tmp_path / 'train'}"]
    overrides += [f"model.patch_size={patch_size}", "training.steps=2"]
    assert run_tool(recipe_file, *overrides) == 0
    records = records_of(tmp_path / "run")
    assert [record["step"] for record in records] == [1, 2, 2]
    assert all(math.isfinite(record["loss"]) for record in records[:2])
    assert records[2]["eval"]["latent_size"] == 6

    encode: list[str | Path] = [
        "--autoencoder",
        tmp_path / "run",
        "--tokenizer",
        tmp_path / "tokenizer.json",
    ]
    encode += ["--corpus", tmp_path / "train.jsonl", "--out", tmp_path / "latents"]
    assert run_tool(*encode, "--block-size", "32", tool=ENCODE) == 0
    model = load_autoencoder(find_checkpoint(tmp_path / "run"))
    batch = next(iter(open_training_stream([tmp_path / "latents"], batch_size=3)))
    for name, value in zip(("mean", "log_std"), model.encode(batch["tokens"]), strict=True):
        assert value.shape == (3, 32 // patch_size, 6)
        # Stored as fp16, which keeps 11 bits.
        torch.testing.assert_close(batch[name], value, rtol=2**-11, atol=1e-6)


@pytest.mark.parametrize(
    ("override", "changes"),
    [
        ("model.kl_weight=0", {"kl_weight": 0.0}),
        ("model.kl_clamp=0", {"kl_clamp": 0.0}),
        ("model.latent_dropout=0", {"ae_dropout": 0.0}),
        ("model.token_dropout=0", {"token_dropout": 0.0}),
        ("model.replaced_token_id=7", {"replaced_token_id": 7}),
    ],
)
def test_ablations_are_switches_of_the_recipe(
    override: str, changes: dict[str, Any], recipe_file: Path
) -> None:
    """What each does to the loss is tested with the loss."""
    default, changed = (
        autoencoder_config(resolve(autoencoder_recipe(recipe_file, given)))
        for given in ([], [override])
    )
    assert changed == dataclasses.replace(default, **changes) != default


def test_noise_belongs_to_the_block_and_the_step(trainer: AutoencoderTrainer) -> None:
    model, tokens = trainer.model, torch.zeros(3, 32, dtype=torch.int64)

    def eps(index: list[int], step: int, seed: int = 0) -> torch.Tensor:
        return block_noise(model, tokens[: len(index)], torch.tensor(index), seed, step).eps

    three = eps([7, 8, 9], step=1)
    assert torch.equal(eps([9], step=1)[0], three[2])
    for other in (eps([8], step=1), eps([7], step=2), eps([7], step=1, seed=1)):
        assert not torch.equal(other[0], three[0])


def batch_of(trainer: AutoencoderTrainer) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "tokens": torch.randint(270, (16, 32), generator=generator),
        "index": torch.arange(16),
    }


def test_weight_decay_spares_norms_and_biases(trainer: AutoencoderTrainer) -> None:
    """Adam's first step in closed form: p - rate * decay * p - rate * g / (|g| + eps)."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    result = trainer.train_step(batch_of(trainer))
    # Warm-up of 2 steps: the first has half of the rate.
    assert result.learning_rate == 2e-3
    decayed = []
    for name, parameter in trainer.model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None
        update = gradient / (gradient.abs() + 1e-8)
        decay = 0.0 if "norm" in name or name.endswith("bias") else 0.1
        decayed += [name] if decay else []
        expected = before[name] * (1 - 2e-3 * decay) - 2e-3 * update
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)
    # 4 layers of 3 matrices, 4 linear layers, and the embedding.
    assert len(decayed) == 17 and "encoder.embed_tokens.weight" in decayed
    # The gradient that was applied was clipped to 1.
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    total = sum(float(gradient.square().sum()) for gradient in gradients) ** 0.5
    assert total == pytest.approx(min(1.0, result.grad_norm), rel=1e-4)


def test_a_step_that_is_not_finite_changes_nothing(trainer: AutoencoderTrainer) -> None:
    with torch.no_grad():
        trainer.model.decoder.norm.weight[0] = float("nan")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    result = trainer.train_step(batch_of(trainer))
    assert result.skipped and trainer.progress.adam_steps == 0
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], equal_nan=True)
    with pytest.raises(RuntimeError, match="3 steps in a row"):
        trainer.run()


def test_a_run_that_is_asked_to_stop_only_writes_its_checkpoint(
    trainer: AutoencoderTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No evaluation, although there is a held-out store. SIGTERM reached its readers, too."""
    read, phases = trainer._batches.read, []

    def read_once() -> None:
        phases.append((trainer.phases.name, trainer.phases.step))
        if len(phases) > 1:
            trainer._batches._batches = iter(cut_short())
            trainer._stop.received = "SIGTERM"
        read()

    def cut_short() -> Iterator[Any]:
        raise DataError("a reader process was ended by SIGTERM")
        yield

    monkeypatch.setattr(trainer._batches, "read", read_once)
    with pytest.raises(StoppedError, match="stopped after step 1 "):
        trainer.run()
    # The first batch has the time limit of the start.
    assert phases == [("data", None), ("data", 0)]
    assert find_checkpoint(trainer.run_dir).name == "step_00000001"
    assert ["eval" in record for record in records_of(trainer.run_dir)] == [False]
    # Where the session writes it.
    (trainer.run_dir / "recipe.yaml").write_text(trainer.recipe.to_yaml())
    row = describe(trainer.run_dir)
    assert (row["checkpoint"], row["token_accuracy"]) == (1, None)


def test_a_finished_run_needs_no_room_and_a_refused_one_lets_go_of_its_directory(
    unbroken: Path,
    recipe_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = shutil.copytree(unbroken, tmp_path / "run")
    usage = shutil.disk_usage(run)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert run_tool(recipe_file, f"run.dir={run}", "model.kl_clamp=0.25") == 2
    assert run_tool(recipe_file, f"run.dir={run}", f"training.steps={STEPS + 1}") == 2
    assert "0.0 GB free" in capsys.readouterr().err
    assert run_tool(recipe_file, f"run.dir={run}") == 0
    assert f"nothing to do: training.steps={STEPS} are done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.path=does/not/exist", "does/not/exist: no such directory"),
        ("data.tokenizer={other}/tokenizer.json", "data.tokenizer: {other}"),
        ("model.vocab_size=300", "model.vocab_size: 300"),
        ("evaluation.data={other}/valid", "evaluation.data: {other}/valid was made with another"),
        ("evaluation.data=does/not/exist", "does/not/exist: no such directory"),
        ("training.global_batch_size=4096", "fewer than one global batch of 4096"),
    ],
)
def test_bad_input_ends_with_code_2_and_a_remedy(
    override: str,
    message: str,
    recipe_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "other"
    write_tokens_store(other, "valid", 5, vocab_size=265)
    override, message = override.format(other=other), message.format(other=other)
    assert run_tool(recipe_file, f"run.dir={tmp_path / 'run'}", override) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_refused(
    unbroken: Path, recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(recipe_file, f"run.dir={unbroken}", "model.kl_clamp=0.25") == 2
    assert "kl_clamp: 0.5 -> 0.25" in capsys.readouterr().err


def test_the_recipe_of_a_language_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool(REPOSITORY / "recipes" / "calm_tiny.yaml") == 2
    assert "use tools/train.py" in capsys.readouterr().err


def test_a_dry_run_needs_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = REPOSITORY / "recipes" / "autoencoder_tiny.yaml"
    assert run_tool(recipe, "--dry-run", f"run.dir={tmp_path / 'run'}", "data.path=nowhere") == 0
    assert "NOT FOUND" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
