"""Stores that several workers write: who does what, races, kills, the merge, and refusals."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from warm import warm_python

from calm_dist.data import existing, latents, parts
from calm_dist.data.latents import finished_store, plan_store, read_meta, write_parts, write_store
from calm_dist.data.stream import open_store
from calm_dist.errors import DataError
from calm_dist.text.corpus import ShuffledDocuments, pack_blocks
from calm_dist.text.tokenizer import load_tokenizer, train_tokenizer

REPOSITORY = Path(__file__).parents[2]
TOOL = REPOSITORY / "tools" / "encode_latents.py"
BLOCK, DOCUMENTS, SHARD_BYTES = 32, 60, 1024
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "that", "dog", "run"]


class KilledError(BaseException):
    """Ends a run where it stands: nothing that handles errors handles this one."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """corpus.jsonl and tokenizer.json."""
    root = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 5 + i % 50)) for i in range(DOCUMENTS)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (root / "corpus.jsonl").write_text("".join(lines))
    train_tokenizer(texts, 280, root / "tokenizer.json")
    return root


class Job:
    """The arguments of one store."""

    def __init__(self, inputs: Path, num_parts: int, **changes: Any) -> None:
        self.corpus = [inputs / "corpus.jsonl"]
        self.tokenizer = load_tokenizer(inputs / "tokenizer.json")
        self.options = {
            "block_size": BLOCK,
            "patch_size": 4,
            "seed": 5,
            "token_dtype": "uint32",
            **changes,
        }
        self.plan = plan_store(
            self.corpus, self.tokenizer, variant="tokens", parts=num_parts, **self.options
        )

    def write(self, out: Path, worker: tuple[int, int] = (0, 1), size: int = SHARD_BYTES) -> Any:
        return write_parts(
            out, self.corpus, self.tokenizer, self.plan, worker=worker, shard_bytes=size
        )


@pytest.fixture
def job(inputs: Path) -> Job:
    return Job(inputs, 3)


def contents(out: Path) -> dict[str, bytes]:
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def unbroken(job: Job, tmp_path: Path) -> dict[str, bytes]:
    """Files of the store as one process writes it."""
    write_store(tmp_path / "unbroken", job.corpus, job.tokenizer, job.plan, shard_bytes=SHARD_BYTES)
    return contents(tmp_path / "unbroken")


def before_call(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, number: int, act: Callable[[], Any]
) -> Iterator[int]:
    """Let ``act`` happen once, just before call ``number`` (from 0) of a function.

    Returns:
        An iterator that is at its end when it has happened.
    """
    original = getattr(owner, name)
    waiting = iter(range(number + 1))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(waiting, None) == number:
            act()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return waiting


def test_each_worker_tokenises_its_own_documents_only(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: dict[str, bytes]
) -> None:
    tokenised: list[str] = []
    original = type(job.tokenizer).tokens_of

    def watched(tokenizer: Any, texts: Any) -> Any:
        tokenised.extend(texts)
        return original(tokenizer, texts)

    monkeypatch.setattr(type(job.tokenizer), "tokens_of", watched)
    documents = list(ShuffledDocuments(job.corpus, seed=5))
    thirds = [documents[start : start + 20] for start in (0, 20, 40)]
    out = tmp_path / "out"
    # The second would have part 2 as well, which it finds complete.
    for worker, missing in (((2, 3), [0, 1]), ((0, 2), [1]), ((1, 3), [])):
        assert job.write(out, worker) == missing
        assert tokenised == [document.text for document in thirds[worker[0]]]
        tokenised.clear()
    assert contents(out) == unbroken
    # Again, and as worker of another number of workers: nothing is left to do.
    assert job.write(out, (0, 2)) == [] and not tokenised

    blocks = [pack_blocks(third, job.tokenizer, BLOCK, 4, seed=5) for third in thirds]
    store = open_store(out)
    stored = [store[i]["tokens"] for i in range(len(store))]
    assert np.array_equal(stored, list(chain.from_iterable(blocks)))
    assert read_meta(out).parts == 3 and len(list(out.glob("shard.*"))) > 6


def test_store_of_one_part_is_as_before_there_were_parts(inputs: Path, tmp_path: Path) -> None:
    Job(inputs, 1).write(tmp_path / "out")
    assert "parts" not in json.loads((tmp_path / "out" / "meta.json").read_text())
    assert read_meta(tmp_path / "out").parts == 1


def test_part_may_hold_less_than_a_block_but_not_all(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    single = Job(inputs, DOCUMENTS)
    assert single.write(out, (1, 2)) == list(range(0, DOCUMENTS, 2))
    markers = [json.loads(file.read_text()) for file in (out / ".parts").glob("0*.json")]
    assert [] in markers and any(markers)
    assert single.write(out, (0, 2)) == []
    assert len(open_store(out)) == read_meta(out).num_blocks > 10

    long = Job(inputs, 2, block_size=4096)
    assert long.write(tmp_path / "short", (0, 2)) == [1]
    for _ in range(2):
        with pytest.raises(DataError, match=r"less than one block of 4096 tokens.*fewer --parts"):
            long.write(tmp_path / "short", (1, 2))


@pytest.mark.parametrize("name", ["tokens_dropped", "without_id"])
def test_report_has_no_count_that_a_part_of_an_earlier_version_lacks(
    job: Job, tmp_path: Path, unbroken: dict[str, bytes], name: str
) -> None:
    out = tmp_path / "out"
    assert job.write(out, (0, 2)) == [1]
    tally = out / ".parts" / "report.00002.json"
    counts = json.loads(tally.read_text())
    del counts[name]
    tally.write_text(json.dumps(counts))
    assert job.write(out, (1, 2)) == []
    report = json.loads(unbroken["report.json"])
    del report[name]
    assert json.loads((out / "report.json").read_text()) == report


@pytest.mark.parametrize("fate", ["killed", "overtaken"])
def test_merge_that_is_killed_or_overtaken_at_any_step(
    job: Job,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unbroken: dict[str, bytes],
    fate: str,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(latents, "merge", lambda *_: [0])
        job.write(tmp_path / "all_parts")

    def killed() -> None:
        raise KilledError

    for step in range(100):
        out = tmp_path / str(step)
        shutil.copytree(tmp_path / "all_parts", out)
        act = killed if fate == "killed" else (lambda place=out: job.write(place))
        with monkeypatch.context() as patch:
            waiting = before_call(patch, Path, "replace", step, act)
            try:
                assert job.write(out, (0, 2)) == []
            except KilledError:
                assert not (out / "meta.json").exists()
        # All three have nothing more to write: their parts are there.
        assert job.write(out, (1, 2)) == []
        assert contents(out) == unbroken
        if next(waiting, None) is not None:
            break
    # Shards, index, tokenizer and meta.json.
    assert step == len(unbroken) > 9


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (latents, "find_files", 0),
        (latents, "begin", 0),
        (existing, "begun_plan", 0),
        (parts, "_put", 0),
        (latents, "write_shard", 0),
        (latents, "write_shard", 4),
        ("MDSWriter", "__init__", 0),
        ("MDSWriter", "__init__", 4),
        ("MDSWriter", "finish", 4),
        (parts, "_put", 5),
        (latents, "complete_part", 0),
        (latents, "complete_part", 1),
        (latents, "merge", 0),
        (parts, "is_complete", 0),
        (parts, "is_complete", 2),
    ],
)
def test_worker_that_others_overtake_finds_the_finished_store(
    job: Job,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unbroken: dict[str, bytes],
    owner: object,
    name: str,
    call: int,
) -> None:
    """Others: the same worker once more, and the one who has the rest and merges."""
    from calm_dist.compat.streaming import MDSWriter

    owner = MDSWriter if owner == "MDSWriter" else owner
    out = tmp_path / "out"
    done = before_call(
        monkeypatch,
        owner,
        name,
        call,
        lambda: [job.write(out, (0, 2)), job.write(out, (1, 2))],
    )
    encoded, flush = [], MDSWriter.flush_shard

    def watched(writer: MDSWriter) -> None:
        encoded.append(writer)
        flush(writer)

    monkeypatch.setattr(MDSWriter, "flush_shard", watched)
    assert job.write(out, (0, 2)) == []
    assert next(done, None) is None
    assert contents(out) == unbroken
    # Only the shard that it was at work on, if any, was encoded twice.
    assert len(encoded) <= len(list(out.glob("shard.*"))) + 1
    assert not list(out.glob(".parts*"))


def test_store_that_is_finished_while_it_is_looked_at(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert job.write(out, (0, 2)) == [1]
    done = before_call(monkeypatch, existing, "begun_plan", 0, lambda: job.write(out, (1, 2)))
    assert finished_store(out, job.plan) == read_meta(out)
    assert next(done, None) is None


def test_worker_that_runs_twice_writes_each_shard_once(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        done = before_call(patch, parts, "_put", 2, lambda: job.write(out, (0, 2)))
        assert job.write(out, (0, 2)) == [1]
        assert next(done, None) is None
    assert not [path for path in (out / ".parts").rglob("*.tmp")]
    assert job.write(out, (1, 2)) == []
    assert contents(out) == unbroken


def test_three_processes_one_killed_then_two_that_merge_at_once(
    inputs: Path, tmp_path: Path
) -> None:
    job, out = Job(inputs, 7), tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}

    def start(worker: str, hook: str = "") -> subprocess.Popen[str]:
        arguments = command(inputs, out, "--parts", "7", "--worker", worker)
        return subprocess.Popen(
            [warm_python(), "-c", _WITH_HOOK, hook, tmp_path, worker, *arguments]
            if hook
            else [warm_python(), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )

    first = [start("0/3"), start("1/3", "die in the second part"), start("2/3")]
    said = [process.communicate(timeout=900)[0] for process in first]
    assert [process.returncode for process in first] == [0, -9, 0]
    assert re.search(r"parts of worker 0/3 are done; \d of 7 parts are missing", said[0])
    complete = {path.name for path in (out / ".parts").glob("0*.json")}
    assert complete == {f"{part:05}.json" for part in (0, 1, 2, 3, 5, 6)}
    written = {path.stat().st_ino for path in out.rglob("shard*") if ".tmp" not in str(path)}
    assert len(written) == 6

    second = [start(worker, "merge together") for worker in ("0/2", "1/2")]
    said = [process.communicate(timeout=900)[0] for process in second]
    assert [process.returncode for process in second] == [0, 0]
    write_store(tmp_path / "one", job.corpus, job.tokenizer, job.plan)
    assert contents(out) == contents(tmp_path / "one")
    blocks = read_meta(out).num_blocks
    assert said == [f"{out}: {blocks} blocks of {BLOCK} tokens written\n"] * 2
    # What was written before the kill was moved, not written again.
    assert written <= {path.stat().st_ino for path in out.glob("shard.*")}


# Runs the tool with argv[4:] as worker argv[3], but: dies by SIGKILL when it has written the
# second shard and not yet named it; or waits in argv[2] for the other worker before it merges.
_WITH_HOOK = """
import os, runpy, signal, sys, time
from pathlib import Path
from calm_dist.data import latents, parts

hook, meeting, worker = sys.argv[1], Path(sys.argv[2]), sys.argv[3].replace("/", "_")
put, merge = parts._put, latents.merge
def die(scratch, place):
    if place.name == "00000" and place.parent.name == "00004":
        os.kill(os.getpid(), signal.SIGKILL)
    put(scratch, place)
def meet(*args):
    (meeting / f"{worker}.ready").touch()
    end = time.monotonic() + 800
    while len(list(meeting.glob("*.ready"))) < 2:
        assert time.monotonic() < end
        time.sleep(0.001)
    return merge(*args)
if hook == "merge together":
    latents.merge = meet
else:
    parts._put = die
sys.argv = sys.argv[4:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command(inputs: Path, out: Path | str, *more: str) -> list[str]:
    return [
        str(TOOL), "--variant", "tokens", "--patch-size", "4", "--block-size", str(BLOCK),
        "--seed", "5", "--tokenizer", str(inputs / "tokenizer.json"),
        "--corpus", str(inputs / "corpus.jsonl"), "--out", str(out), "--token-dtype", "uint32",
        *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--parts 0", "argument --parts: 0: give a whole number from 1"),
        ("--parts 4 --worker 4", "argument --worker: 4: give I/W, worker I of W"),
        ("--parts 4 --worker 4/4", "argument --worker: 4/4: give I/W"),
        ("--parts 4 --worker=-1/4", "argument --worker: -1/4: give I/W"),
        ("--parts 4 --worker 0/4/1", "argument --worker: 0/4/1: give I/W"),
        ("--worker 0/4", "error: --worker 0/4: 4 workers cannot share 1 part; give --parts 4"),
        ("--parts 4 --worker 0/4 --overwrite", "error: --overwrite: a worker must not remove"),
        ("--parts 4 --worker 0/4 --out s3://b/x", "error: --out s3://b/x: workers need a dir"),
        ("--shard-mib 4096", "error: shard size 4096 MiB: a shard of such blocks must be smaller"),
        ("--shard-mib 0", "argument --shard-mib: 0: give a whole number from 1"),
        ("--block-size 1073741824", "error: block size 1073741824: one block takes 4294967296"),
    ],
)
def test_bad_options_end_with_code_2(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: str,
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", command(inputs, tmp_path / "out", *options.split()))
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_begin_that_is_refused_leaves_nothing(inputs: Path, tmp_path: Path) -> None:
    table = tmp_path / "corpus.parquet"
    pq.write_table(pa.table({"text": WORDS}), table)
    job = Job(inputs, 3)
    job.corpus = [table]
    job.plan = plan_store([table], job.tokenizer, variant="tokens", parts=3, **job.options)
    table.write_bytes(b"replaced since")
    for _ in range(2):
        with pytest.raises(DataError, match=r"corpus\.parquet"):
            job.write(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_other_number_of_parts_or_size_of_shards_is_refused(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    three, two, one = (Job(inputs, number) for number in (3, 2, 1))
    three.write(out, (0, 3))
    for job, found in ((two, "3 there, 2 now"), (one, "3 there, 1 now")):
        with pytest.raises(DataError, match=rf"another parts \({found}\).*--overwrite"):
            job.write(out, (1, 2))
    with pytest.raises(DataError, match=r"shards of another size \(8 blocks there, 4 now\)"):
        three.write(out, (1, 3), SHARD_BYTES // 2)
    three.write(out)
    with pytest.raises(DataError, match=r"another parts \(3 there, 1 now\)"):
        one.write(out)
    one.write(tmp_path / "one")
    with pytest.raises(DataError, match=r"another parts \(1 there, 3 now\)"):
        three.write(tmp_path / "one", (0, 3))
