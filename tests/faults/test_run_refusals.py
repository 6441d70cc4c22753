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
from launches import ALONE, ROOT, SMALL, TIMEOUT_SECONDS, call, recipe
from safetensors.torch import load_file, save_file

from calm_dist.data.latents import plan_store, write_store
from calm_dist.data.store import read_meta
from calm_dist.errors import CheckpointError, LaunchError
from calm_dist.files import file_sha256
from calm_dist.recipe import Recipe, load_recipe
from calm_dist.runs import checkpoints
from calm_dist.runs.checkpoints.run_state import RunState
from calm_dist.text.tokenizer import load_tokenizer
from calm_dist.training.resolve import resolve
from calm_dist.training.session import prepare_run_directory


def refused(overrides: list[str], *arguments: str) -> str:
    """The message of a training that must end with exit code 2."""
    command = [sys.executable, str(ROOT / "tools" / "train.py"), recipe("calm"), *overrides]
    return call([*command, *arguments], code=2).stderr


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
    assert f"another run is using {run_dir} (process 7 on there)" in message
    assert not (run_dir / "recipe.yaml").exists()


def test_json_without_dry_run(tmp_path: Path, tiny: Callable[..., list[str]]) -> None:
    message = refused(tiny(tmp_path / "run", "calm", **ALONE), "--json", "-")
    assert "--json: needs --dry-run" in message


def write_checkpoint(run_dir: Path, step: int, text: str, tokenizer_sha256: str) -> Path:
    """What of a checkpoint is read before any tensor."""
    temporary = checkpoints.begin(run_dir, step)
    (temporary / "recipe.yaml").write_text(text)
    RunState(step=step, tokenizer_sha256=tokenizer_sha256, data={"steps_done": step}).write(
        temporary
    )
    return checkpoints.commit(temporary, keep=9)


def test_newest_readable_checkpoint_says_what_may_not_change(
    tmp_path: Path, store: Path, tiny: Callable[..., list[str]]
) -> None:
    """Damage does not end a restart, and is not taken at its word; data of another tokenizer ends
    it."""
    given = resolve(load_recipe(recipe("calm"), tiny(tmp_path, "calm", **ALONE)))
    text = given.to_yaml()
    assert "seed: 0" in text
    own = read_meta(store).tokenizer.sha256
    newest = write_checkpoint(tmp_path, 3, text, own)
    (newest / "recipe.yaml").write_text(text.replace("seed: 0", "seed: 1"))
    newer = write_checkpoint(tmp_path, 2, text, own)
    (newer / "recipe.yaml").write_text("model: {kind: ca")
    write_checkpoint(tmp_path, 1, text, own)
    os.close(prepare_run_directory(given))

    write_checkpoint(tmp_path, 4, text, "f" * 64)
    with pytest.raises(CheckpointError, match=r"step_00000004/state.json: .* sha256 ffffffffffff"):
        prepare_run_directory(given)


@pytest.mark.parametrize(
    ("schedule", "step", "said"),
    [
        # 6e-4 falls to zero in 6 or 12 steps; a step's rate is that of its beginning.
        ("linear", 6, "learning rate: 0.0001 in step 6, 0.0003 in step 7; training.schedule=wsd"),
        ("constant", 6, None),
        # Its decay is the last two steps.
        ("wsd", 4, None),
        ("wsd", 6, "learning rate: 0.0003 in step 6, 0.0006 in step 7"),
    ],
)
def test_a_jump_of_the_learning_rate_is_announced(
    schedule: str,
    step: int,
    said: str | None,
    tmp_path: Path,
    store: Path,
    tiny: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def of_length(steps: int) -> Recipe:
        more: dict[str, object] = {
            "training__steps": steps,
            "training__schedule": schedule,
            "training__warmup_steps": 0,
            "training__learning_rate": 6e-4,
            "training__decay_steps": 2 if schedule == "wsd" else "null",
        }
        return resolve(load_recipe(recipe("calm"), tiny(tmp_path, "calm", **(ALONE | more))))

    write_checkpoint(tmp_path, step, of_length(6).to_yaml(), read_meta(store).tokenizer.sha256)
    os.close(prepare_run_directory(of_length(12)))
    output = capsys.readouterr().out
    assert "training.steps: 6 -> 12" in output
    assert ("learning rate" in output) == (said is not None)
    assert said is None or said in output


def test_another_encoder_is_refused(
    tmp_path: Path, store: Path, tiny: Callable[..., list[str]]
) -> None:
    """Latents that are encoded on the fly are known by the weights of their encoder."""
    corpus, tokens = store.parent / "corpus.txt", tmp_path / "tokens"
    tokenizer = load_tokenizer(store.parent / "t.json")
    plan = plan_store([corpus], tokenizer, variant="tokens", block_size=64, patch_size=4)
    write_store(tokens, [corpus], tokenizer, plan)
    overrides = [
        *tiny(tmp_path / "run", "calm", training__schedule="constant", **ALONE, **SMALL),
        f"data.path={tokens}",
        "data.latents=on_the_fly",
    ]
    command = [sys.executable, str(ROOT / "tools" / "train.py"), recipe("calm"), *overrides]
    call([*command, "training.steps=2"])
    other = tmp_path / "other"
    shutil.copytree(store.parent / "autoencoder", other)
    weights = load_file(other / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, other / "model.safetensors")
    message = refused([*overrides, "training.steps=3", f"model.autoencoder={other}"])
    assert "step_00000002/state.json: trained on latents of the autoencoder" in message
    assert file_sha256(other / "model.safetensors") in message


def test_child_does_not_hold_the_run_directory(
    tmp_path: Path, tiny: Callable[..., list[str]]
) -> None:
    given = resolve(load_recipe(recipe("calm"), tiny(tmp_path, "calm", **ALONE)))
    lock = prepare_run_directory(given)
    with pytest.raises(LaunchError, match=f"process {os.getpid()} on"):
        prepare_run_directory(given)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    os.close(lock)
    deadline = time.monotonic() + 20.0
    try:
        while True:
            # The child lets go as the first thing that it does.
            try:
                os.close(prepare_run_directory(given))
                break
            except LaunchError:
                assert child.is_alive() and time.monotonic() < deadline
                time.sleep(0.02)
        assert child.is_alive()
    finally:
        child.kill()
        child.join()


def test_training_without_flock(
    tmp_path: Path, tiny: Callable[..., list[str]], without_flock: dict[str, str]
) -> None:
    """Wherever files lie, of ours and of the libraries: a run trains, and is the only one."""
    run_dir = tmp_path / "run"
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    overrides = tiny(run_dir, "calm", training__steps=2, **ALONE, **SMALL)
    command = [sys.executable, str(ROOT / "tools" / "train.py"), recipe("calm"), *overrides]
    done = subprocess.run(
        command,
        env={**without_flock, "OMP_NUM_THREADS": "1", "TMPDIR": str(scratch)},
        capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert checkpoints.step_directories(run_dir)
    assert not (run_dir / ".lock.held").exists()
