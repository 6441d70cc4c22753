"""Checkpoint directories: whole or absent."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from calm_dist.errors import CheckpointError
from calm_dist.files import file_sha256
from calm_dist.interop.convert import import_checkpoint
from calm_dist.runs import checkpoints
from calm_dist.runs.checkpoints.run_state import RunState

GOLDEN = Path(__file__).parents[1] / "golden"
AUTOENCODER = (Path(__file__).parents[2] / "recipes" / "autoencoder_tiny.yaml").read_text()


def write(run_dir: Path, step: int, keep: int = 10, keep_every: int | None = None) -> Path:
    """A checkpoint with the files of an autoencoder's."""
    temporary = checkpoints.begin(run_dir, step)
    (temporary / "model.safetensors").write_bytes(bytes(range(256)) * (step + 1))
    (temporary / "optimizer.safetensors").touch()
    (temporary / "config.json").write_text("{}")
    (temporary / "recipe.yaml").write_text(AUTOENCODER)
    RunState(step=step, data={"steps_done": step}).write(temporary)
    return checkpoints.commit(temporary, keep, keep_every)


def test_newest_is_found_from_run_directory_checkpoints_or_itself(tmp_path: Path) -> None:
    write(tmp_path, 5)
    newest = write(tmp_path, 10)
    for path in (tmp_path, tmp_path / "checkpoints", newest):
        assert checkpoints.find_checkpoint(path) == newest
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == newest.name


@pytest.mark.parametrize(
    ("keep", "keep_every", "kept"),
    [(2, None, [6, 7]), (1, 3, [3, 6, 7]), (3, 5, [5, 6, 7]), (1, 1, [1, 2, 3, 4, 5, 6, 7])],
)
def test_the_newest_and_multiples_are_kept(
    tmp_path: Path, keep: int, keep_every: int | None, kept: list[int]
) -> None:
    for step in range(1, 8):
        write(tmp_path, step, keep, keep_every)
    names = [path.name for path in checkpoints.all_checkpoints(tmp_path)]
    assert names == [f"step_{step:08d}" for step in kept]


def test_files_that_were_described_are_not_read_again(tmp_path: Path) -> None:
    temporary = checkpoints.begin(tmp_path, 1)
    (temporary / "a").write_bytes(b"x")
    checkpoints.describe_files(temporary, [temporary / "a"], rank=3)
    (temporary / "a").write_bytes(b"y")
    (temporary / "b").write_bytes(b"z")
    final = checkpoints.commit(temporary, keep=1)
    manifest = json.loads((final / checkpoints.MANIFEST).read_text())
    assert sorted(manifest) == ["a", "b"]
    assert manifest["a"]["sha256"] != file_sha256(final / "a")
    assert manifest["b"]["sha256"] == file_sha256(final / "b")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def edit(file: Path, change: Callable[[dict], object]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def agree(directory: Path) -> None:
    """Make the manifest say what is there: what no hash shows must be found otherwise."""
    path = directory / checkpoints.MANIFEST
    names = json.loads(path.read_text())
    described = {
        name: {"bytes": (directory / name).stat().st_size, "sha256": file_sha256(directory / name)}
        for name in names
        if (directory / name).exists()
    }
    path.write_text(json.dumps(described))


def into_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


# What is done to a checkpoint, whether its manifest is made to agree, and the file that is named.
DAMAGES: dict[str, tuple[Callable[[Path], object], bool, str]] = {
    "a flipped bit": (lambda d: flip(d / "model.safetensors"), False, "model.safetensors"),
    "a file cut short": (lambda d: cut(d / "model.safetensors"), False, "model.safetensors"),
    "a missing file": (lambda d: (d / "model.safetensors").unlink(), False, "model.safetensors"),
    "a directory for a file": (lambda d: into_directory(d / "config.json"), False, "config.json"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), False, "manifest.json"),
    "half a manifest": (lambda d: os.truncate(d / "manifest.json", 50), False, "manifest.json"),
    "a list": (lambda d: (d / "manifest.json").write_text("[]"), False, "manifest.json"),
    "brackets": (lambda d: (d / "manifest.json").write_text("[" * 10**5), False, "manifest.json"),
    "an empty manifest": (lambda d: (d / "manifest.json").write_text("{}"), False, "manifest.json"),
    "a manifest without weights": (
        lambda d: edit(d / "manifest.json", lambda m: m.pop("model.safetensors")),
        False,
        "manifest.json",
    ),
    "a manifest of other places": (
        lambda d: edit(d / "manifest.json", lambda m: m.update({"../../x": {}})),
        False,
        "manifest.json",
    ),
    "a manifest of numbers": (
        lambda d: edit(d / "manifest.json", lambda m: m.update({"config.json": 7})),
        False,
        "manifest.json",
    ),
    "no state": (lambda d: (d / "state.json").write_text("{}"), True, "state.json"),
    "a state that is text": (lambda d: (d / "state.json").write_text("x"), True, "state.json"),
    "a state of another step": (
        lambda d: edit(d / "state.json", lambda s: s.update(step=9)),
        True,
        "state.json",
    ),
    "a negative count": (
        lambda d: edit(d / "state.json", lambda s: s.update(adam_steps=-1)),
        True,
        "state.json",
    ),
    "a count that is text": (
        lambda d: edit(d / "state.json", lambda s: s.update(tokens="many")),
        True,
        "state.json",
    ),
    "more updates than steps": (
        lambda d: edit(d / "state.json", lambda s: s.update(adam_steps=11)),
        True,
        "state.json",
    ),
    "another position in the data": (
        lambda d: edit(d / "state.json", lambda s: s["data"].update(steps_done=4)),
        True,
        "state.json",
    ),
    "no position in the data": (
        lambda d: edit(d / "state.json", lambda s: s.update(data={})),
        True,
        "state.json",
    ),
    "weights only": (
        lambda d: edit(d / "state.json", lambda s: s.update(weights_only=True)),
        True,
        "state.json",
    ),
    "another format": (
        lambda d: edit(d / "state.json", lambda s: s.update(format=2)),
        True,
        "state.json",
    ),
    "no recipe": (lambda d: (d / "recipe.yaml").write_text("{}"), True, "recipe.yaml"),
    "a recipe that is no text": (
        lambda d: (d / "recipe.yaml").write_bytes(b"\xff\xfe"),
        True,
        "recipe.yaml",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoint_is_passed_over_and_named(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, consistent, named = DAMAGES[name]
    good, bad = write(tmp_path, 5), write(tmp_path, 10)
    damage(bad)
    if consistent:
        agree(bad)
    assert checkpoints.find_checkpoint(tmp_path) == good
    assert f"checkpoint passed over: {bad / named}" in capsys.readouterr().err
    if name != "no manifest":
        with pytest.raises(CheckpointError, match=named):
            checkpoints.find_checkpoint(bad)


def test_several_processes_share_the_reading(tmp_path: Path) -> None:
    directory = write(tmp_path, 5)
    for part in range(3):
        checkpoints.verify(directory, part, 3)
    names = sorted(json.loads((directory / checkpoints.MANIFEST).read_text()))
    flip(directory / "model.safetensors")
    for part in range(3):
        if names.index("model.safetensors") % 3 != part:
            checkpoints.verify(directory, part, 3)
            continue
        with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
            checkpoints.verify(directory, part, 3)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with tensors in Megatron's format."""
    run = tmp_path_factory.mktemp("language_model") / "run"
    import_checkpoint(GOLDEN / "calm_k4", run)
    return checkpoints.find_checkpoint(run)


def rewrite_description(directory: Path, change: Callable[[dict], object]) -> None:
    path = directory / "tensors" / ".metadata"
    description = pickle.loads(path.read_bytes())
    change(description.storage_data)
    path.write_bytes(pickle.dumps(description))


def change_places(directory: Path, **fields: object) -> None:
    """Give every entry of the description's ``storage_data`` these values."""

    def change(places: dict) -> None:
        for info in places.values():
            for name, value in fields.items():
                setattr(info, name, value)

    rewrite_description(directory, change)


TENSOR_DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda d: os.truncate(tensors_of(d), tensors_of(d).stat().st_size - 1), ".distcp"),
    "gone": (lambda d: tensors_of(d).unlink(), ".distcp"),
    "elsewhere": (lambda d: change_places(d, relative_path="../../x"), "x: missing"),
    "beyond the end": (lambda d: change_places(d, offset=10**12), "too short"),
    "before the beginning": (lambda d: change_places(d, offset=-5), "location of"),
    "at a text": (lambda d: change_places(d, offset="5"), ".metadata: damaged"),
    "half of the places": (
        lambda d: rewrite_description(d, lambda s: [s.pop(key) for key in list(s)[::2]]),
        "no location for",
    ),
    "common part cut": (lambda d: cut(d / "tensors" / "common.pt"), "common.pt"),
    "common part empty": (lambda d: (d / "tensors" / "common.pt").write_bytes(b""), "common.pt"),
    "no backend": (lambda d: (d / "tensors" / "metadata.json").write_text("[]"), "metadata.json"),
    "another backend": (
        lambda d: edit(d / "tensors" / "metadata.json", lambda m: m.update(sharded_backend="zarr")),
        "zarr",
    ),
    "no description": (lambda d: (d / "tensors" / ".metadata").unlink(), ".metadata"),
}


def tensors_of(directory: Path) -> Path:
    return next((directory / "tensors").glob("*.distcp"))


@pytest.mark.parametrize("name", TENSOR_DAMAGES)
def test_tensor_files_hold_what_their_description_says(
    tmp_path: Path, language_model: Path, name: str
) -> None:
    damage, message = TENSOR_DAMAGES[name]
    copy = tmp_path / language_model.name
    shutil.copytree(language_model, copy)
    checkpoints.verify(copy)
    damage(copy)
    agree(copy)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.verify(copy)


def test_damaged_later_checkpoints_do_not_cost_a_new_one(tmp_path: Path) -> None:
    """A run that continued from an earlier step reaches their steps again only later."""
    write(tmp_path, 5)
    for step in (20, 30):
        (write(tmp_path, step) / "state.json").write_text("damaged")
    new = write(tmp_path, 10, keep=1)
    assert checkpoints.find_checkpoint(tmp_path) == new
    found = (tmp_path / "checkpoints").glob("step_*")
    # What was removed may still be on its way.
    names = sorted(path.name for path in found if path.suffix != ".tmp")
    assert names == ["step_00000010", "step_00000020.damaged", "step_00000030.damaged"]


def test_damaged_checkpoints_are_not_counted_as_kept(tmp_path: Path) -> None:
    for step in (2, 4, 5):
        write(tmp_path, step)
    flip(tmp_path / "checkpoints" / "step_00000005" / "model.safetensors")
    # What a start does, when it continues from the step before.
    checkpoints.set_aside([tmp_path / "checkpoints" / "step_00000005"])
    write(tmp_path, 6, keep=2)
    names = [path.name for path in checkpoints.all_checkpoints(tmp_path)]
    assert names == ["step_00000004", "step_00000006"]


@pytest.mark.parametrize("name", ["step_8", "step_000000008", "step_٩", "step_x", "step_-1"])
def test_other_names_are_no_checkpoints(tmp_path: Path, name: str) -> None:
    good = write(tmp_path, 8)
    (tmp_path / "checkpoints" / name).mkdir()
    assert checkpoints.find_checkpoint(tmp_path) == good
    write(tmp_path, 8)


@pytest.mark.parametrize("place", ["step_00000005", "step_00000005.tmp", "latest"])
def test_what_lies_in_the_way_is_replaced(tmp_path: Path, place: str) -> None:
    """A file, a link, a directory: in the place of a checkpoint, or of ``latest``."""
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    if place == "latest":
        (directory / place).mkdir()
    else:
        (directory / place).symlink_to(tmp_path / "nowhere")
    assert checkpoints.find_checkpoint(write(tmp_path, 5)).name == "step_00000005"
    assert checkpoints.find_checkpoint(write(tmp_path, 6)).name == "step_00000006"


def test_half_a_part_of_the_manifest_costs_only_time(tmp_path: Path) -> None:
    temporary = checkpoints.begin(tmp_path, 1)
    (temporary / "a").write_bytes(b"x")
    checkpoints.describe_files(temporary, [temporary / "a"], rank=0)
    part = next(temporary.glob("*.part"))
    part.write_bytes(part.read_bytes()[:20])
    final = checkpoints.commit(temporary, keep=1)
    assert list(json.loads((final / checkpoints.MANIFEST).read_text())) == ["a"]


def test_half_written_directory_is_no_checkpoint(tmp_path: Path) -> None:
    temporary = checkpoints.begin(tmp_path, 5)
    (temporary / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        checkpoints.find_checkpoint(tmp_path)
    assert checkpoints.newest_valid(tmp_path) is None
    # The next attempt at the same step starts empty.
    assert list(checkpoints.begin(tmp_path, 5).iterdir()) == []
    checkpoints.clean(tmp_path)
    assert not temporary.exists()


def test_same_step_again_replaces_it(tmp_path: Path) -> None:
    write(tmp_path, 5)
    again = write(tmp_path, 5)
    assert checkpoints.find_checkpoint(tmp_path) == again


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing"):
        checkpoints.find_checkpoint(tmp_path / "nothing")


def test_checkpoints_of_skipped_steps_are_used_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By evaluation, generation, export and `run.continue_from`; named, one is used, and said."""
    for step, skipped in ((2, 0), (4, 0), (8, 3)):
        temporary = checkpoints.begin(tmp_path, step)
        for name in ("model.safetensors", "optimizer.safetensors", "config.json"):
            (temporary / name).touch()
        (temporary / checkpoints.RECIPE_FILE).write_text(AUTOENCODER)
        state = RunState(step=step, skipped_in_a_row=skipped, data={"steps_done": step})
        state.write(temporary)
        checkpoints.commit(temporary, keep=10)
    four, eight = (checkpoints.step_directory(tmp_path, step) for step in (4, 8))
    assert checkpoints.find_checkpoint(tmp_path) == four
    said = capsys.readouterr().err
    assert said.count("passed over") == 1 and "its last 3 steps were skipped" in said
    steps = [path.name[-1] for path in checkpoints.candidates(tmp_path, "run.continue_from")]
    assert steps == ["4", "2", "8"]
    capsys.readouterr()
    assert checkpoints.find_checkpoint(eight) == eight
    assert "the weights may be damaged" in capsys.readouterr().err
