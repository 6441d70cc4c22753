"""No code in a checkpoint is ever executed."""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from calm_dist.errors import CheckpointError
from calm_dist.files import file_sha256
from calm_dist.inference.load import load_model
from calm_dist.interop.convert import import_checkpoint
from calm_dist.pickles import check_pickle
from calm_dist.runs.checkpoints import MANIFEST, find_checkpoint
from calm_dist.runs.checkpoints.trusted import read_description

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


def nested_key() -> bytes:
    key: tuple[object, ...] = ()
    for _ in range(60):
        key = (key, key)
    return b"\x80\x04}" + pickle.dumps(key, protocol=4)[2:-1] + b"K\x00s."


BOMBS = {
    # Nine bytes, for which the interpreter's unpickler takes 4.3 GB.
    "memo": b"\x80\x04Nr\xff\xff\xff\x1f.",
    "later memo": b"\x80\x04N\x94]\x94r\xff\xff\xff\x1f0.",
    "text memo": b"Np536870911\n.",
    "shared key": nested_key(),
    "shared list": b"\x80\x04]\x94" + b"(" + b"h\x00" * 20_000 + b"e.",
    "string": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 42) + b"abc.",
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 42) + b"abc.",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 42) + b"abc.",
    "number": b"\x80\x04\x8b" + struct.pack("<i", 1 << 30) + b"abc.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 42) + b"N.",
    "nested": b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".",
}


@pytest.mark.parametrize("name", BOMBS)
def test_small_files_take_little_memory(imported: Path, name: str) -> None:
    """Whatever a few bytes ask for; the limit is that of the whole process, above what it has."""
    replace(imported, ".metadata", BOMBS[name])
    with open("/proc/self/statm", encoding="utf-8") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + 500_000_000, limits[1]))
    started = time.monotonic()
    try:
        with pytest.raises(CheckpointError, match=r"\.metadata: refused") as caught:
            read_description(imported / "tensors" / ".metadata")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert time.monotonic() - started < 20
    assert len(str(caught.value)) < 600
    # It was refused for what it asks for, not because the limit was reached.
    assert not isinstance(caught.value.__cause__, MemoryError)
    with pytest.raises(CheckpointError, match=r"\.metadata: refused"):
        load_model(imported)


class Getattr:
    """Pickles as ``getattr(target, name)``."""

    def __init__(self, target: object, name: str) -> None:
        self.arguments = (target, name)

    def __reduce__(self) -> tuple[object, tuple[object, str]]:
        return getattr, self.arguments


def test_descriptions_by_early_python_3_11_pass(
    imported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3.11.0 to 3.11.3 (Debian 12) pickle a member of an enumeration as ``getattr`` of it; of
    anything else that stays refused."""
    genuine = read_description(imported / "tensors" / ".metadata")
    monkeypatch.setattr(
        _MEM_FORMAT_ENCODING,
        "__reduce_ex__",
        lambda member, protocol: (getattr, (type(member), member.name)),
    )
    data = pickle.dumps(genuine)
    assert b"getattr" in data
    replace(imported, ".metadata", data)
    load_model(imported)
    for target, name in ((torch.Size, "mro"), (_MEM_FORMAT_ENCODING, "mro")):
        genuine.planner_data = Getattr(target, name)
        replace(imported, ".metadata", pickle.dumps(genuine))
        with pytest.raises(CheckpointError, match=r"\.metadata: refused"):
            load_model(imported)


def test_descriptions_of_any_protocol_pass(imported: Path) -> None:
    genuine = read_description(imported / "tensors" / ".metadata")
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps(genuine, protocol=protocol)
        check_pickle(data)
        replace(imported, ".metadata", data)
        load_model(imported)


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"no pickle at all"])
def test_damaged_metadata_is_refused(imported: Path, content: bytes) -> None:
    replace(imported, ".metadata", content)
    with pytest.raises(CheckpointError, match=r"\.metadata: refused"):
        load_model(imported)
