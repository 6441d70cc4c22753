"""The division of a corpus among parts and workers: exact shares, ids that do not depend on it,
kills, joining workers that search nothing, and memory that does not grow."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calm_dist.data import latents, parts
from calm_dist.data.latents import finished_store, plan_store, write_parts, write_store
from calm_dist.data.manifest import begun_corpus
from calm_dist.data.store import StoreMeta, fingerprint
from calm_dist.errors import DataError
from calm_dist.text import dedup, units
from calm_dist.text.corpus import Document, corpus_sha256, find_files, iter_documents, pack_blocks
from calm_dist.text.dedup import Repetitions
from calm_dist.text.formats import TEXT_AND_ID, CorpusFile, Reading
from calm_dist.text.reading import shuffled_documents
from calm_dist.text.tokenizer import Tokenizer, train_tokenizer
from calm_dist.text.units import Span, Unit, shuffled_shares, units_of

ROOT = Path(__file__).parents[2]


class KilledError(BaseException):
    """Ends a run where it stands."""


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lines, text and a compressed file, in many units."""
    monkeypatch.setattr(units, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(units, "_FILE_BYTES", 10)
    root = tmp_path / "corpus"
    root.mkdir()
    lines = [json.dumps({"text": f"line {i} " * (1 + i % 9)}) + "\n" for i in range(300)]
    (root / "a.jsonl").write_text("".join(lines[:200]))
    (root / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[200:]).encode()))
    (root / "c.txt").write_text("".join(f"{i} is a line of text, ü\n" for i in range(400)))
    for i in range(20):
        (root / f"d{i:02}.txt").write_text(f"small file {i}")
    return root


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return train_tokenizer(["line of a file"], 280, tmp_path / "tokenizer.json")


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_parts_have_every_document_once(corpus: Path) -> None:
    found = units_of(find_files([corpus]), TEXT_AND_ID)
    assert len(found) > 10
    documents = Counter(iter_documents([corpus]))
    assert sum(documents.values()) == len(documents) > 320
    ids = {document.id for document in documents}
    assert len(ids) == len(documents) and "a.jsonl@0" in ids and "d07.txt" in ids
    for number in (1, 2, 3, 7, 16, 100, 1000):
        shares = list(shuffled_shares(found, 3, number))
        assert len(shares) == number
        read = [list(shuffled_documents(of_part, 3, TEXT_AND_ID)) for of_part in shares]
        assert Counter(document for part in read for document in part) == documents
        if number <= 16:
            sizes = [sum(len(document.text) for document in part) for part in read]
            assert max(sizes) < 2 * sum(sizes) / number + 2000
    # All units are read by few parts where there are many units to a part.
    owners = Counter(share.unit for of_part in shuffled_shares(found, 3, 1) for share in of_part)
    assert set(owners.values()) == {1}
    small = [Unit((Span(CorpusFile(str(i), str(i))),), 1 + i % 3) for i in range(1000)]
    shares = list(shuffled_shares(small, 3, 10))
    assert all(share.is_whole for of_part in shares for share in of_part)


def test_documents_are_those_of_the_file_however_it_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Units begin at any byte: at the first of a line, within, at its end, in a character."""
    path = tmp_path / "a.jsonl"
    texts = ["é" * (i % 5) + "x" * (i % 3) + "." for i in range(60)]
    path.write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    )
    whole = list(iter_documents([path]))
    assert [document.text for document in whole] == texts
    for size in range(1, 120):
        monkeypatch.setattr(units, "CHUNK_BYTES", size)
        assert list(iter_documents([path])) == whole
    path = tmp_path / "b.txt"
    path.write_text("\n".join(texts))
    for size in range(1, 60):
        monkeypatch.setattr(units, "CHUNK_BYTES", size)
        assert "".join(document.text for document in iter_documents([path])) == path.read_text()


def plan_of(corpus: Any, tokenizer: Tokenizer, number: int, **more: Any) -> latents.StorePlan:
    return plan_store(
        corpus, tokenizer, variant="tokens", block_size=8, patch_size=4, parts=number, **more
    )


def test_killed_workers_go_on_as_another_number_of_workers(
    corpus: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of([corpus], tokenizer, 5)
    assert plan.order == 2
    write_store(tmp_path / "unbroken", [corpus], tokenizer, plan, shard_bytes=512)
    unbroken = contents(tmp_path / "unbroken")
    out = tmp_path / "out"
    for kill, (owner, name) in enumerate(
        [(parts, "write_manifest"), (parts, "_put"), (latents, "read_shares"),
         (latents, "write_shard"), (parts, "_put"), (latents, "complete_part"), (parts, "_write"),
         (parts, "_write"), (latents, "merge")]
    ):  # fmt: skip
        original = getattr(owner, name)
        calls = iter(range(kill % 4))

        def dying(*args: Any, call: Any = original, left: Any = calls, **named: Any) -> Any:
            if next(left, None) is None:
                raise KilledError
            return call(*args, **named)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, dying)
            try:
                write_parts(out, [corpus], tokenizer, plan, worker=(kill % 3, 3), shard_bytes=512)
            except KilledError:
                assert not (out / "meta.json").exists()
    for worker in (1, 0):
        write_parts(out, [corpus], tokenizer, plan, worker=(worker, 2), shard_bytes=512)
    assert contents(out) == unbroken


def test_report_says_how_many_tokens_fill_no_block(
    corpus: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    tokens = len(list(pack_blocks(iter_documents([corpus]), tokenizer, 1, 4, seed=0)))
    dropped = []
    for number in (1, 5):
        out = tmp_path / f"{number}"
        meta = write_store(out, [corpus], tokenizer, plan_of([corpus], tokenizer, number))
        dropped.append(json.loads((out / "report.json").read_text())["tokens_dropped"])
        assert meta.num_tokens + dropped[-1] == tokens
    assert dropped[0] < 8 and dropped[0] < dropped[1] < 5 * 8


def test_worker_that_joins_searches_nothing(
    corpus: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And finds the files at another place, if it is given that."""
    out, given = tmp_path / "out", [str(corpus)]
    files = find_files(given)
    assert begun_corpus(out / ".parts", given) is None
    plan = plan_of(files, tokenizer, 5)
    parts.begin(out, plan, parts.blocks_in_shard(plan, 512), files)
    begun = begun_corpus(out / ".parts", given)
    assert begun is not None and begun_corpus(out / ".parts", ["elsewhere"]) is None
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", lambda _: pytest.fail("searched"))
        joined = plan_of(begun, tokenizer, 5)
        assert joined == plan
        assert write_parts(out, begun, tokenizer, joined, worker=(1, 3), shard_bytes=512) == [
            0,
            2,
            3,
        ]
    moved = corpus.rename(tmp_path / "moved")
    for worker in (0, 2):
        write_parts(out, [moved], tokenizer, plan, worker=(worker, 3), shard_bytes=512)
    write_store(tmp_path / "one", [moved], tokenizer, plan, shard_bytes=512)
    assert contents(out) == contents(tmp_path / "one")


def test_manifest_of_relative_paths_is_read_from_anywhere(
    corpus: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files, out = find_files(["corpus"]), tmp_path / "out"
    plan = plan_of(files, tokenizer, 5)
    parts.begin(out, plan, parts.blocks_in_shard(plan, 512), files)
    monkeypatch.chdir("/")
    # The same word means another directory here.
    assert begun_corpus(out / ".parts", ["corpus"]) is None
    begun = begun_corpus(out / ".parts", [str(corpus)])
    assert begun is not None
    assert write_parts(out, begun, tokenizer, plan, shard_bytes=512) == []


def test_file_that_changed_since_the_manifest_was_made_is_named(
    corpus: Path, tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """By its size or by its contents, in a directory and at a URL; not by a manifest of an earlier
    version, which has no fingerprints. The remedy works."""
    original = (corpus / "a.jsonl").read_bytes()
    file = corpus / "a.jsonl"
    places = {"path": [str(corpus)], "url": [f"local://{corpus}"]}
    changes = {
        "it had .* bytes, now": original + b'{"text": "more"}\n',
        "it has other contents": original.replace(b"line", b"LINE"),
    }
    for place, given in places.items():
        for number, (how, changed) in enumerate(changes.items()):
            file.write_bytes(original)
            files, out = find_files(given), tmp_path / f"{place}{number}"
            plan = plan_of(files, tokenizer, 4)
            parts.begin(out, plan, parts.blocks_in_shard(plan, 512), files)
            begun = begun_corpus(out / ".parts", given)
            assert begun is not None and "begun; files that were added later" in caplog.text
            write_parts(out, begun, tokenizer, plan, worker=(0, 2), shard_bytes=512)
            file.write_bytes(changed)
            how = how if place == "path" else "other contents"
            message = rf"a.jsonl: was changed after the store in {out} .*{how}.*--overwrite"
            for corpus_now in (begun, files):
                with pytest.raises(DataError, match=message):
                    write_parts(out, corpus_now, tokenizer, plan, shard_bytes=512)
            # With the whole corpus at hand, its own fingerprint is another one.
            with pytest.raises(DataError, match="another corpus_sha256"):
                write_parts(out, given, tokenizer, plan_of(given, tokenizer, 4), shard_bytes=512)
    manifest = out / ".parts" / "manifest.jsonl"
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    for line in lines:
        line[4] = [span[:5] for span in line[4]]
    offsets = [0]
    described = json.loads((out / ".parts" / "manifest.json").read_text())
    whole = manifest.read_bytes()
    shorter = [json.dumps(line).encode() + b"\n" for line in lines]
    manifest.write_bytes(b"".join(shorter))
    for place in described["offsets"][1:]:
        offsets.append(sum(map(len, shorter[: whole[:place].count(b"\n")])))
    (out / ".parts" / "manifest.json").write_text(json.dumps({**described, "offsets": offsets}))
    assert begun is not None
    assert write_parts(out, begun, tokenizer, plan, shard_bytes=512) == []


def test_corpus_that_changes_before_the_manifest_is_made_is_refused(
    corpus: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    files = find_files([corpus])
    plan = plan_of(files, tokenizer, 4)
    (corpus / "c.txt").write_bytes((corpus / "c.txt").read_bytes().replace(b"line", b"LINE"))
    with pytest.raises(DataError, match="was changed while it was used"):
        write_parts(tmp_path / "out", files, tokenizer, plan)
    assert not (tmp_path / "out" / ".parts").exists()


def test_compressed_file_that_parts_share_is_named(
    corpus: Path, tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    files = find_files([corpus])
    plan = plan_of(files, tokenizer, 20)
    with caplog.at_level("INFO"):
        parts.begin(tmp_path / "out", plan, 4, files)
    assert re.search(r"b.jsonl.gz is compressed .* from its start: \d parts read all", caplog.text)


def test_finished_store_of_an_earlier_version_is_known(
    corpus: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """That version hashed all contents of a corpus of any size, and had no order of units."""
    out = tmp_path / "out"
    meta = write_store(out, [corpus], tokenizer, plan_of([corpus], tokenizer, 1))
    fields = meta.to_dict() | {"corpus_sha256": corpus_sha256(find_files([corpus]))}
    del fields["order"]
    fields["fingerprint"] = fingerprint(fields, (out / "index.json").read_bytes())
    (out / "meta.json").write_text(json.dumps(StoreMeta.model_validate(fields).to_dict()))
    with pytest.raises(DataError, match="another corpus_sha256"):
        finished_store(out, plan_of([corpus], tokenizer, 1))
    plan = plan_of([corpus], tokenizer, 1, out=out)
    assert finished_store(out, plan) is not None
    # One that it only began had its documents in another order.
    begun = tmp_path / "begun"
    (begun / ".parts").mkdir(parents=True)
    described = {**plan.to_dict(), "blocks_per_shard": 2048}
    (begun / ".parts" / "plan.json").write_text(json.dumps(described))
    with pytest.raises(DataError, match="was begun by an earlier version"):
        write_parts(begun, [corpus], tokenizer, plan, shard_bytes=2048 * plan.sample_bytes)


def test_long_document_is_tokenized_in_pieces_and_stays_one(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from calm_dist.text import corpus as corpus_module

    monkeypatch.setattr(corpus_module, "TOKENIZED_CHARACTERS", 100)
    text = "a paragraph of it\n\n" * 30 + "one line and " * 30 + "x" * 950
    longest: list[int] = []
    original = type(tokenizer).tokens_of

    def watched(self: Tokenizer, texts: Any) -> Any:
        longest.extend(map(len, texts))
        return original(self, texts)

    monkeypatch.setattr(type(tokenizer), "tokens_of", watched)
    documents = [Document("a", text), Document("b", "short")]
    stream = np.concatenate(list(pack_blocks(documents, tokenizer, 1, 4, seed=0))).tolist()
    assert max(longest) <= 200
    assert stream.count(tokenizer.end_id) == 2
    first = stream[: stream.index(tokenizer.end_id)]
    assert tokenizer.decode([i for i in first if i != tokenizer.begin_id]) == text


@pytest.mark.full
def test_memory_does_not_grow_with_lines_or_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A document of 20 MB, 40,000 files, and 300 MB of lines."""
    root = tmp_path / "corpus"
    for i in range(40):
        (root / f"{i:03}").mkdir(parents=True)
        for j in range(1000):
            (root / f"{i:03}" / f"{j:04}.txt").write_text(f"{i} {j} small")
    line = json.dumps({"text": "some words of a text " * 100}) + "\n"
    (root / "many.jsonl").write_text(line * (300_000_000 // len(line)))
    (root / "long.jsonl").write_text(json.dumps({"text": "word " * 4_000_000}) + "\n")
    code = (
        "import resource, runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "tools" / "encode_latents.py"), "--variant",
         "tokens", "--patch-size", "4", "--tokenizer", str(tokenizer.path), "--corpus", str(root),
         "--out", str(tmp_path / "out"), "--parts", "20", "--worker", "0/4", "--dedup", "exact"],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert int(done.stdout.splitlines()[-1]) < 1000
    assert Reading().dedup is False


def test_pyarrow_is_not_imported_by_a_thread_that_ends(tmp_path: Path) -> None:
    for name in "ab":
        pq.write_table(pa.table({"text": ["some text"] * 9}), tmp_path / f"{name}.parquet")
    # It crashes in the first allocation of another thread.
    script = (
        "import sys, threading\n"
        "from calm_dist.text.corpus import find_files\n"
        "from calm_dist.text.formats import TEXT_AND_ID\n"
        "from calm_dist.text.units import units_of\n"
        "files = find_files([sys.argv[1]])\n"
        "assert 'pyarrow' not in sys.modules\n"
        "units_of(files, TEXT_AND_ID)\n"
        "import pyarrow\n"
        "later = [threading.Thread(target=pyarrow.array, args=(['x'] * 999,)) for _ in range(9)]\n"
        "[thread.start() for thread in later]\n"
        "[thread.join() for thread in later]\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_table_whose_rows_are_unknown_is_not_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Places in an Arrow stream at a URL would be taken for numbers of rows."""
    monkeypatch.setattr(units, "groups", lambda file, kind, reading: None)
    file = CorpusFile("s3://bucket/data.arrow", "data.arrow", size=10 * units.CHUNK_BYTES)
    assert [unit.spans for unit in units_of([file], TEXT_AND_ID)] == [(Span(file),)]


def test_deduplication_names_the_disk_that_fails(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"--dedup exact: .*file/hashes: cannot be used .*TMPDIR"):
        Repetitions(tmp_path / "file" / "hashes", 1).find(lambda _: [], TEXT_AND_ID, skip=False)
    # numpy alone raises an error without a number for a full disk.
    with pytest.raises(OSError, match="No space left on device"):
        dedup._save(Path("/dev/full"), np.zeros(1000))
