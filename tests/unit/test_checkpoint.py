"""Checkpoint directories: whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from calm_dist.errors import CheckpointError
from calm_dist.training import checkpoint


def write(run_dir: Path, step: int, keep: int = 10) -> Path:
    temporary = checkpoint.begin(run_dir, step)
    (temporary / "tensors").mkdir()
    (temporary / "tensors" / "a.bin").write_bytes(bytes(range(256)) * step)
    (temporary / "state.json").write_text("{}")
    (temporary / "recipe.yaml").write_text("{}")
    return checkpoint.commit(temporary, keep)


def test_newest_is_found_from_run_directory_checkpoints_or_itself(tmp_path: Path) -> None:
    write(tmp_path, 5)
    newest = write(tmp_path, 10)
    for path in (tmp_path, tmp_path / "checkpoints", newest):
        assert checkpoint.find_checkpoint(path) == newest
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == newest.name


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step, keep=2)
    names = [path.name for path in checkpoint.all_checkpoints(tmp_path)]
    assert names == ["step_00000002", "step_00000003"]


@pytest.mark.parametrize(
    "damage",
    ["flip", "cut", "remove", "manifest", "list manifest", "short manifest", "no manifest"],
)
def test_damaged_checkpoint_is_passed_over_and_named(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write(tmp_path, 5)
    bad = write(tmp_path, 10)
    tensors, manifest = bad / "tensors" / "a.bin", bad / checkpoint.MANIFEST
    data = bytearray(tensors.read_bytes())
    data[100] ^= 1
    {
        "flip": lambda: tensors.write_bytes(data),
        "cut": lambda: tensors.write_bytes(data[:-1]),
        "remove": tensors.unlink,
        "manifest": lambda: manifest.write_text("{"),
        "list manifest": lambda: manifest.write_text("[]"),
        "short manifest": lambda: manifest.write_text("{}"),
        "no manifest": manifest.unlink,
    }[damage]()
    assert checkpoint.find_checkpoint(tmp_path) == good
    named = manifest if "manifest" in damage else tensors
    assert str(named) in capsys.readouterr().err
    if damage != "no manifest":
        with pytest.raises(CheckpointError, match=named.name):
            checkpoint.find_checkpoint(bad)


def test_damaged_later_checkpoints_do_not_cost_a_new_one(tmp_path: Path) -> None:
    """A run that went on from an earlier step reaches them again only later."""
    write(tmp_path, 5)
    for step in (20, 30):
        (write(tmp_path, step) / "state.json").write_text("damaged")
    new = write(tmp_path, 10, keep=1)
    assert checkpoint.find_checkpoint(tmp_path) == new
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert names == ["step_00000010", "step_00000020.damaged", "step_00000030.damaged"]
    assert checkpoint.newest_recipe(tmp_path) == new / "recipe.yaml"


def test_half_written_directory_is_no_checkpoint(tmp_path: Path) -> None:
    temporary = checkpoint.begin(tmp_path, 5)
    (temporary / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        checkpoint.find_checkpoint(tmp_path)
    assert checkpoint.newest_valid(tmp_path) is None
    # The next attempt at the same step starts empty.
    assert list(checkpoint.begin(tmp_path, 5).iterdir()) == []


def test_same_step_again_replaces_it(tmp_path: Path) -> None:
    write(tmp_path, 5)
    again = write(tmp_path, 5)
    assert checkpoint.find_checkpoint(tmp_path) == again


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing"):
        checkpoint.find_checkpoint(tmp_path / "nothing")
