"""Stores checked byte by byte, and their blocks shown: what is right, and every kind of damage."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from test_latents import BLOCK, inputs, plan_for, tokenizer_of, write

from calm_dist.data import inspection
from calm_dist.data.inspection import check_store, read_block
from calm_dist.data.latents import write_store
from calm_dist.data.parts import remove_store
from calm_dist.data.stream import open_store, open_training_stream
from calm_dist.errors import DataError, UnreachableError
from calm_dist.interop.huggingface import load_autoencoder, save_autoencoder

ROOT = Path(__file__).parents[2]
# A fixture.
__all__ = ["inputs"]


@pytest.fixture(scope="module")
def store(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stores") / "fp16"
    write(inputs, out, parts=2)
    return out


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    shutil.copytree(store, tmp_path / "copy")
    return tmp_path / "copy"


def run_tool(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, *arguments: Any
) -> tuple[int, str, str]:
    """Exit code and what a tool said."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, said.out, said.err


def test_intact_store_and_its_counts(store: Path, inputs: Path) -> None:
    check = check_store(str(store))
    meta = open_store(store).meta
    shards = list(store.glob("shard.*"))
    assert not check.problems
    assert (check.shards, check.blocks, check.tokens) == (
        len(shards), meta.num_blocks, meta.num_blocks * BLOCK,
    )  # fmt: skip
    assert check.bytes == sum(file.stat().st_size for file in shards)
    report = json.loads((store / "report.json").read_text())
    # Each part drops the tokens after its last full block.
    assert check.documents is not None and 0 <= report["documents"] - check.documents < 10


def test_blocks_are_those_of_the_reader(store: Path) -> None:
    reader = open_store(store)
    for number in (0, 7, len(reader) - 1):
        block = read_block(str(store), number)
        assert block.keys() == {"tokens", "mean", "log_std"}
        for name, value in block.items():
            assert np.array_equal(value, reader[number][name]) and value.shape
    with pytest.raises(DataError, match=f"has the blocks 0 to {len(reader) - 1}"):
        read_block(str(store), len(reader))


def test_every_damage_is_named(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = sorted(copy.glob("shard.*"))
    flipped, cut, gone = shards[0], shards[2], shards[3]
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-1])
    gone.unlink()
    (copy / "tokenizer.json").write_text("{}")
    json_file = copy.parent / "check.json"
    code, _, error = run_tool(monkeypatch, capsys, "verify_data", copy, "--json", json_file)
    assert code == 2 and "4 problem(s)" in error
    for name, message in (
        (flipped.name, "is damaged"),
        (cut.name, "bytes instead of"),
        (gone.name, "is missing"),
        ("tokenizer.json", "is not the tokenizer"),
    ):
        assert any(name in line and message in line for line in error.splitlines()), name
    result = json.loads(json_file.read_text())
    assert len(result["problems"]) == 4 and result["shards"] == len(shards) - 3
    index = json.loads((copy / "index.json").read_text())
    index["shards"][0]["samples"] += 1
    (copy / "index.json").write_text(json.dumps(index))
    code, _, error = run_tool(monkeypatch, capsys, "verify_data", copy)
    assert code == 2 and "index.json: does not belong to" in error


def test_contents_that_hashes_do_not_show(inputs: Path, tmp_path: Path) -> None:
    """Written so: tokens outside the vocabulary, latents of no trained autoencoder."""
    from calm_dist.data import parts

    plan = plan_for(inputs)
    assert plan.latent_size is not None
    shape = (plan.num_patches, plan.latent_size)
    good: dict[str, np.ndarray] = {
        "tokens": np.zeros(BLOCK, np.uint32),
        "mean": np.zeros(shape, np.float16),
        "log_std": np.zeros(shape, np.float16),
    }
    cases: list[tuple[str, float, str]] = [
        ("tokens", plan.vocab_size, "block 1 of it has the token 280"),
        ("mean", np.nan, "its mean has values"),
        ("log_std", 13, "its log_std has values"),
    ]
    for i, (name, value, message) in enumerate(cases):
        bad = {key: column.copy() for key, column in good.items()}
        bad[name].flat[3] = value
        out = tmp_path / str(i)
        parts.begin(out, plan, 2)
        parts.write_shard(out, 0, 0, plan, [good, bad])
        parts.complete_part(out, 0, 1)
        parts.merge(out, tokenizer_of(inputs))
        (problem,) = check_store(str(out)).problems
        assert message in problem and "encode the corpus again" in problem


def test_block_is_shown_beside_what_the_decoder_makes_of_it(
    store: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run_tool(monkeypatch, capsys, "inspect_data", store, "--block", 5, "--json", "-")
    assert code == 0
    block = json.loads(out)
    stored = open_store(store)[5]
    tokenizer = tokenizer_of(inputs)
    assert block["tokens"] == stored["tokens"].tolist()
    plain = [i for i in block["tokens"] if i not in (tokenizer.begin_id, tokenizer.end_id)]
    text = block["text"].replace("<|begin|>", "").replace("<|end|>", "")
    assert text == tokenizer.decode(plain)
    model = load_autoencoder(inputs / "autoencoder")
    with torch.no_grad():
        decoded = model.decode(torch.from_numpy(stored["mean"].astype(np.float32))[None]).argmax(-1)
    accuracy = float((decoded[0].numpy() == stored["tokens"]).mean())
    assert block["token_accuracy"] == pytest.approx(accuracy)
    patches = [patch["decoded"] for patch in block["patches"]]
    assert list(chain.from_iterable(patches)) == decoded[0].tolist()
    std = np.exp(stored["log_std"].astype(float))
    assert block["mean_std"] == pytest.approx(std.mean())
    assert block["patches"][3]["std_max"] == pytest.approx(std[3].max())

    code, out, _ = run_tool(monkeypatch, capsys, "verify_data", store, "--block", 5)
    assert code == 0 and "all intact" in out and f"{accuracy:.2%} of the tokens" in out
    code, out, _ = run_tool(monkeypatch, capsys, "inspect_data", store, "--block", 5)
    assert code == 0 and len(out.splitlines()) > 8 + BLOCK // 4 and "decoded: [" in out


def test_autoencoder_that_moved_or_is_another_one(
    copy: Path,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(inputs / "autoencoder", tmp_path / "other")
    model = load_autoencoder(tmp_path / "other")
    next(model.parameters()).mul_(2)
    save_autoencoder(model, tmp_path / "other")
    arguments = ("inspect_data", copy, "--block", 0)
    code, _, error = run_tool(monkeypatch, capsys, *arguments, "--autoencoder", tmp_path / "other")
    assert code == 2 and "the store was encoded by" in error
    away = inputs / "autoencoder"
    away.rename(inputs / "moved")
    try:
        code, out, _ = run_tool(monkeypatch, capsys, *arguments)
        assert code == 0 and "not decoded: the autoencoder is no longer at" in out
        code, out, _ = run_tool(monkeypatch, capsys, *arguments, "--autoencoder", inputs / "moved")
        assert code == 0 and "decoded from the means" in out
    finally:
        (inputs / "moved").rename(away)


def test_store_of_tokens(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(inputs, tmp_path / "out", variant="tokens", autoencoder=None, patch_size=4)
    code, out, _ = run_tool(monkeypatch, capsys, "verify_data", tmp_path / "out")
    assert code == 0 and "all intact" in out and "decoded" not in out
    code, out, error = run_tool(
        monkeypatch, capsys, "inspect_data", tmp_path / "out", "--block", 1, "--patches", 2
    )
    assert code == 0 and "6 more; --patches shows them" in out and "std" not in out
    code, _, error = run_tool(monkeypatch, capsys, "inspect_data", tmp_path / "gone", "--block", 1)
    assert code == 2 and "no such directory" in error


def test_compressed_tokens(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same blocks in the same order, from files that nobody unpacks in their place."""
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    given = ["--corpus", inputs / "corpus.jsonl", "--tokenizer", inputs / "tokenizer.json",
             "--variant", "tokens", "--patch-size", 4, "--block-size", BLOCK]  # fmt: skip
    assert run_tool(monkeypatch, capsys, "encode_latents", *given, "--out", plain)[0] == 0
    given += ["--compression", "zstd", "--parts", 2, "--out", packed]
    assert run_tool(monkeypatch, capsys, "encode_latents", *given, "--worker", "1/2")[0] == 0
    assert run_tool(monkeypatch, capsys, "encode_latents", *given)[0] == 0
    # In one part, several shards.
    plan = plan_for(inputs, variant="tokens", patch_size=4, autoencoder=None, compression="zstd")
    store = tmp_path / "store"
    write_store(store, [inputs / "corpus.jsonl"], tokenizer_of(inputs), plan, shard_bytes=4096)
    same = tmp_path / "same"
    plan = plan.model_copy(update={"compression": None})
    write_store(same, [inputs / "corpus.jsonl"], tokenizer_of(inputs), plan, shard_bytes=4096)
    before = sorted(file.name for file in store.iterdir())
    names = [name for name in before if name.startswith("shard.")]
    assert len(names) > 3 and all(name.endswith(".mds.zstd") for name in names)
    sizes = [sum(f.stat().st_size for f in one.glob("shard.*")) for one in (store, same)]
    assert sizes[0] < 0.7 * sizes[1]

    def batches(path: Path, steps: int, state: dict[str, Any] | None = None) -> list[Any]:
        stream = open_training_stream([path], batch_size=4, cache_dir=tmp_path / "cache")
        if state is not None:
            stream.load_state_dict({**state, "stores": stream.state_dict(0)["stores"]})
        return [{n: v.tolist() for n, v in b.items()} for b in islice(stream, steps)]

    expected = batches(same, 40)
    assert batches(store, 40) == expected
    state = open_training_stream([same], batch_size=4).state_dict(7)
    assert batches(store, 20, state) == expected[7:27]
    assert sorted(file.name for file in store.iterdir()) == before
    one, other = open_store(store), open_store(same)
    for i in (0, len(other) - 1):
        assert one[i]["tokens"].tolist() == other[i]["tokens"].tolist()
    for path in (packed, store):
        code, out, err = run_tool(monkeypatch, capsys, "verify_data", path)
        assert code == 0 and "all intact" in out, err
    number = str(len(other) - 1)
    assert run_tool(monkeypatch, capsys, "inspect_data", store, "--block", number)[0] == 0

    # Damage, also such that the file can still be unpacked.
    shard = store / names[1]
    good = shard.read_bytes()
    for damaged in (good[:-3] + b"abc", good[:50], zstandard.compress(b"other")):
        shard.write_bytes(damaged)
        code, _, err = run_tool(monkeypatch, capsys, "verify_data", store)
        assert code == 2 and f"{names[1]}: " in err
        shutil.rmtree(tmp_path / "cache")
        with pytest.raises(DataError, match=names[1]):
            batches(store, 40)
    shard.write_bytes(good)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert batches(store, 40) == expected
    code, _, err = run_tool(
        monkeypatch, capsys, "encode_latents", "--compression", "zstd", *given[:4],
        "--autoencoder", inputs / "autoencoder", "--out", tmp_path / "none",
    )  # fmt: skip
    assert code == 2 and "saves little on latents" in err


def test_more_text_for_a_finished_store(
    store: Path,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A further store that fits, and is the one that its own options give; the first one stays."""
    before = {file.name: file.read_bytes() for file in store.iterdir()}
    more, meta = tmp_path / "more.jsonl", open_store(store).meta
    more.write_text("".join(json.dumps({"text": f"more words {i}. " * 9}) + "\n" for i in range(9)))
    assert meta.autoencoder is not None
    arguments = ["--corpus", more, "--out", tmp_path / "2", "--device", "cpu"]
    code, _, err = run_tool(monkeypatch, capsys, "encode_latents", "--append-to", store, *arguments)
    assert code == 0, err
    given = ["--corpus", more, "--out", tmp_path / "3", "--tokenizer", store / meta.tokenizer.file]
    code, _, err = run_tool(
        monkeypatch, capsys, "encode_latents", *given, "--autoencoder", meta.autoencoder.file,
        "--block-size", BLOCK, "--token-dtype", meta.token_dtype,
    )  # fmt: skip
    assert code == 0, err
    files = [{file.name: file.read_bytes() for file in (tmp_path / n).iterdir()} for n in "23"]
    assert files[0] == files[1]
    assert {file.name: file.read_bytes() for file in store.iterdir()} == before
    both = open_training_stream([store, tmp_path / "2"], batch_size=2)
    assert (
        both.steps_per_epoch == (meta.num_blocks + open_store(tmp_path / "2").meta.num_blocks) // 2
    )

    for options, message in (
        (["--block-size", 2 * BLOCK], f"--block-size {2 * BLOCK}: {store} has {BLOCK}; leave"),
        (["--variant", "tokens"], f"--variant tokens: {store} has fp16; leave"),
        (["--out", store, "--overwrite"], f"--out {store}: is the store of --append-to"),
        (["--append-to", "s3://b/x"], "--append-to s3://b/x: give a local copy of the store"),
    ):
        code, _, err = run_tool(
            monkeypatch, capsys, "encode_latents", "--append-to", store, *arguments, *options
        )
        assert code == 2 and message in err
    code, _, err = run_tool(
        monkeypatch, capsys, "encode_latents", *given, "--autoencoder", meta.autoencoder.file,
        "--out", store, "--overwrite",
    )  # fmt: skip
    assert code == 2 and "is a file of the store that --overwrite removes" in err
    assert {file.name: file.read_bytes() for file in store.iterdir()} == before


def test_wrong_request_is_refused_before_the_store_is_read(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for shard in copy.glob("shard.*"):
        shard.unlink()
    code, _, error = run_tool(monkeypatch, capsys, "verify_data", copy, "--block", 10**6)
    assert code == 2 and "block 1000000: " in error and "problem(s)" not in error


def test_store_that_cannot_be_reached_is_not_damaged(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def unreachable(path: str) -> Iterator[Any]:
        def fetch(name: str) -> None:
            raise UnreachableError(f"{name}: no answer")

        yield Path(path), fetch, lambda file: None

    monkeypatch.setattr(inspection, "store_files", unreachable)
    with pytest.raises(UnreachableError):
        check_store(str(copy))


def test_removal_that_was_interrupted_is_completed(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any file: what is left is known to have been a store."""
    (copy / "mine.txt").touch()
    unlink, left = Path.unlink, [0]

    def unlink_some(self: Path, missing_ok: bool = False) -> None:
        if self.exists():
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_some)
    starts = 0
    while any(file.name != "mine.txt" for file in copy.iterdir()):
        left[0], starts = 1, starts + 1
        with suppress(KeyboardInterrupt):
            remove_store(copy)
    assert starts > 4 and (copy / "mine.txt").exists()
