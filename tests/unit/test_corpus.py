"""Corpora: reading, faults, splits, order and blocks; and the files of prepare_corpus."""

import json
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from calm_dist.errors import DataError
from calm_dist.text import formats, prepare, splitting
from calm_dist.text.corpus import (
    Document,
    ShuffledDocuments,
    iter_documents,
    pack_blocks,
    split_documents,
    standard_library_documents,
)
from calm_dist.text.prepare import prepare_corpus
from calm_dist.text.tokenizer import Tokenizer, train_tokenizer

WORDS = "the cat sat on a mat and saw that dog run"


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A directory with every kind of file."""
    root = tmp_path / "mixed"
    (root / "deep").mkdir(parents=True)
    (root / "b.txt").write_text("plain text")
    write_jsonl(root / "a.jsonl", ["first", "", "second"])
    lines = "".join(json.dumps({"id": f"z{i}", "text": f"packed {i}"}) + "\n" for i in range(3))
    half = len(lines) // 2
    # Two frames, cut inside a line: concatenated .zst files are one stream.
    (root / "deep" / "c.jsonl.zst").write_bytes(
        zstandard.compress(lines[:half].encode()) + zstandard.compress(lines[half:].encode())
    )
    (root / ".hidden.txt").write_text("not this")
    (root / "notes.md").write_text("nor this")
    return root


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return train_tokenizer([WORDS], 280, tmp_path / "tokenizer.json")


def test_every_kind_of_file_is_read_once(mixed: Path) -> None:
    texts = [document.text for document in iter_documents([mixed])]
    assert texts == ["first", "second", "plain text", "packed 0", "packed 1", "packed 2"]
    pattern = str(mixed / "**" / "*.jsonl*")
    assert [document.text for document in iter_documents([pattern])] == [*texts[:2], *texts[3:]]
    assert [document.id for document in iter_documents([mixed])][-1] == "z2"


def test_shuffled_order_is_a_permutation_and_a_function_of_the_seed(mixed: Path) -> None:
    write_jsonl(mixed / "more.jsonl", [f"more {i}" for i in range(20)])
    plain = list(iter_documents([mixed]))
    shuffled = list(ShuffledDocuments([mixed], seed=1))
    assert shuffled != plain
    assert Counter(shuffled) == Counter(plain)
    assert list(ShuffledDocuments([mixed], seed=1)) == shuffled
    assert list(ShuffledDocuments([mixed], seed=2)) != shuffled


def test_long_text_file_becomes_documents_that_join_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "TEXT_DOCUMENT_CHARACTERS", 50)
    path = tmp_path / "book.txt"
    text = ("ein Satz mit ü\nnoch einer\n\n" * 8) + "é" * 333 + "\n\nend"
    path.write_text(text)
    documents = list(iter_documents([path]))
    assert "".join(document.text for document in documents) == text
    assert len(documents) > 6 and max(len(document.text) for document in documents) <= 150
    assert len({document.id for document in documents}) == len(documents)
    assert Counter(ShuffledDocuments([path], seed=0)) == Counter(documents)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "none.txt: no such file"),
        ("x.csv", b"a,b", "x.csv: unknown kind of file"),
        ("blank.txt", b" \n\n", "blank.txt: holds no text"),
        ("nothing.jsonl", b"", "nothing.jsonl: holds no text"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "bad.jsonl:2: is not a line of JSON"),
        ("key.jsonl", b'{"txt": "a"}\n', r"key.jsonl:1: has no \"text\".*keys \['txt'\]"),
        ("number.jsonl", b'{"text": 3}\n', r"number.jsonl:1: has no \"text\""),
        ("list.jsonl", b"[1]\n", r"list.jsonl:1: has no \"text\".*found list"),
        ("deep.jsonl", b'{"text": "a"}\n' + b"[" * 100_000, "deep.jsonl:2: is not a line of JSON"),
        ("half.jsonl", b'{"text": "\\ud83d"}\n', "half.jsonl:1: .*surrogate"),
        ("latin.txt", b"caf\xe9 au lait", r"latin.txt: is not UTF-8 text \(byte 3\)"),
        ("latin.jsonl", b'{"text": "caf\xe9"}\n', "latin.jsonl:1: is not a line of JSON in UTF-8"),
        ("broken.jsonl.zst", b"not zstd", "broken.jsonl.zst: damaged .zst"),
    ],
)
def test_faults_name_file_and_line(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(iter_documents([path]))
    with pytest.raises(DataError, match=message):
        list(ShuffledDocuments([path], seed=0))


def test_directory_without_corpus_and_repeated_file_are_refused(mixed: Path) -> None:
    (mixed / "only").mkdir()
    with pytest.raises(DataError, match=r"holds no \.txt"):
        list(iter_documents([mixed / "only"]))
    with pytest.raises(DataError, match="given twice"):
        list(iter_documents([mixed / "b.txt", mixed / "b.txt"]))


def test_standard_library_has_modules_and_no_tests() -> None:
    documents = standard_library_documents()
    names = [document.id for document in documents]
    assert names == sorted(names) and {"argparse.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if "test" in Path(name).parts or "site-packages" in name]
    assert sum(len(document.text) for document in documents) > 5_000_000


def test_split_is_a_function_of_seed_and_id() -> None:
    ids = [f"document {i}" for i in range(4000)]
    splits = split_documents(ids, seed=0)
    assert sorted(chain.from_iterable(splits.values())) == list(range(4000))
    # Three standard deviations of a binomial count around 5% of 4,000.
    assert all(abs(len(splits[name]) - 200) < 3 * (4000 * 0.05 * 0.95) ** 0.5
               for name in ("valid", "test"))  # fmt: skip
    half = split_documents(ids[:2000], seed=0)
    assert half["test"] == [i for i in splits["test"] if i < 2000]
    assert split_documents(ids, seed=1) != splits


@pytest.mark.parametrize("count", [3, 4, 10])
def test_few_documents_leave_no_split_empty(count: int) -> None:
    for seed in range(20):
        splits = split_documents([str(i) for i in range(count)], seed)
        assert all(splits.values())
        assert sorted(chain.from_iterable(splits.values())) == list(range(count))


def test_too_few_documents_are_refused() -> None:
    with pytest.raises(DataError, match=r"2 document.*at least 3"):
        split_documents(["a", "b"], seed=0)


def test_blocks_join_documents_by_one_end_and_one_to_k_begin_tokens(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    words = WORDS.split()
    documents = [Document(str(i), " ".join(rng.choice(words, 1 + i % 40))) for i in range(200)]
    blocks = list(pack_blocks(iter(documents), tokenizer, 32, 4, seed=3))
    assert {block.shape for block in blocks} == {(32,)} and blocks[0].dtype == np.uint32
    stream = np.concatenate(blocks).tolist()

    position = 0
    seen: Counter[int] = Counter()
    for document in documents:
        begin = 0
        while position < len(stream) and stream[position] == tokenizer.begin_id:
            begin, position = begin + 1, position + 1
        seen[begin] += 1
        expected = [*tokenizer.encode(document.text), tokenizer.end_id]
        found = stream[position : position + len(expected)]
        assert found == expected[: len(found)]
        position += len(found)
        if position == len(stream):
            break
    assert position == len(stream) and set(seen) <= {1, 2, 3, 4} and min(seen.values()) > 20
    total = sum(len(tokenizer.encode(d.text)) + 1 for d in documents)
    assert 0 <= total + 200 * 4 - len(stream) < 200 * 4 + 32

    again = pack_blocks(documents, tokenizer, 32, 4, seed=3)
    assert all(np.array_equal(a, b) for a, b in zip(blocks, again, strict=True))
    other = np.concatenate(list(pack_blocks(documents, tokenizer, 32, 4, seed=4)))
    assert not np.array_equal(other[:200], stream[:200])


def test_prepare_corpus_writes_skips_and_refuses(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [f"{WORDS} {i}\u2028x" for i in range(50)])
    out = tmp_path / "out"
    assert prepare_corpus(out, [source], vocab_size=280)
    read = {
        split: {document.text for document in iter_documents([out / "corpus" / f"{split}.jsonl"])}
        for split in ("train", "valid", "test")
    }
    assert set.union(*read.values()) == {document.text for document in iter_documents([source])}
    assert sum(map(len, read.values())) == 50 and all(read.values())
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert len(before) == 6

    assert not prepare_corpus(out, [source], vocab_size=280)
    for name, damage in (
        ("valid.jsonl", lambda file: file.write_text("")),
        ("report.json", lambda file: file.write_text("{}")),
        ("report.json", Path.unlink),
    ):
        damage(out / "corpus" / name)
        assert prepare_corpus(out, [source], vocab_size=280)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    # A corpus of an earlier version has a report that its manifest does not name, or none.
    manifest = json.loads((out / "corpus" / "manifest.json").read_text())
    del manifest["report"]
    (out / "corpus" / "manifest.json").write_text(json.dumps(manifest))
    (out / "corpus" / "report.json").unlink()
    assert not prepare_corpus(out, [source], vocab_size=280)

    with pytest.raises(DataError, match="tokenizer: BPE with 280 entries there, BPE with 300"):
        prepare_corpus(out, [source], vocab_size=300)
    write_jsonl(source, [f"{i}" for i in range(50)])
    with pytest.raises(DataError, match=r"corpus_sha256: .* there, .* now.*another --out"):
        prepare_corpus(out, [source], vocab_size=280)


def test_prepare_corpus_replaces_only_files_of_its_own(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [f"{WORDS} {i}" for i in range(9)])
    for number, name in enumerate(
        ("corpus/train.jsonl", "corpus/test.jsonl", "corpus/report.json", "tokenizer.json")
    ):
        foreign = tmp_path / str(number) / name
        foreign.parent.mkdir(parents=True)
        foreign.write_text("precious")
        with pytest.raises(DataError, match=rf"holds {name}, but no corpus/manifest.json.*remove"):
            prepare_corpus(tmp_path / str(number), [source], vocab_size=280)
        kept = [path for path in (tmp_path / str(number)).rglob("*") if path.is_file()]
        assert kept == [foreign] and foreign.read_text() == "precious"
    with pytest.raises(DataError, match=r"holds tokenizer.json"):
        prepare_corpus(tmp_path / "3", [source], tokenizer=tokenizer.path)
    (tmp_path / "3" / "tokenizer.json").write_bytes(tokenizer.path.read_bytes())
    (tmp_path / "3" / "tokenizer.model").touch()
    assert prepare_corpus(tmp_path / "3", [source], tokenizer=tokenizer.path)

    # What a killed run left is its own, whichever file it was at.
    steps = [(splitting, "_write_splits")]
    steps += [(prepare, name) for name in ("replace_text", "_make_tokenizer", "_train")]
    for number, (module, name) in enumerate(steps):
        out = tmp_path / f"killed {number}"
        with monkeypatch.context() as patch:
            patch.setattr(module, name, dying(getattr(module, name)))
            with pytest.raises(KeyboardInterrupt):
                prepare_corpus(out, [source], vocab_size=280)
        assert prepare_corpus(out, [source], vocab_size=280)
        assert not prepare_corpus(out, [source], vocab_size=280)
        assert not list(out.rglob(".*"))


def dying(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, after which the process ends."""

    def called(*args: Any) -> Any:
        function(*args)
        raise KeyboardInterrupt

    return called


def test_prepare_corpus_copies_a_given_tokenizer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [f"{WORDS} {i}" for i in range(9)])
    prepare_corpus(tmp_path / "out", [source], tokenizer=tokenizer.path)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == tokenizer.path.read_bytes()
