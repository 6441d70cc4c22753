"""Which files a corpus has, their names, and what is refused."""

from __future__ import annotations

import json
import os
import runpy
import socket
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calm_dist.data.latents import plan_store, write_parts
from calm_dist.errors import DataError
from calm_dist.text import corpus as corpus_module
from calm_dist.text.corpus import (
    ShuffledDocuments,
    find_files,
    iter_documents,
)
from calm_dist.text.prepare import prepare_corpus
from calm_dist.text.tokenizer import load_tokenizer, train_tokenizer

ROOT = Path(__file__).parents[2]


def names(*paths: str | Path) -> list[str]:
    return [file.name for file in find_files(paths)]


def write(path: Path, *texts: str, **more: object) -> Path:
    """JSON lines; ``more`` is added to each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, **more}) + "\n" for text in texts))
    return path


@pytest.fixture
def ov(tmp_path: Path) -> Path:
    """A directory of three files."""
    for name in ("x.txt", "y.txt", "sub/z.txt"):
        (tmp_path / "ov" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "ov" / name).write_text(f"text of {name}")
    return tmp_path / "ov"


def test_a_file_beside_its_compressed_form_is_refused(tmp_path: Path) -> None:
    """As ``gzip -k`` leaves them: the same documents would get into several splits."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "a.jsonl.gz").write_bytes(b"")
    (tmp_path / "b.jsonl.zst").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.jsonl and .*a\.jsonl\.gz: differ only in the"):
        find_files([tmp_path])
    (tmp_path / "a.jsonl.gz").rename(tmp_path / "c.jsonl.gz")
    assert len(find_files([tmp_path])) == 3


def test_file_that_is_there_twice_is_refused(ov: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ov.parent)
    os.symlink("../x.txt", ov / "sub" / "link.txt")
    os.link(ov / "y.txt", ov.parent / "hard.txt")
    os.symlink("ov", "again")
    sub = ov / "sub"
    cases: list[tuple[list[str | Path], str | None]] = [
        ([ov], "x.txt"),
        ([ov / "y.txt", "ov/y.txt"], "ov/y.txt"),
        (["ov/y.txt", "ov/y.txt"], "ov/y.txt"),
        (["ov/sub/z.txt", "ov/y.txt", "again/sub/z.txt"], "again/sub/z.txt"),
        (["ov/*.txt", "hard.txt"], "hard.txt"),
        ([sub], None),
        ([sub, "ov/x.txt"], "ov/x.txt"),
        (["ov"], "ov/x.txt"),
        (["ov/./y.txt", "ov/sub/../y.txt"], "ov/sub/../y.txt"),
    ]
    for paths, twice in cases:
        if twice is None:
            assert len(find_files(paths)) == 2
            continue
        with pytest.raises(DataError, match=r"is given twice.*give each file once") as caught:
            find_files(paths)
        assert twice in str(caught.value)
    (sub / "link.txt").unlink()
    for second in (ov / "sub" / "z.txt", "ov", "again", "ov/**"):
        with pytest.raises(DataError, match="is given twice"):
            find_files(["ov", second])


def test_files_of_one_name_get_names_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("here", "elsewhere/far"):
        root = tmp_path / place
        for letter in "abc":
            write(root / "w" / letter / "wiki_00.jsonl", *(f"{letter} {i}" for i in range(20)))
        write(root / "w" / "other.jsonl", "one")
        monkeypatch.chdir(root)
        assert names("w/*/wiki_00.jsonl") == [f"{letter}/wiki_00.jsonl" for letter in "abc"]
        assert names("w/a", "w/b") == ["a/wiki_00.jsonl", "b/wiki_00.jsonl"]
        assert names("w/a", root / "w" / "other.jsonl") == ["wiki_00.jsonl", "other.jsonl"]
    ids = [document.id for document in iter_documents(["w/*/wiki_00.jsonl"])]
    assert len(set(ids)) == 60
    assert prepare_corpus(tmp_path / "out", ["w/*/wiki_00.jsonl"], vocab_size=280)


@pytest.mark.parametrize("given", ['"a"', '""', "{}", "[]", "1.5", "true", "7", "NaN"])
def test_documents_of_one_id_are_refused(tmp_path: Path, given: str) -> None:
    first = write(tmp_path / "a.jsonl", *(f"text {i}" for i in range(20)))
    second = tmp_path / "b.jsonl"
    with first.open("a") as stream:
        stream.write(f'\n{{"id": {given}, "text": "once"}}\n')
    second.write_text(f'{{"text": "c"}}\n{{"id": {given}, "text": "again"}}\n')
    with pytest.raises(DataError, match="have the same id") as caught:
        prepare_corpus(tmp_path / "out", [first, second], vocab_size=280)
    assert f"{first}:22 and {second}:2" in str(caught.value)
    assert not (tmp_path / "out").exists()
    second.write_text('{"text": "c"}\n')
    assert prepare_corpus(tmp_path / "out", [first, second], vocab_size=280)


def test_null_is_no_id(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *(f"text {i}" for i in range(400)), id=None)
    ids = [document.id for document in iter_documents([path])]
    assert ids[0] == "a.jsonl@0" and len(set(ids)) == 400
    prepare_corpus(tmp_path / "out", [path], vocab_size=280)
    counts = {
        split: len((tmp_path / "out" / "corpus" / f"{split}.jsonl").read_text().splitlines())
        for split in ("train", "valid", "test")
    }
    assert counts["train"] > 340 and 5 < counts["valid"] < 40 and 5 < counts["test"] < 40


def test_own_id_that_looks_like_a_position_is_found(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", "one", id="a.jsonl@0")
    write(tmp_path / "a.jsonl", "two", "three", "four")
    with pytest.raises(DataError, match=r"a.jsonl:1 and .*b.jsonl:1 have the same id"):
        prepare_corpus(tmp_path / "out", [tmp_path / "*.jsonl"], vocab_size=280)


def test_one_line_says_what_is_read_and_what_is_left_out(ov: Path) -> None:
    write(ov / "a.JSONL", "one")
    write(ov / "deep" / "b.json", "two")
    for name in ("c.orc", "d.md", "e.MD", "f.md.gz", "Makefile", ".hidden", "g.tar.gz"):
        (ov / name).write_text("x")
    (ov / "settings.json").write_text('{"language": "en"}\n')
    os.mkfifo(ov / "pipe.txt")
    found = find_files([ov])
    assert found.summary() == (
        "corpus: 3 .txt, 1 .json, 1 .jsonl; left out: 2 .md, 1 .json (not lines of "
        "documents), 1 .md.gz, 1 .orc, 1 .tar.gz, 1 .txt (not a regular file), 1 hidden, "
        "1 without suffix"
    )
    assert sum(found.left_out.values()) == 9 and found.left_out[".md"] == 2


def test_tools_say_what_they_read(
    ov: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (ov / "c.orc").write_text("x")
    arguments = ["--corpus", str(ov), "--vocab-size", "280", "--out", str(tmp_path / "out")]
    assert run_tool(monkeypatch, "prepare_corpus", *arguments) == 0
    assert capsys.readouterr().err.startswith("corpus: 3 .txt; left out: 1 .orc\n")
    arguments = ["--corpus", str(ov), "--tokenizer", str(tmp_path / "out" / "tokenizer.json")]
    arguments += ["--variant", "tokens", "--patch-size", "2", "--block-size", "2"]
    arguments += ["--out", str(tmp_path / "store")]
    assert run_tool(monkeypatch, "encode_latents", *arguments) == 0
    assert "corpus: 3 .txt; left out: 1 .orc\n" in capsys.readouterr().err


def run_tool(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> object:
    """The exit code of a tool."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
    return caught.value.code


def test_linked_directories_are_entered_once(ov: Path, tmp_path: Path) -> None:
    write(tmp_path / "far" / "in" / "f.jsonl", "far")
    os.symlink(tmp_path / "far", ov / "a_link")
    # Circles, and links to what is reached without them, change nothing.
    os.symlink(ov, ov / "sub" / "up")
    os.symlink(ov / "sub", ov / "a_second_sub")
    os.symlink("..", tmp_path / "far" / "in" / "parent")
    os.symlink("loop", ov / "loop")
    assert names(ov) == ["a_link/in/f.jsonl", "sub/z.txt", "x.txt", "y.txt"]
    start = time.monotonic()
    for i in range(20):
        os.symlink(ov, ov / "sub" / f"up{i}")
    assert sorted(names(f"{ov}/**/*.txt")) == ["x.txt", "y.txt", "z.txt"]
    assert sorted(names(f"{ov}/**/**/z.txt")) == ["z.txt"]
    assert time.monotonic() - start < 20
    os.symlink("nowhere.txt", ov / "broken.txt")
    with pytest.raises(DataError, match=r"broken.txt: is a link whose target cannot be read"):
        find_files([ov])


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.txt"))
        for name, kind in (("pipe.jsonl", "a named pipe"), ("zero.txt", "a device"),
                           ("socket.txt", "a socket"), ("*.jsonl", "a named pipe")):  # fmt: skip
            with pytest.raises(DataError, match=f"is {kind}.*to a file and give that"):
                find_files([tmp_path / name])
    reading, writing = os.pipe()
    with pytest.raises(DataError, match=rf"/dev/fd/{reading}: is a named pipe"):
        find_files([f"/dev/fd/{reading}"])
    os.close(reading)
    os.close(writing)
    with pytest.raises(DataError, match=r"left out: 2 .txt \(not a regular file\), 1 .jsonl"):
        find_files([tmp_path])


def test_names_that_are_no_text_are_read(tmp_path: Path) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt")
    with open(path, "w") as stream:
        stream.write("text")
    write(tmp_path / "more.jsonl", *"abc")
    assert names(tmp_path) == ["caf\\udce9.txt", "more.jsonl"]
    assert prepare_corpus(tmp_path.parent / f"{tmp_path.name}_out", [tmp_path], vocab_size=280)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of text, from which relative paths start."""
    write(tmp_path / "data" / "raw" / "a.jsonl", *(f"text {i}" for i in range(30)))
    train_tokenizer(["text"], 280, tmp_path / "tokenizer.json")
    os.symlink("data", tmp_path / "link")
    os.symlink("data/raw/a.jsonl", tmp_path / "linked.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


OVERLAPS = [
    ("data", "data"),
    ("data", "data/new"),
    ("data", "link/new"),
    ("link", "data/new/deep"),
    ("data/raw", "data"),
    ("data/raw/a.jsonl", "data"),
    ("linked.jsonl", "data"),
    ("data/*/*.jsonl", "link"),
    ("data/**/*.json*", "data/new"),
    ("**/*", "new"),
    ("dat?", "data/raw/x"),
]


@pytest.mark.parametrize(("corpus", "out"), OVERLAPS)
def test_output_in_the_corpus_is_refused(data: Path, corpus: str, out: str) -> None:
    before = sorted(data.parent.rglob("*"))
    if corpus == "**/*":
        (data.parent / "linked.jsonl").unlink()
        before.remove(data.parent / "linked.jsonl")
        corpus = "**/*l"
    with pytest.raises(DataError, match=r"--out .*would be read as text.*another --out"):
        prepare_corpus(out, [corpus], vocab_size=280)
    assert sorted(data.parent.rglob("*")) == before


@pytest.mark.parametrize(("corpus", "out"), [pair for pair in OVERLAPS if "*" not in pair[0]])
def test_store_in_the_corpus_is_refused(
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    corpus: str,
    out: str,
) -> None:
    before = sorted(data.parent.rglob("*"))
    code = run_tool(monkeypatch, "encode_latents", "--variant", "tokens", "--patch-size", "2",
                    "--tokenizer", "tokenizer.json", "--corpus", corpus, "--out", out)  # fmt: skip
    assert code == 2 and "would be read as text" in capsys.readouterr().err
    assert sorted(data.parent.rglob("*")) == before
    tokenizer = load_tokenizer("tokenizer.json")
    plan = plan_store([corpus], tokenizer, variant="tokens", patch_size=2, block_size=4)
    if not Path(out).exists():
        with pytest.raises(DataError, match="would be read as text"):
            write_parts(Path(out), [corpus], tokenizer, plan)
        assert sorted(data.parent.rglob("*")) == before


def test_output_beside_the_corpus_is_not_refused(data: Path) -> None:
    assert prepare_corpus("data_out", ["data"], vocab_size=280)
    assert prepare_corpus("data/out", ["data/raw/a.jsonl"], vocab_size=280)
    assert not prepare_corpus("data/out", ["data/raw/a.jsonl"], vocab_size=280)
    assert prepare_corpus("data/out2", ["data/r*"], vocab_size=280)
    assert prepare_corpus("data/out3", ["data/**/a.jsonl"], vocab_size=280)


def search_time(root: Path, count: int) -> float:
    root.mkdir()
    for i in range(count):
        if i % 1000 == 0:
            (root / f"{i:07}").mkdir()
        (root / f"{i // 1000 * 1000:07}" / f"{i:07}.txt").touch()
    start = time.process_time()
    found = find_files([root])
    assert len(found) == count
    return time.process_time() - start


def test_time_of_a_search_grows_with_the_number_of_files(tmp_path: Path) -> None:
    """Ten times the files: ten times the time on any machine, and not a hundred times."""
    few, many = (
        min(search_time(tmp_path / f"{count}_{i}", count) for i in range(2))
        for count in (2_000, 20_000)
    )
    assert many < 40 * few


@pytest.mark.full
def test_a_million_files_are_found_in_seconds(tmp_path: Path) -> None:
    assert search_time(tmp_path / "many", 1_000_000) < 120


def test_files_are_searched_once(ov: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By each of the tools: what was found is handed on."""
    searched = []
    original = os.scandir

    def watched(path: Any) -> Any:
        searched.append(str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", watched)
    prepare_corpus(tmp_path / "out", [ov], vocab_size=280)
    assert searched.count(str(ov)) == 1
    run_tool(monkeypatch, "encode_latents", "--variant", "tokens", "--patch-size", "2",
             "--block-size", "2", "--corpus", str(ov), "--out", str(tmp_path / "store"),
             "--tokenizer", str(tmp_path / "out" / "tokenizer.json"))  # fmt: skip
    assert searched.count(str(ov)) == 2


def test_corpus_that_changes_while_it_is_used_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", *(f"text {i}" for i in range(30)))
    documents = ShuffledDocuments([path], seed=0)
    whole = path.read_bytes()
    path.write_bytes(whole[:40])
    with pytest.raises(DataError, match=r"a.jsonl: was changed while it was used"):
        list(documents)
    path.write_bytes(b"\n" + whole)
    with pytest.raises(DataError, match=r"a.jsonl: was changed while it was used"):
        list(documents)
    original = corpus_module.DocumentIds.splits
    for changed in (whole[: len(whole) // 2], whole * 2):
        path.write_bytes(whole)

        def splits(self: corpus_module.DocumentIds, changed: bytes = changed) -> np.ndarray:
            path.write_bytes(changed[: changed.rindex(b"\n") + 1])
            return original(self)

        with monkeypatch.context() as patch:
            patch.setattr(corpus_module.DocumentIds, "splits", splits)
            with pytest.raises(DataError, match="was changed while it was used"):
                prepare_corpus(tmp_path / "out", [path], vocab_size=280)


MANIFESTS = [
    "",
    "[]",
    "null",
    "[" * 100_000,
    '{"made_from": {}}',
    '{"made_from": []}',
    "\xff",
    '{"made_from": {}, "splits": {}, "tokenizer": {}}',
    '{"made_from": {}, "splits": {"train": 3}, "tokenizer": {"file": "../x"}}',
]


@pytest.mark.parametrize("content", MANIFESTS, ids=range(len(MANIFESTS)))
def test_damaged_manifest_is_named(tmp_path: Path, content: str) -> None:
    path = write(tmp_path / "a.jsonl", *(f"text {i}" for i in range(9)))
    out = tmp_path / "out"
    prepare_corpus(out, [path], vocab_size=280)
    (out / "corpus" / "manifest.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"manifest.json: is damaged .*remove .*corpus"):
        prepare_corpus(out, [path], vocab_size=280)


def test_every_damage_of_the_manifest_is_named_or_mended(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *(f"text {i}" for i in range(9)))
    out = tmp_path / "out"
    prepare_corpus(out, [path], vocab_size=280)
    file = out / "corpus" / "manifest.json"
    whole = json.loads(file.read_text())
    places = [
        (a, b, c)
        for a in whole
        for b in [None, *whole[a]]
        for c in [None, *(whole[a][b] if b and isinstance(whole[a][b], dict) else [])]
    ]
    assert len(places) > 20
    for outer, inner, last in places:
        values: tuple[Any, ...] = (None, 3, "x", [], {})
        for value in values:
            damaged = json.loads(json.dumps(whole))
            if inner is None:
                damaged[outer] = value
            elif last is None:
                damaged[outer][inner] = value
            else:
                damaged[outer][inner][last] = value
            file.write_text(json.dumps(damaged))
            # Another number of documents is for the reader alone.
            is_number = last in ("documents", "characters") and value == 3
            try:
                prepare_corpus(out, [path], vocab_size=280)
            except DataError as error:
                assert str(out / "corpus") in str(error) and not is_number
            else:
                mended = json.loads(file.read_text())
                assert is_number or mended == whole, (outer, inner, last, value)
