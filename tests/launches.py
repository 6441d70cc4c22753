"""A small real store and real launches, shared by the tests of parallel training and of faults."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from warm import warm_python

from calm_dist.recipe import AutoencoderRecipe, LanguageModelRecipe, load_recipe

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).parent / "distributed" / "train_worker.py"
# Generous: a shared machine can be many times slower than an idle one.
TIMEOUT_SECONDS = 900

Jobs = Sequence[tuple[str, list[str]]]
Tiny = Callable[..., list[str]]
"""The fixture `tiny`."""

# A layout without model parallelism: all ranks are replicas.
ALONE: dict[str, object] = {
    "parallel__tensor_parallel_size": 1,
    "parallel__pipeline_parallel_size": 1,
    "parallel__sequence_parallel": False,
}
# For tests of what happens around the steps: a small model, which each of two replicas gets all of
# its samples at once.
SMALL: dict[str, object] = {"model__num_hidden_layers": 1, "training__micro_batch_size": 4}


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of some of the standard library by an untrained autoencoder, 48 blocks of 64."""
    import torch

    from calm_dist.data.latents import plan_store, write_store
    from calm_dist.interop.huggingface import save_autoencoder
    from calm_dist.models.autoencoder import Autoencoder, AutoencoderConfig
    from calm_dist.text.tokenizer import train_tokenizer

    directory = tmp_path_factory.mktemp("data")
    corpus = directory / "corpus.txt"
    corpus.write_text(Path(json.__file__).with_name("decoder.py").read_text(encoding="utf-8") * 2)
    tokenizer = train_tokenizer([corpus.read_text(encoding="utf-8")], 300, directory / "t.json")
    torch.manual_seed(0)
    config = AutoencoderConfig(
        vocab_size=tokenizer.vocab_size, latent_size=16, hidden_size=32, intermediate_size=64
    )
    autoencoder = Autoencoder(config).eval()
    (directory / "autoencoder").mkdir()
    save_autoencoder(autoencoder, directory / "autoencoder")
    plan = plan_store(
        [str(corpus)],
        tokenizer,
        variant="fp16",
        block_size=64,
        patch_size=None,
        autoencoder=directory / "autoencoder",
        seed=0,
    )
    write_store(directory / "store", [str(corpus)], tokenizer, plan, autoencoder=autoencoder)
    return directory / "store"


@pytest.fixture(scope="session")
def tiny(store: Path) -> Callable[..., list[str]]:
    """Overrides that make a tiny recipe tiny enough for 20 steps in seconds."""

    def overrides(run_dir: Path, kind: str, **more: object) -> list[str]:
        values: dict[str, object] = {
            "run.dir": run_dir,
            "data.path": store,
            "data.block_size": 64,
            "model.vocab_size": 300,
            "model.hidden_size": 32,
            "model.intermediate_size": 64,
            "model.num_hidden_layers": 4,
            "training.steps": 20,
            "training.global_batch_size": 8,
            "training.micro_batch_size": 2,
            "checkpoint.every": 1000,
            "logging.wandb": "off",
        }
        if kind == "autoencoder":
            del values["model.num_hidden_layers"]
        if kind == "calm":
            values |= {"model.latent_size": 16, "model.autoencoder": store.parent / "autoencoder"}
        values |= {key.replace("__", "."): value for key, value in more.items()}
        return [f"{key}={value}" for key, value in values.items()]

    return overrides


def recipe(kind: str) -> str:
    """Path of the tiny recipe of a kind."""
    return str(ROOT / "recipes" / f"{kind}_tiny.yaml")


def language_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LanguageModelRecipe:
    """`load_recipe` of a CALM or a Transformer."""
    loaded = load_recipe(path, overrides)
    assert isinstance(loaded, LanguageModelRecipe)
    return loaded


def autoencoder_recipe(path: str | Path, overrides: Sequence[str] = ()) -> AutoencoderRecipe:
    """`load_recipe` of an autoencoder."""
    loaded = load_recipe(path, overrides)
    assert isinstance(loaded, AutoencoderRecipe)
    return loaded


def untrained_run(tiny: Tiny, run: Path, kind: str) -> Path:
    """A run directory that holds a model with its initial weights."""
    import torch

    from calm_dist.inference.loading import single_process_topology
    from calm_dist.models.backbone import transformer_config
    from calm_dist.recipe import CalmModel
    from calm_dist.runs import checkpoints
    from calm_dist.runs.checkpoints.run_state import RunState
    from calm_dist.training.build import build_backbone, build_head
    from calm_dist.training.checkpoint import model_state
    from calm_dist.training.resolve import resolve

    given = tiny(run, kind, **ALONE)
    own = resolve(language_recipe(recipe(kind), given))
    topology = single_process_topology(own, torch.device("cpu"))
    backbone = build_backbone(own, transformer_config(own, torch.float32), topology, None)
    head = build_head(own.model, 1) if isinstance(own.model, CalmModel) else None
    generator = torch.Generator().manual_seed(0)
    for parameter in [] if head is None else head.parameters():
        if not parameter.any():
            parameter.data.normal_(generator=generator)
    temporary = checkpoints.begin(run, 3)
    model_state.save_weights(temporary, backbone, head)
    RunState(step=3, data={"steps_done": 3}).write(temporary)
    for directory in (run, temporary):
        (directory / checkpoints.RECIPE_FILE).write_text(own.to_yaml())
    checkpoints.commit(temporary, keep=1)
    return run


def torchrun(ranks: int, script: Path, *arguments: str, fresh: bool = False) -> list[str]:
    """A command that launches real gloo ranks on a free port.

    ``fresh`` ranks have imported nothing yet and receive signals.
    """
    python = sys.executable if fresh else warm_python()
    launcher = [python, "-m", "torch.distributed.run", "--standalone"]
    rank = ["--no_python", python, "-u", str(script)]
    return [*launcher, f"--nproc_per_node={ranks}", *rank, *arguments]


def environment(**more: str) -> dict[str, str]:
    """One thread a process: ranks outnumber the cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def run_jobs(ranks: int, jobs: Jobs, directory: Path) -> None:
    """Train (recipe, overrides) after each other in one launch of ``ranks`` processes."""
    listed = [{"recipe": recipe(kind), "overrides": overrides} for kind, overrides in jobs]
    run_worker(ranks, WORKER, listed, directory)


def call(
    command: list[str], *, cwd: Path | None = None, code: int = 0, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run a command that must end with ``code``; ``more`` is its environment's.

    For this interpreter, the warm one is started.
    """
    if command[0] == sys.executable:
        command = [warm_python(), *command[1:]]
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
    assert code == 0 or "Traceback" not in done.stderr
    return done


def run_worker(ranks: int, worker: Path, jobs: list[dict[str, Any]], directory: Path) -> None:
    """One launch of ``ranks`` processes of a worker script, which does all jobs."""
    file = directory / f"jobs_{ranks}.json"
    file.write_text(json.dumps(jobs), encoding="utf-8")
    call(torchrun(ranks, worker, str(file)))


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_rank(
    rank: int,
    world_size: int,
    port: int,
    overrides: list[str],
    script: Path = ROOT / "tools" / "train.py",
    python: str | None = None,
    **more: str,
) -> subprocess.Popen[str]:
    """One rank of a ``calm`` run, as a launcher would start it; ``more`` is its environment's."""
    return subprocess.Popen(
        [python or warm_python(), str(script), recipe("calm"), *overrides],
        env=environment(
            RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            **more,
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def data_parallel(tiny: Callable[..., list[str]], run_dir: Path, **more: object) -> list[str]:
    """Overrides of a ``calm`` run whose ranks are replicas."""
    return tiny(run_dir, "calm", **(ALONE | more))


def kill_tree(process: subprocess.Popen[str]) -> None:
    """SIGKILL a process that leads a session, and all that it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def training_records(run_dir: Path) -> dict[int, dict[str, float]]:
    """The training records of a run by step."""
    from calm_dist.runs.metrics_file import read_records

    found: list[dict[str, Any]] = [dict(record) for record in read_records(run_dir)]
    return {record["step"]: record for record in found if "loss" in record}
