"""Damaged checkpoints, runs and released directories: read, or refused with a message.

The damage is the same in every run. A default run does `LEAST` to each file, ``--full`` takes
minutes.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from fuzz import json_mutations, mutations
from safetensors.torch import load_file, save_file

from calm_dist.errors import UserError
from calm_dist.files import file_sha256
from calm_dist.inference.load import load_model
from calm_dist.interop.convert import import_checkpoint
from calm_dist.interop.huggingface import load_autoencoder, load_calm
from calm_dist.runs.checkpoints import MANIFEST, find_checkpoint
from calm_dist.runs.listing import describe
from calm_dist.training.checkpoint.moments import load_moments, save_moments

GOLDEN = Path(__file__).parents[1] / "golden"
SECONDS = {"short": 0.0, "full": 30.0}
LEAST = 25
"""Number of damages to a file, however long they take."""
# However long an input takes, it is one of a few kinds of work on a few hundred KB.
MOMENTS = ("exp_avg", "exp_avg_sq")
LONGEST = 20.0

Read = Callable[[Path], object]


@pytest.fixture(params=["short", pytest.param("full", marks=pytest.mark.full)])
def seconds(request: pytest.FixtureRequest) -> float:
    return SECONDS[request.param]


def check_reader(file: Path, damaged: Iterator[bytes], read: Read, seconds: float) -> None:
    """Read the file with each damage until the time is over, and with `LEAST` at least."""
    directory = file.parent
    refused = 0
    started = time.monotonic()
    for number, content in enumerate(damaged):
        if number >= LEAST and time.monotonic() - started > seconds:
            break
        file.write_bytes(content)
        begun = time.monotonic()
        try:
            read(directory)
        except UserError as error:
            assert str(error).strip() and len(str(error)) < 20_000
            refused += 1
        except BaseException as error:
            raise AssertionError(f"damage {number} of {file.name}: {content[:300]!r}") from error
        assert time.monotonic() - begun < LONGEST, f"damage {number} of {file.name}"
    assert refused > 0


@pytest.fixture
def released(tmp_path: Path) -> Path:
    for name in ("calm_k4", "ae_k4"):
        shutil.copytree(GOLDEN / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(("name", "read"), [("calm_k4", load_calm), ("ae_k4", load_autoencoder)])
def test_configurations(released: Path, name: str, read: Read, seconds: float) -> None:
    file = released / name / "config.json"
    values = json.loads(file.read_text())
    check_reader(file, json_mutations(random.Random(1), values), read, seconds)
    check_reader(file, mutations(random.Random(2), file.read_bytes()), read, seconds / 2)


FORMS = ["zip", "legacy", "safetensors"]


@pytest.mark.parametrize("form", FORMS)
def test_weights(released: Path, form: str, seconds: float) -> None:
    directory = released / "ae_k4"
    file = directory / "pytorch_model.bin"
    weights = torch.load(file, weights_only=True)
    if form == "safetensors":
        file.unlink()
        file = directory / "model.safetensors"
        save_file({name: tensor.clone() for name, tensor in weights.items()}, file)
    elif form == "legacy":
        torch.save(weights, file, _use_new_zipfile_serialization=False)
    data = file.read_bytes()
    # All but the beginning and the end are numbers, of which any may be there.
    head, tail = data[:6000], data[6000:]
    rng = random.Random(3)
    check_reader(
        file, (part + tail for part in mutations(rng, head)), load_autoencoder, seconds / 2
    )
    check_reader(file, mutations(rng, data), load_autoencoder, seconds / 2)


def test_index(released: Path, seconds: float) -> None:
    directory = released / "ae_k4"
    weights = torch.load(directory / "pytorch_model.bin", weights_only=True)
    (directory / "pytorch_model.bin").unlink()
    save_file({n: t.clone() for n, t in weights.items()}, directory / "model-1.safetensors")
    values = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-1.safetensors")}
    file = directory / "model.safetensors.index.json"
    check_reader(file, json_mutations(random.Random(4), values), load_autoencoder, seconds)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("imported") / "run"
    import_checkpoint(GOLDEN / "calm_k4", run)
    return run


@pytest.fixture
def checkpoint(imported: Path, tmp_path: Path) -> Path:
    shutil.copytree(imported, tmp_path / "run")
    return find_checkpoint(tmp_path / "run")


def load_vouched_for(checkpoint: Path, name: str) -> Read:
    """Load a checkpoint whose manifest agrees with the file, as someone would write it who wants
    the file to be read."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())

    def read(_: Path) -> object:
        file = checkpoint / name
        described = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        (checkpoint / MANIFEST).write_text(json.dumps(manifest | {name: described}))
        return load_model(checkpoint)

    return read


@pytest.mark.parametrize("name", ["state.json", "recipe.yaml", "tensors/metadata.json"])
def test_texts_of_a_checkpoint(checkpoint: Path, name: str, seconds: float) -> None:
    file = checkpoint / name
    read = load_vouched_for(checkpoint, name)
    data = file.read_bytes()
    check_reader(file, mutations(random.Random(5), data), read, seconds / 2)
    # JSON is YAML.
    values = yaml.safe_load(data)
    check_reader(file, json_mutations(random.Random(6), values), read, seconds / 2)


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp"])
def test_tensors_of_a_checkpoint(checkpoint: Path, name: str, seconds: float) -> None:
    file = checkpoint / "tensors" / name
    read = load_vouched_for(checkpoint, f"tensors/{name}")
    check_reader(file, mutations(random.Random(7), file.read_bytes()), read, seconds)


def test_manifest(checkpoint: Path, seconds: float) -> None:
    file = checkpoint / MANIFEST
    values = json.loads(file.read_text())
    check_reader(file, json_mutations(random.Random(8), values), find_checkpoint, seconds)


def test_every_file_of_a_checkpoint_is_watched(checkpoint: Path) -> None:
    """Without its manifest's consent no damage passes, in whichever file it is."""
    rng = random.Random(9)
    for file in sorted(checkpoint.rglob("*")):
        if not file.is_file() or file.name == MANIFEST:
            continue
        data = file.read_bytes()
        for content in islice(mutations(rng, data), 12):
            file.write_bytes(content)
            if content != data:
                with pytest.raises(UserError, match=file.name):
                    find_checkpoint(checkpoint)
        file.write_bytes(data)
    find_checkpoint(checkpoint)


def test_optimizer_of_an_autoencoder(tmp_path: Path, seconds: float) -> None:
    model = load_autoencoder(GOLDEN / "ae_k2").train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters())
    model.decode(model.encode(torch.zeros(1, 4, dtype=torch.long))[0]).sum().backward()
    optimizer.step()
    save_moments(optimizer, model, tmp_path, MOMENTS)
    file = tmp_path / "optimizer.safetensors"
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")

    def read(directory: Path) -> None:
        load_moments(optimizer, model, directory, MOMENTS, 1)
        optimizer.step()

    rng = random.Random(10)
    check_reader(file, (part + data[end:] for part in mutations(rng, data[:end])), read, seconds)
    tensors = {name: tensor.clone() for name, tensor in load_file_of(data, tmp_path).items()}
    for name in tensors:
        save_file(tensors | {name: torch.zeros(3)}, file)
        with pytest.raises(UserError, match=name):
            read(tmp_path)


def load_file_of(data: bytes, directory: Path) -> dict[str, torch.Tensor]:
    (directory / "whole.safetensors").write_bytes(data)
    return load_file(directory / "whole.safetensors")


@pytest.mark.parametrize("name", ["environment.json", "metrics.jsonl", "recipe.yaml"])
def test_runs_are_listed(imported: Path, tmp_path: Path, name: str, seconds: float) -> None:
    """A list of runs names what is damaged, and continues with the next one."""
    run = tmp_path / "run"
    shutil.copytree(imported, run)
    record = {"step": 3, "loss": 1.5, "tokens": 9, "tokens_per_second": 2.0, "time": 1.0}
    (run / "environment.json").write_text(json.dumps({"ended": {"how": "failed", "reason": "x"}}))
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    file = run / name
    started = time.monotonic()
    damaged = mutations(random.Random(11), file.read_bytes())
    if file.suffix != ".yaml":
        values = record if name == "metrics.jsonl" else json.loads(file.read_text())
        damaged = json_mutations(random.Random(12), values)
    for number, content in enumerate(damaged):
        if number >= LEAST and time.monotonic() - started > seconds / 2:
            break
        file.write_bytes(content)
        row = describe(run)
        json.dumps(row, allow_nan=False)
        assert row["state"] == "damaged" or row["reason"] is None or isinstance(row["reason"], str)
