"""What is left out of a corpus: damaged lines, rows and files, short and repeated documents; and
the report of it, which does not depend on the number of workers."""

from __future__ import annotations

import gzip
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calm_dist.data.latents import plan_store, write_parts
from calm_dist.errors import DataError
from calm_dist.text import dedup, units
from calm_dist.text.corpus import find_files, iter_documents
from calm_dist.text.formats import Reading
from calm_dist.text.prepare import prepare_corpus
from calm_dist.text.reading import Tally
from calm_dist.text.reports import summary
from calm_dist.text.tokenizer import Tokenizer, train_tokenizer

ROOT = Path(__file__).parents[2]
BAD = {
    "not JSON": b'{"text": "cut',
    "no text": b'{"txt": "other key"}',
    "half a surrogate pair": b'{"text": "\\ud83d"}',
}


class KilledError(BaseException):
    """Ends a run where it stands."""


def line(text: str) -> bytes:
    return json.dumps({"text": text}).encode()


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Several formats, read in many units, some of them from the middle of a file."""
    monkeypatch.setattr(units, "CHUNK_BYTES", 500)
    monkeypatch.setattr(units, "_FILE_BYTES", 10)
    root = tmp_path / "corpus"
    root.mkdir()
    lines = [line(f"line {i} of a file") for i in range(200)]
    for at, bad in zip((3, 50, 51, 120, 199), [*BAD.values()] * 2, strict=False):
        lines[at] = bad
    lines[7], lines[60], lines[61] = b"", line("  "), line("short")
    lines[100] = lines[90]
    (root / "a.jsonl").write_bytes(b"\n".join(lines))
    rows = [f"row {i} of a table" for i in range(30)]
    rows[4], rows[20] = None, json.loads(lines[30])["text"]  # type: ignore[call-overload]
    pq.write_table(pa.table({"text": rows}), root / "b.parquet", row_group_size=10)
    (root / "c.txt").write_bytes(b"first line\ncaf\xe9\nlast line\n")
    whole = gzip.compress(b"\n".join(line(f"{i} in gzip") for i in range(40)))
    (root / "d.jsonl.gz").write_bytes(whole[:-30])
    return root


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return train_tokenizer(["line of a file"], 280, tmp_path / "tokenizer.json")


STRICT = Reading(min_chars=6, dedup=True)


def write(
    out: Path, corpus: Path, tokenizer: Tokenizer, parts: int, workers: int, reading: Reading
) -> dict[str, Any]:
    files = find_files([corpus], reading)
    plan = plan_store(
        files,
        tokenizer,
        variant="tokens",
        block_size=8,
        patch_size=4,
        parts=parts,
        reading=reading,
        skip_faults=True,
    )
    for worker in range(workers):
        left = write_parts(
            out, files, tokenizer, plan, worker=(worker, workers), skip_faults=True, shard_bytes=512
        )
    assert not left
    return dict(json.loads((out / "report.json").read_text()))


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_report_counts_what_was_left_out_and_lists_it(
    corpus: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    report = write(tmp_path / "one", corpus, tokenizer, 1, 1, STRICT)
    reasons = {"not JSON": 2, "no text": 3, "half a surrogate pair": 1, "not UTF-8": 1}
    assert report["faults_by_reason"] == reasons | {"damaged file": 1}
    assert report["faults"] == 8
    assert (report["empty"], report["too_short"], report["duplicates"]) == (1, 1, 2)
    places = [(found["file"], found.get("line", found.get("row", found.get("byte"))))
              for found in report["first_faults"]]  # fmt: skip
    lines = [("a.jsonl", number) for number in (4, 51, 52, 121, 200)]
    assert places[:-1] == [*lines, ("b.parquet", 4), ("c.txt", 11)]
    assert places[-1][0] == "d.jsonl.gz"
    assert "is cut off" in report["first_faults"][-1]["message"]
    tables_and_lines = [corpus / "a.jsonl", corpus / "b.parquet"]
    found = [document.text for document in iter_documents(tables_and_lines, STRICT, Tally(True))]
    # Everything else is there, each once; of the cut file what could be read.
    in_gzip = report["documents"] - len(set(found)) - 1
    assert len(found) == len(set(found)) + 2 and 0 < in_gzip < 40
    assert report["tokens"] > 0 and report["bytes"] > 2000
    said = summary(report)
    assert said is not None and "3 no text" in said and "2 duplicates" in said


def test_store_and_report_are_the_same_for_any_number_of_workers(
    corpus: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    # How much fills no block depends on the parts alone.
    whole = {**write(tmp_path / "1 part", corpus, tokenizer, 1, 1, STRICT), "tokens_dropped": 0}
    for parts in (5, 40):
        stores = []
        for workers in (1, 3, 5):
            out = tmp_path / f"{parts} {workers}"
            report = write(out, corpus, tokenizer, parts, workers, STRICT)
            assert {**report, "tokens_dropped": 0} == whole
            stores.append(contents(out))
        assert stores[0] == stores[1] == stores[2]


@pytest.mark.parametrize("killed_at", range(0, 12, 2))
def test_deduplication_that_is_killed_goes_on(
    corpus: Path,
    tmp_path: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    killed_at: int,
) -> None:
    """Whichever file it was writing; with hashes in several runs and ranges."""
    monkeypatch.setattr(dedup, "_RUN_DOCUMENTS", 16)
    monkeypatch.setattr(dedup, "_RANGE_DOCUMENTS", 50)
    unbroken = write(tmp_path / "unbroken", corpus, tokenizer, 5, 1, STRICT)
    assert unbroken["duplicates"] == 2
    calls, save = iter(range(killed_at)), np.save

    def dying(file: Any, values: Any) -> None:
        if next(calls, None) is None:
            raise KilledError
        save(file, values)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", dying)
        with pytest.raises(KilledError):
            write(tmp_path / "out", corpus, tokenizer, 5, 2, STRICT)
    assert write(tmp_path / "out", corpus, tokenizer, 5, 3, STRICT) == unbroken
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


def test_prepared_corpus_is_the_same_and_has_a_report(corpus: Path, tmp_path: Path) -> None:
    assert prepare_corpus(
        tmp_path / "out", [corpus], vocab_size=280, reading=STRICT, skip_faults=True
    )
    report = json.loads((tmp_path / "out" / "corpus" / "report.json").read_text())
    assert (report["faults"], report["duplicates"], report["too_short"]) == (8, 2, 1)
    texts = [
        document.text
        for split in ("train", "valid", "test")
        for document in iter_documents([tmp_path / "out" / "corpus" / f"{split}.jsonl"])
    ]
    assert len(texts) == len(set(texts)) == report["documents"]
    assert min(map(len, texts)) >= 6


def test_damaged_tables_are_counted_by_their_readers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Where a table can be divided stands at its end, which may be missing."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    table = pa.table({"text": [f"row {i} of a table" for i in range(30)]})
    pq.write_table(table, corpus / "cut.parquet")
    with pa.ipc.new_file(corpus / "file.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    with pa.ipc.new_stream(corpus / "stream.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    for name in ("cut.parquet", "file.arrow", "stream.arrow"):
        (corpus / name).write_bytes((corpus / name).read_bytes()[:-20])
    for name in ("empty.parquet", "empty.arrow"):
        (corpus / name).touch()
    damaged = sorted(path.name for path in corpus.iterdir())
    for name in damaged:
        with pytest.raises(DataError, match=rf"{name}: is (damaged or )?cut off"):
            plan_store([corpus / name], tokenizer, variant="tokens", block_size=8, patch_size=4)
        with pytest.raises(DataError, match=rf"{name}: is (damaged or )?cut off"):
            prepare_corpus(tmp_path / "stopped", [corpus / name])
    assert not (tmp_path / "stopped").exists()
    (corpus / "good.jsonl").write_bytes(b"\n".join(line(f"line {i}") for i in range(40)))
    reports = [
        write(tmp_path / f"{parts} {workers}", corpus, tokenizer, parts, workers, STRICT)
        for parts, workers in ((1, 1), (3, 1), (3, 3))
    ]
    prepare_corpus(tmp_path / "out", [corpus], vocab_size=280, reading=STRICT, skip_faults=True)
    reports.append(json.loads((tmp_path / "out" / "corpus" / "report.json").read_text()))
    for report in reports:
        assert report["documents"] == 40
        assert report["faults_by_reason"] == {"damaged file": len(damaged)}
        assert [fault["file"] for fault in report["first_faults"]] == damaged
    assert reports[0]["first_faults"] == reports[2]["first_faults"] == reports[3]["first_faults"]


def test_options_of_the_tools(
    corpus: Path,
    tmp_path: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = ["--corpus", str(corpus), "--tokenizer", str(tokenizer.path)]
    common += ["--min-chars", "6", "--dedup", "exact"]
    encode = ["--variant", "tokens", "--patch-size", "4", "--block-size", "8"]
    for name, more in (("prepare_corpus", []), ("encode_latents", encode)):
        monkeypatch.setattr(sys, "argv", [name, *common, *more, "--out", str(tmp_path / name)])
        tool = str(ROOT / "tools" / f"{name}.py")
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(tool, run_name="__main__")
        assert caught.value.code == 2
        said = capsys.readouterr().err
        assert "a.jsonl:" in said or "b.parquet: row 4" in said or "c.txt" in said or "gz" in said
        # What was begun continues: where nothing was skipped, nothing was bad.
        sys.argv += ["--on-bad-line", "skip"]
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(tool, run_name="__main__")
        assert caught.value.code == 0
        done = capsys.readouterr()
        assert "2 duplicates, 1 damaged file" in done.out + done.err
    for option, message in (
        (["--min-chars", "7"], "another min_chars (6 there, 7 now)"),
        (["--text-key", ""], "--text-key: is empty"),
    ):
        monkeypatch.setattr(sys, "argv", [*sys.argv, *option])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(tool, run_name="__main__")
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


def test_id_key_that_no_document_has_is_noted_once(
    tmp_path: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    records = [{"text": f"line {i}", **({"key": i} if i == 7 else {})} for i in range(40)]
    (corpus / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    pq.write_table(pa.table({"text": ["a row", "a row"]}), corpus / "b.parquet")
    said = "--id-key {}: none of the 41 documents has this key"
    encode = ["--variant", "tokens", "--patch-size", "4", "--block-size", "8", "--parts", "3"]
    encode += ["--tokenizer", str(tokenizer.path)]
    for name, more in (("prepare_corpus", ["--vocab-size", "280"]), ("encode_latents", encode)):
        for key, times in (("kye", 1), ("key", 0)):
            out = tmp_path / f"{name} {key}"
            options = ["--corpus", str(corpus), "--id-key", key, "--dedup", "exact", *more]
            monkeypatch.setattr(sys, "argv", [name, *options, "--out", str(out)])
            with pytest.raises(SystemExit) as caught:
                runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
            done = capsys.readouterr()
            assert caught.value.code == 0, done.err
            assert (done.out + done.err).count(said.format(key)) == times
            (file,) = out.rglob("report.json")
            report = json.loads(file.read_text())
            assert (report["documents"], report["without_id"]) == (41, 41 if times else 40)


def test_stop_names_the_line_of_the_file(corpus: Path) -> None:
    """Also where reading began in the middle of the file."""
    (corpus / "a.jsonl").write_bytes(b"\n".join([*[line("good")] * 150, b"{", b""]))
    with pytest.raises(DataError, match=r"a.jsonl:151: is not a line of JSON.*--on-bad-line skip"):
        list(iter_documents([corpus / "a.jsonl"]))


def test_file_that_cannot_be_read_is_no_bad_line(corpus: Path, tmp_path: Path) -> None:
    """A disk or a network that fails may work again: nothing is skipped."""
    files = find_files([corpus / "a.jsonl", corpus / "c.txt"])
    for change, message in (
        (lambda path: path.write_text("changed"), "was changed while it was used"),
        (Path.unlink, "cannot be read"),
    ):
        change(corpus / "a.jsonl")
        with pytest.raises(DataError, match=message):
            list(iter_documents(files, tally=Tally(skip=True)))
