"""A start that is refused changes nothing in the run directory, whenever it is refused."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from launches import ALONE, ROOT, SMALL, TIMEOUT_SECONDS, environment, recipe
from warm import warm_python

from calm_dist.files import file_sha256
from calm_dist.runs.listing import describe

KINDS = {"calm": "train.py", "autoencoder": "train_autoencoder.py"}


def start(kind: str, overrides: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [warm_python(), str(ROOT / "tools" / KINDS[kind]), recipe(kind), *overrides],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )


def contents(run_dir: Path) -> dict[str, str]:
    """Every file and its hash, but for the lock, which names who was there last."""
    return {
        str(path.relative_to(run_dir)): file_sha256(path)
        for path in sorted(run_dir.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(scope="module", params=KINDS)
def stopped(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny: Callable[..., list[str]],
) -> tuple[str, Path, list[str]]:
    """Kind, run directory and overrides of a run of six steps, whose newest checkpoint is damaged
    and which has left records behind its last one and a half-written directory."""
    kind = request.param
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    layout = ALONE | SMALL if kind == "calm" else {}
    more = {"checkpoint__every": 2, "training__steps": 6, "logging__every": 1}
    overrides = tiny(run_dir, kind, **(layout | more))
    done = start(kind, overrides)
    assert done.returncode == 0, done.stderr
    (run_dir / "checkpoints" / "step_00000006" / "state.json").write_text("damaged")
    (run_dir / "checkpoints" / "step_00000007.tmp").mkdir()
    (run_dir / "checkpoints" / "step_00000007.tmp" / "half").write_text("written")
    return kind, run_dir, overrides


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["training.steps=9", "training.global_batch_size=4"], "data position is for global_batch"),
        (["training.steps=9", "data.seed=7"], "its data position is for"),
        (["training.steps=9", "run.seed=7"], "written for another model, noise or tokens"),
        (["training.steps=9", "data.path={tmp}/elsewhere"], "its data position is for"),
        (["training.steps=9", "data.path={tmp}/damaged"], "shard"),
    ],
)
def test_nothing_is_changed(
    changes: list[str],
    message: str,
    stopped: tuple[str, Path, list[str]],
    store: Path,
    tmp_path: Path,
) -> None:
    kind, run_dir, overrides = stopped
    shutil.copytree(store, tmp_path / "damaged")
    shard = next((tmp_path / "damaged").glob("shard*"))
    shard.write_bytes(shard.read_bytes()[:-9])
    if "{tmp}/elsewhere" in changes[1]:
        corpus_of_another(store, tmp_path / "elsewhere")
    before, row = contents(run_dir), describe(run_dir)
    refused = start(kind, [*overrides, *(text.format(tmp=tmp_path) for text in changes)])
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert message in refused.stderr and "Traceback" not in refused.stderr
    assert contents(run_dir) == before
    # It is still the run that ended as it did.
    after = describe(run_dir)
    for name in ("state", "reason", "step", "steps", "checkpoint"):
        assert after[name] == row[name], name


def corpus_of_another(store: Path, out: Path) -> None:
    """A store of the same tokenizer and autoencoder, of half of the text."""
    from calm_dist.data.latents import plan_store, write_store
    from calm_dist.interop.huggingface import load_autoencoder
    from calm_dist.text.tokenizer import load_tokenizer

    text = (store.parent / "corpus.txt").read_text()
    corpus = out.with_suffix(".txt")
    corpus.write_text(text[: len(text) // 2])
    tokenizer, autoencoder = load_tokenizer(store.parent / "t.json"), store.parent / "autoencoder"
    plan = plan_store(
        [str(corpus)], tokenizer, variant="fp16", block_size=64, patch_size=None,
        autoencoder=autoencoder, seed=0,
    )  # fmt: skip
    write_store(out, [str(corpus)], tokenizer, plan, autoencoder=load_autoencoder(autoencoder))


def test_a_start_with_nothing_to_do_changes_nothing(stopped: tuple[str, Path, list[str]]) -> None:
    """A run is not made shorter than it is."""
    kind, run_dir, overrides = stopped
    before = contents(run_dir)
    done = start(kind, [*overrides, "training.steps=3"])
    assert done.returncode == 0 and "nothing to do" in done.stdout
    assert contents(run_dir) == before


def test_a_start_that_is_not_refused_puts_things_in_order(
    stopped: tuple[str, Path, list[str]],
) -> None:
    kind, run_dir, overrides = stopped
    done = start(kind, [*overrides, "training.steps=9"])
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert "step_00000006.damaged" in names and not any("00007" in name for name in names)
    row = describe(run_dir)
    assert (row["state"], row["step"], row["steps"]) == ("finished", 9, 9)
