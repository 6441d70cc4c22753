"""A corpus of the first version (commit d6c755d): names, ids, order, splits and fingerprints."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import pytest

from calm_dist.data.latents import plan_store, write_store
from calm_dist.data.store import fingerprint
from calm_dist.text.corpus import (
    ShuffledDocuments,
    corpus_sha256,
    find_files,
    iter_documents,
    split_documents,
)
from calm_dist.text.prepare import prepare_corpus
from calm_dist.text.tokenizer import load_tokenizer


def names(*paths: str | Path) -> list[str]:
    return [file.name for file in find_files(paths)]


def write(path: Path, *texts: str, **more: object) -> Path:
    """JSON lines; ``more`` is added to each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, **more}) + "\n" for text in texts))
    return path


_ZST = ("KLUv/SBCdQEAJAJ7ImlkIjogInowIiwgInRleHRwYWNrZWQgMCJ9CjExIn0KAwAgCaLKi2CGASi1L/0gIQkBAHsi"
        "aWQiOiAiejIiLCAidGV4dCI6ICJwYWNrZWQgMiJ9Cg==")  # fmt: skip


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "tiny"
    (root / "deep" / "er").mkdir(parents=True)
    (root / "b.txt").write_text("plain text\n")
    (root / "deep.txt").write_text("beside the directory of its name\n")
    (root / "B.jsonl").write_text(
        '{"text": "first"}\n\n{"text": "  "}\n{"id": 7, "text": "second"}\n'
        '{"id": "own", "text": "third"}\n'
    )
    (root / "deep" / "c.jsonl.zst").write_bytes(base64.b64decode(_ZST))
    lines = (f"line {i} of a long text\n" + "\n" * (i % 7 == 0) for i in range(12000))
    (root / "deep" / "er" / "long.txt").write_text("".join(lines))
    (root / "notes.md").write_text("not this")
    (root / ".hidden.txt").write_text("nor this")
    monkeypatch.chdir(root)
    return root


LONG = ["long.txt", "long.txt@100116", "long.txt@200260", "long.txt@300383"]
DEEP = [f"deep/er/{name}" for name in LONG]


@pytest.mark.parametrize(
    ("paths", "files", "ids", "shuffled", "fingerprint", "texts"),
    [
        (
            ["."],
            ["B.jsonl", "b.txt", "deep/c.jsonl.zst", "deep/er/long.txt", "deep.txt"],
            ["B.jsonl@0", "7", "own", "b.txt", "z0", "z1", "z2", *DEEP, "deep.txt"],
            ["deep.txt", DEEP[0], "own", DEEP[3], "B.jsonl@0", "7", "z0", "z2", DEEP[2], "z1",
             "b.txt", DEEP[1]],
            "08b7a8ef626e7e83aa85837bced23be6e1c7d712c885acacab4717d211a88804",
            "2aedb5382e41f3a9849c0984662d57733c04ee806dc5450ffda2611e2ef100bd",
        ),
        (
            ["deep/*.zst", "b.txt", "**/long.txt"],
            ["c.jsonl.zst", "b.txt", "long.txt"],
            ["z0", "z1", "z2", "b.txt", *LONG],
            [LONG[2], LONG[3], "z2", "z1", LONG[0], LONG[1], "b.txt", "z0"],
            "ace3b124308a8723647110702a433661dc33b891adc04e2aef22898ef2fc3b74",
            "1e925d08cc755a011eb23fa0b67ff55f62d270658de5cf8dfd83982899c1f12e",
        ),
    ],
)  # fmt: skip
def test_names_ids_order_and_fingerprint_are_those_of_the_first_version(
    old: Path,
    paths: list[str],
    files: list[str],
    ids: list[str],
    shuffled: list[str],
    fingerprint: str,
    texts: str,
) -> None:
    assert names(*paths) == files
    documents = list(iter_documents(paths))
    assert [document.id for document in documents] == ids
    joined = "".join(f"{document.id}\0{document.text}\0" for document in documents)
    assert hashlib.sha256(joined.encode()).hexdigest() == texts
    assert [document.id for document in ShuffledDocuments(paths, seed=3)] == shuffled
    assert corpus_sha256(find_files(paths)) == fingerprint


def test_splits_and_stores_are_those_of_the_first_version(old: Path, tmp_path: Path) -> None:
    prepare_corpus(tmp_path / "out", ["."], vocab_size=280)
    manifest = json.loads((tmp_path / "out" / "corpus" / "manifest.json").read_text())
    assert {split: entry["sha256"][:16] for split, entry in manifest["splits"].items()} == {
        "train": "7b5f118e42688d20",
        "valid": "ee49d982ca2ed78a",
        "test": "a7aa76194e4789c0",
    }
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer.json")
    assert tokenizer.fingerprint[:16] == "3077c2cdfd977bf3"
    plan = plan_store(
        ["."],
        tokenizer,
        variant="tokens",
        block_size=64,
        patch_size=4,
        seed=5,
        parts=2,
        token_dtype="uint32",
    )
    meta = write_store(tmp_path / "store", ["."], tokenizer, plan, shard_bytes=1 << 16)
    # Of the fields that the first version wrote; meta.json names the begin and end token, too.
    fields = meta.to_dict()
    del fields["tokenizer"]["begin_token"], fields["tokenizer"]["end_token"]
    index = (tmp_path / "store" / "index.json").read_bytes()
    assert fingerprint(fields, index)[:16] == "439f0915d5ac0e92"

    ids = [f"document {i}" for i in range(4000)]
    digests = [
        hashlib.sha256(json.dumps(split_documents(ids, seed)).encode()).hexdigest()[:16]
        for seed in (0, 9)
    ]
    assert digests == ["abc28ea34703578a", "582ae13e325a3f38"]
    assert split_documents(["0", "1", "2"], 0) == {"train": [1], "valid": [2], "test": [0]}
    assert split_documents(list("0123"), 1) == {"train": [1, 2], "valid": [0], "test": [3]}
