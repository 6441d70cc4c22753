"""A run directory keeps its wandb run when it is moved; a copy gets one of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from calm_dist.runs.wandb_id import wandb_id

# Trains nothing: opens the tracker of a run, as each start does, and logs one step.
START = """
import sys
from pathlib import Path
from calm_dist.log import show_on_console
from calm_dist.recipe import Recipe
from calm_dist.runs.metrics import MetricsLog

show_on_console()

run_dir, step = Path(sys.argv[1]), int(sys.argv[2])
recipe = Recipe.from_dict({
    "model": {"kind": "transformer", "vocab_size": 64, "hidden_size": 8,
              "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
    "data": {"path": "sftp://me:s3cr3t@host/store", "block_size": 8},
    "logging": {"every": 1, "wandb": "offline"},
    "run": {"dir": str(run_dir)},
    "training": {"steps": 10, "micro_batch_size": 1, "global_batch_size": 1},
})
log = MetricsLog(recipe, run_dir, step)
values = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1}
log.training_step(step + 1, values, False, 1.0)
log.close()
"""


@pytest.fixture
def original(tmp_path: Path) -> Path:
    run_dir = tmp_path / "runs" / "a"
    run_dir.mkdir(parents=True)
    return run_dir


def is_new(run_dir: Path, said: str) -> bool:
    """Whether it was said that a copy logs into a run of its own."""
    if not said:
        return False
    assert "was copied from" in said and f"{run_dir}" in said and wandb_id(run_dir) in said
    return True


def test_the_same_directory(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = wandb_id(original)
    assert len(name) == 8 and wandb_id(original) == name
    # Restored from a backup to where it was.
    kept = original.with_name("kept")
    shutil.copytree(original, kept)
    shutil.rmtree(original)
    shutil.copytree(kept, original)
    assert wandb_id(original) == name
    assert not capsys.readouterr().out


def test_a_renamed_directory_and_another_way_to_it(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = wandb_id(original)
    (tmp_path / "link").symlink_to(original)
    assert wandb_id(tmp_path / "link") == name
    moved = original.rename(original.with_name("moved"))
    assert wandb_id(moved) == name
    # The link is dead; its place was remembered by the directory itself.
    assert wandb_id(moved) == name
    assert not capsys.readouterr().out


def test_a_directory_moved_to_another_file_system(
    original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = Path("/dev/shm") / f"calm_dist_test_{os.getpid()}"
    if not memory.parent.is_dir() or memory.parent.stat().st_dev == original.stat().st_dev:
        pytest.skip("/dev/shm is no file system of its own here")
    name = wandb_id(original)
    try:
        shutil.move(original, memory)
        assert not original.exists()
        assert wandb_id(memory) == name
        assert not capsys.readouterr().out
        # And a copy to another one, of a directory that stays.
        shutil.copytree(memory, original)
        assert wandb_id(original) != name
        assert is_new(original, capsys.readouterr().out)
    finally:
        shutil.rmtree(memory, ignore_errors=True)


def test_a_copy(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = wandb_id(original)
    copy = original.with_name("b")
    shutil.copytree(original, copy)
    new = wandb_id(copy)
    assert new != name
    assert is_new(copy, capsys.readouterr().out)
    # Both continue as what they are.
    assert (wandb_id(original), wandb_id(copy)) == (name, new)
    assert not capsys.readouterr().out


def test_a_copy_whose_original_was_renamed(
    original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = wandb_id(original)
    copy, moved = original.with_name("b"), original.with_name("c")
    shutil.copytree(original, copy)
    original.rename(moved)
    assert wandb_id(copy) != name
    assert is_new(copy, capsys.readouterr().out)
    assert wandb_id(moved) == name


def test_a_copy_of_a_copy_and_one_in_the_place_of_the_original(
    original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = wandb_id(original)
    copy = original.with_name("b")
    shutil.copytree(original, copy)
    original.rename(original.with_name("old"))
    other = original
    other.mkdir()
    (other / "wandb_id").write_text("ffffffff\n")
    assert wandb_id(copy) != name
    assert is_new(copy, capsys.readouterr().out)


@pytest.mark.parametrize("text", ["0123abcd\n", "0123abcd", "0123abcd\nnot json\n"])
def test_files_of_earlier_versions_keep_their_id(original: Path, text: str) -> None:
    (original / "wandb_id").write_text(text)
    assert wandb_id(original) == wandb_id(original) == "0123abcd"


@pytest.mark.parametrize("text", ["", "\n", "\xff"])
def test_a_damaged_file_is_replaced(original: Path, text: str) -> None:
    (original / "wandb_id").write_bytes(text.encode("latin-1"))
    name = wandb_id(original)
    assert len(name) == 8 and wandb_id(original) == name


def start(run_dir: Path, step: int) -> str:
    done = subprocess.run(
        [sys.executable, "-c", START, str(run_dir), str(step), "--token", "s3cr3t"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_wandb_offline_of_a_copied_run_and_its_secrets(original: Path) -> None:
    start(original, 0)
    copy = original.with_name("b")
    shutil.copytree(original, copy)
    assert "logging to a new one" in start(copy, 1)
    ids = {run_dir: (run_dir / "wandb_id").read_text().split()[0] for run_dir in (original, copy)}
    offline = {run_dir: sorted((run_dir / "wandb").glob("offline-run-*")) for run_dir in ids}
    assert [path.name[-8:] for path in offline[original]] == [ids[original]]
    assert sorted(path.name[-8:] for path in offline[copy]) == sorted(ids.values())
    written = [file for file in copy.rglob("*") if file.is_file() and not file.is_symlink()]
    assert any(file.suffix == ".wandb" for file in written)
    assert any(b"me:***@host" in file.read_bytes() for file in written)
    assert not [file for file in written if b"s3cr3t" in file.read_bytes()]
