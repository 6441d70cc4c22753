"""Runs that are refused before anything is built or written, in one process."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launches import ALONE, ROOT, TIMEOUT_SECONDS, environment, recipe

from calm_dist.errors import CheckpointError, LaunchError
from calm_dist.parallel.launch import World
from calm_dist.recipe import load_recipe
from calm_dist.training.checkpoint.run_state import RunState
from calm_dist.training.resolve import resolve
from calm_dist.training.session import prepare_run_directory


def refused(overrides: list[str], *arguments: str) -> str:
    """The message of a training that must end with exit code 2."""
    command = [sys.executable, str(ROOT / "tools" / "train.py"), recipe("calm"), *overrides]
    done = subprocess.run(
        [*command, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 2, done.stdout[-1000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stderr


def test_missing_store_and_autoencoder(tmp_path: Path, tiny: Callable[..., list[str]]) -> None:
    message = refused([*tiny(tmp_path / "run", "calm", **ALONE), "data.path=no/such/store"])
    assert "no/such/store" in message
    overrides = [*tiny(tmp_path / "run", "calm", **ALONE), "model.autoencoder=no/such/run"]
    assert "model.autoencoder: no/such/run: no such directory" in refused(overrides)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("latents", ["stored", "on_the_fly"])
def test_autoencoder_of_another_tokenizer(
    tmp_path: Path, store: Path, tiny: Callable[..., list[str]], latents: str
) -> None:
    other = tmp_path / "autoencoder"
    shutil.copytree(store.parent / "autoencoder", other)
    (other / "state.json").write_text(json.dumps({"tokenizer_sha256": "f" * 64}))
    overrides = tiny(tmp_path / "run", "calm", data__latents=latents, **ALONE)
    message = refused([*overrides, f"model.autoencoder={other}"])
    assert "trained with ffffffffffff" in message and "tokenizer" in message


def test_run_directory_that_is_a_file(tmp_path: Path, tiny: Callable[..., list[str]]) -> None:
    (tmp_path / "run").touch()
    assert f"error: {tmp_path / 'run'}" in refused(tiny(tmp_path / "run", "calm", **ALONE))


def test_second_run_in_a_directory(tmp_path: Path, tiny: Callable[..., list[str]]) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with (run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 7 on there\n")
        lock.flush()
        message = refused(tiny(run_dir, "calm", **ALONE))
    assert f"another run is at work in {run_dir} (process 7 on there)" in message
    assert not (run_dir / "recipe.yaml").exists()


def test_json_without_dry_run(tmp_path: Path, tiny: Callable[..., list[str]]) -> None:
    message = refused(tiny(tmp_path / "run", "calm", **ALONE), "--json", "-")
    assert "--json: goes with --dry-run" in message


def test_newest_readable_checkpoint_says_what_may_not_change(
    tmp_path: Path, tiny: Callable[..., list[str]]
) -> None:
    """A damaged recipe does not end a restart; data of another tokenizer does."""
    overrides = tiny(tmp_path, "calm", **ALONE)
    given = resolve(load_recipe(recipe("calm"), overrides))
    older, newer = (tmp_path / "checkpoints" / f"step_0000000{step}" for step in (1, 2))
    for directory in (older, newer):
        directory.mkdir(parents=True)
    (newer / "recipe.yaml").write_text("model: {kind: ca")
    (older / "recipe.yaml").write_text(given.to_yaml())
    world = World(0, 1, 0, 1, "", 0, "test")
    os.close(prepare_run_directory(given, world))

    RunState(step=1, tokenizer_sha256="f" * 64, data={}).write(older)
    with pytest.raises(CheckpointError, match=r"step_00000001/state.json: .* sha256 ffffffffffff"):
        prepare_run_directory(given, world)


def test_child_does_not_hold_the_run_directory(
    tmp_path: Path, tiny: Callable[..., list[str]]
) -> None:
    given = resolve(load_recipe(recipe("calm"), tiny(tmp_path, "calm", **ALONE)))
    world = World(0, 1, 0, 1, "", 0, "test")
    lock = prepare_run_directory(given, world)
    with pytest.raises(LaunchError, match=f"process {os.getpid()} on"):
        prepare_run_directory(given, world)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    os.close(lock)
    deadline = time.monotonic() + 20.0
    try:
        while True:
            # The child lets go as the first thing that it does.
            try:
                os.close(prepare_run_directory(given, world))
                break
            except LaunchError:
                assert child.is_alive() and time.monotonic() < deadline
                time.sleep(0.02)
        assert child.is_alive()
    finally:
        child.kill()
        child.join()
