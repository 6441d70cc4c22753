"""Stores: damaged notes of what was begun, sizes that MDS cannot hold, full disks."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_latents_parts import (
    BLOCK,
    REPOSITORY,
    SHARD_BYTES,
    Job,
    KilledError,
    command,
    contents,
    inputs,
    job,
)

from calm_dist.data import latents, parts
from calm_dist.data.latents import finished_store, read_meta, write_store
from calm_dist.errors import DataError

# Fixtures.
__all__ = ["inputs", "job"]


DAMAGES = ["", "{", "[]", "null", "[" * 100_000, '{"block_size": 32}', "3", "\xff"]


@pytest.mark.parametrize("content", DAMAGES, ids=range(len(DAMAGES)))
def test_damaged_plan_is_named_and_overwritten(job: Job, tmp_path: Path, content: str) -> None:
    """A kill just after a node lost its disk's cache leaves such files."""
    out = tmp_path / "out"
    job.write(out, (0, 3))
    file = out / ".parts" / "plan.json"
    file.write_bytes(content.encode("latin-1"))
    before = contents(out)
    for act in (lambda: finished_store(out, job.plan), lambda: job.write(out)):
        with pytest.raises(DataError, match=r"plan.json: is damaged.* with --overwrite"):
            act()
    assert contents(out) == before
    meta = write_store(out, job.corpus, job.tokenizer, job.plan, overwrite=True)
    assert read_meta(out) == meta and not (out / ".parts").exists()


def test_every_damage_of_the_plan_is_named(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job.write(out, (0, 3))
    file = out / ".parts" / "plan.json"
    whole = json.loads(file.read_text())
    assert len(whole) > 10
    for key in whole:
        values: tuple[Any, ...] = (None, -1, "x", [], {}, 1.5)
        for value in values:
            if whole[key] == value:
                continue
            file.write_text(json.dumps({**whole, key: value}))
            with pytest.raises(DataError, match=r"plan.json: is damaged|another "):
                job.write(out)
    file.write_text(json.dumps(whole))
    assert job.write(out) == []


@pytest.mark.parametrize("name", ["00000.json", "00001/00000/index.json"])
@pytest.mark.parametrize("content", [*DAMAGES, '[{"raw_data": {"basename": "../x"}}]', "[3]"])
def test_damaged_notes_of_a_part_are_named(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str
) -> None:
    out = tmp_path / "out"
    job.write(out, (0, 3))
    if name != "00000.json":
        # Part 1 ends when its shards are written and it is not yet complete.
        def die(*_: object) -> None:
            raise KilledError

        with monkeypatch.context() as patch:
            patch.setattr(latents, "complete_part", die)
            with pytest.raises(KilledError):
                job.write(out, (1, 3))
    (out / ".parts" / name).write_bytes(content.encode("latin-1"))
    if name == "00000.json" and content == "[]":
        # A part may have no shards.
        assert job.write(out) == []
        return
    with pytest.raises(DataError, match=rf"{name}: is damaged.* with --overwrite"):
        job.write(out)


def test_leftover_plan_beside_a_finished_store_does_not_matter(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    meta = write_store(out, job.corpus, job.tokenizer, job.plan)
    (out / ".parts").mkdir()
    (out / ".parts" / "plan.json").touch()
    assert finished_store(out, job.plan) == meta


def test_shards_stay_below_4_gib(inputs: Path, job: Job, tmp_path: Path) -> None:
    """Where MDS's offsets of 32 bits would wrap; every sample has one of them."""
    blocks = parts.blocks_in_shard(job.plan, 64 << 20)
    assert blocks == (64 << 20) // (4 * BLOCK)
    out = tmp_path / "out"
    for size in (4096 << 20, 4095 << 20, 1 << 62, 0, -1):
        with pytest.raises(DataError, match=r"must be smaller than 4 GiB|must be positive"):
            job.write(out, size=size)
        with pytest.raises(DataError, match=r"must be smaller than 4 GiB|must be positive"):
            write_store(out, job.corpus, job.tokenizer, job.plan, shard_bytes=size)
    assert not out.exists()
    # 32 tokens and an offset are 132 bytes.
    most = (2**32 - 1 - (1 << 16)) // 132
    assert parts.blocks_in_shard(job.plan, most * 128 + 127) == most
    with pytest.raises(DataError, match="give --shard-mib 3971 or less"):
        parts.blocks_in_shard(job.plan, (most + 1) * 128)
    assert parts.blocks_in_shard(job.plan, 3971 << 20) <= most
    large = Job(inputs, 1, block_size=1 << 29).plan
    assert parts.blocks_in_shard(large, 1) == parts.blocks_in_shard(large, 4095 << 20) == 1
    with pytest.raises(DataError, match=r"block size 1073741824: .* smaller --block-size"):
        parts.blocks_in_shard(Job(inputs, 1, block_size=1 << 30).plan, 1)


def test_nothing_is_overwritten_where_the_input_is_refused(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    meta = write_store(out, job.corpus, job.tokenizer, job.plan)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "corpus.txt").write_text("text")
    for corpus, size, message in (
        (job.corpus, 4096 << 20, "must be smaller than 4 GiB"),
        ([broken], SHARD_BYTES, "broken.jsonl:2: is not a line of JSON"),
        ([tmp_path], SHARD_BYTES, "would be read as text"),
        ([tmp_path / "gone.txt"], SHARD_BYTES, "no such file"),
    ):
        with pytest.raises(DataError, match=message):
            write_store(out, corpus, job.tokenizer, job.plan, shard_bytes=size, overwrite=True)
        assert finished_store(out, job.plan) == meta


@pytest.mark.parametrize(
    ("tool", "corpus", "message"),
    [
        ("encode_latents", "corpus.jsonl", r"error: .*out: File too large"),
        ("encode_latents", "packed.jsonl.gz", r"error: .*out: File too large"),
        ("prepare_corpus", "corpus.jsonl", r"error: --out .*out: cannot be written \(File too"),
    ],
)
def test_full_disk_ends_with_code_2(
    inputs: Path, tmp_path: Path, tool: str, corpus: str, message: str
) -> None:
    """A limit of 1 KiB for each file stands for the disk."""
    text = (inputs / "corpus.jsonl").read_bytes()
    (inputs / "packed.jsonl.gz").write_bytes(gzip.compress(text))
    arguments = command(inputs, tmp_path / "out")[1:]
    if tool == "prepare_corpus":
        arguments = ["--out", str(tmp_path / "out")]
    arguments += ["--corpus", str(inputs / corpus)]
    run = ["bash", "-c", 'ulimit -f 1 && exec "$@"', "bash", sys.executable]
    run += [str(REPOSITORY / "tools" / f"{tool}.py"), *arguments]
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(tmp_path / "tmp")}
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert re.search(message, done.stderr) and "Traceback" not in done.stderr
