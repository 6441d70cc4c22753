"""No code in a checkpoint is ever executed."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from calm_dist.errors import CheckpointError
from calm_dist.evaluation.load import load_model
from calm_dist.files import file_sha256
from calm_dist.interop.convert import import_checkpoint
from calm_dist.training.checkpoint import MANIFEST, find_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"


class Payload:
    """Unpickling it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    """A real checkpoint."""
    import_checkpoint(GOLDEN / "calm_k4", tmp_path / "run")
    return find_checkpoint(tmp_path / "run")


def replace(checkpoint: Path, name: str, content: bytes) -> None:
    """Change a file as someone would who wants it to be read: the manifest agrees."""
    file = checkpoint / "tensors" / name
    file.write_bytes(content)
    manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    manifest[f"tensors/{name}"] = {"bytes": len(content), "sha256": file_sha256(file)}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def test_the_test_can_fail(imported: Path, tmp_path: Path) -> None:
    """The payload works where it is unpickled, and untouched checkpoints load."""
    load_model(imported)
    pickle.loads(pickle.dumps(Payload(tmp_path / "made")))
    assert (tmp_path / "made").is_dir()


def test_code_in_the_metadata_is_refused(imported: Path, tmp_path: Path) -> None:
    genuine = pickle.loads((imported / "tensors" / ".metadata").read_bytes())
    genuine.planner_data = Payload(tmp_path / "made")
    replace(imported, ".metadata", pickle.dumps(genuine))
    with pytest.raises(CheckpointError, match=r"\.metadata: refused.*mkdir"):
        load_model(imported)
    assert not (tmp_path / "made").exists()


def test_code_in_the_common_part_is_refused(imported: Path, tmp_path: Path) -> None:
    torch.save({"x": Payload(tmp_path / "made")}, tmp_path / "common.pt")
    replace(imported, "common.pt", (tmp_path / "common.pt").read_bytes())
    with pytest.raises(CheckpointError):
        load_model(imported)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"no pickle at all"])
def test_damaged_metadata_is_refused(imported: Path, content: bytes) -> None:
    replace(imported, ".metadata", content)
    with pytest.raises(CheckpointError, match=r"\.metadata: refused"):
        load_model(imported)
