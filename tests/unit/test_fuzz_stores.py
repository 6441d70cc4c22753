"""Damaged stores, tokenizers, recipes and run files end in an error for users, or are read."""

from __future__ import annotations

import json
import random
import resource
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import chain, pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fuzz import json_mutations, mutations
from made_runs import H100, evaluation, make_run, training
from test_begin_end_tokens import ALONE, byte_level, plain
from test_tokenizer import write_ranks
from tokenizers import models

from calm_dist.cli.report_tool import report_runs
from calm_dist.data.latents import plan_store, write_store
from calm_dist.data.store import fingerprint, read_meta, read_shards
from calm_dist.data.stream import open_store
from calm_dist.errors import DataError, UserError
from calm_dist.files import file_sha256
from calm_dist.recipe import LARGEST_FILE, load_recipe
from calm_dist.runs.directory import FAILED, end_recorded
from calm_dist.runs.listing import DAMAGED, list_runs, table
from calm_dist.runs.metrics_file import read_records
from calm_dist.runs.records import read_run
from calm_dist.runs.wandb_id import wandb_id
from calm_dist.text.tokenizer import load_tokenizer, train_tokenizer
from calm_dist.training.resolve import resolve

ROOT = Path(__file__).parents[2]
TRANSFORMER = ROOT / "recipes" / "transformer_tiny.yaml"
# In all for a file, and the most that one reading may take on a busy machine.
SECONDS, FULL_SECONDS, LONGEST = 0.0, 240.0, 20.0
# Damages to a file, however long they take.
LEAST = 40
# That one reading may add, in MiB; a file of these tests has less than one.
MOST_MEMORY = 600


@pytest.fixture(params=[SECONDS, pytest.param(FULL_SECONDS, marks=pytest.mark.full)], ids=["", "l"])
def seconds(request: pytest.FixtureRequest) -> float:
    return request.param


def damaged_json(data: bytes) -> Iterable[bytes]:
    """Bytes and values in turn."""
    both = zip_longest(
        mutations(random.Random(0), data), json_mutations(random.Random(1), json.loads(data))
    )
    return chain.from_iterable(both)


def survive(
    file: Path, damage: Iterable[bytes], read: Callable[[], Any], seconds: float
) -> tuple[int, int]:
    """Read a file in many damaged forms; the numbers of those that were refused, and read.

    Anything but a `UserError` fails the test, and says with which bytes.
    """
    whole = file.read_bytes()
    end = time.monotonic() + seconds
    refused = done = 0
    for number, data in enumerate(damage):
        if number >= LEAST and time.monotonic() > end:
            break
        file.write_bytes(data)
        started, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            read()
            done += 1
        except UserError as error:
            refused += 1
            assert len(str(error)) < 20_000, data[:1000]
        except BaseException as error:
            kept = file.with_name("damaged")
            kept.write_bytes(data)
            raise AssertionError(f"{type(error).__name__}: {error} for {data[:300]!r}") from error
        assert time.monotonic() - started < LONGEST, data[:1000]
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
        assert grown < MOST_MEMORY << 10, (grown, data[:1000])
    file.write_bytes(whole)
    read()
    assert refused + done >= LEAST
    return refused, done


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of several shards."""
    root = tmp_path_factory.mktemp("store")
    corpus = root / "corpus.jsonl"
    texts = [f"{i} words of text " * (1 + i % 9) for i in range(60)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_tokenizer(texts, 265, root / "tokenizer.json")
    plan = plan_store([corpus], tokenizer, variant="tokens", block_size=16, patch_size=4)
    write_store(root / "store", [corpus], tokenizer, plan, shard_bytes=4096)
    return root / "store"


def read_store(path: Path) -> None:
    store = open_store(path)
    for index in (0, len(store) - 1):
        assert store[index]["tokens"].shape == (store.meta.block_size,)


def sign(store: Path, index: bytes, **changes: Any) -> None:
    """Write an index whose store has the fingerprint that belongs to it."""
    meta = json.loads((store / "meta.json").read_text()) | changes
    meta["fingerprint"] = fingerprint(meta, index)
    (store / "meta.json").write_text(json.dumps(meta))
    (store / "index.json").write_bytes(index)


def test_meta(made: Path, seconds: float) -> None:
    file = made / "meta.json"
    recipe = load_recipe(TRANSFORMER, [f"data.path={made}", "model.vocab_size=null",
                                       "data.block_size=null"])  # fmt: skip

    def read() -> None:
        # Plans read it without the index.
        resolve(recipe)
        read_store(made)

    survive(file, damaged_json(file.read_bytes()), read, seconds)


def test_index(made: Path, seconds: float) -> None:
    """The fingerprint is made to fit the damaged index."""
    file, meta = made / "index.json", made / "meta.json"
    whole = meta.read_bytes()

    def read() -> None:
        data = file.read_bytes()
        sign(made, data)
        try:
            read_store(made)
        finally:
            meta.write_bytes(whole)

    survive(file, damaged_json(file.read_bytes()), read, seconds)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index.update(more=1), "missing or unknown keys: more"),
        (lambda index: index["shards"][0].update({f"k{i}": i for i in range(99)}), "and 89 more"),
        (lambda index: index["shards"][0]["raw_data"].update(more=1), "raw_data has missing or"),
        (lambda index: index["shards"][0]["raw_data"]["hashes"].update(sha256=None), "sha256 None"),
        (lambda index: index["shards"][0]["raw_data"].update(hashes=None), "hashes is None"),
        (lambda index: index["shards"][0].update(samples=10**15), "1000000000000000 samples of 64"),
        (lambda index: index["shards"][0]["raw_data"].update(bytes=-1), "-1 bytes of"),
        (lambda index: index["shards"][0]["raw_data"].update(bytes=10**15), "0 bytes"),
        (lambda index: index["shards"][0].update(column_sizes=[-64]), r"column_sizes \[-64\]"),
        (lambda index: index["shards"][0].update(size_limit="x"), "size_limit 'x'"),
        (lambda index: index["shards"].append("x"), "shard is 'x' instead of an object"),
        (lambda index: index["shards"][0]["raw_data"].update(basename=3), "shard name 3"),
    ],
)
def test_what_an_index_may_not_say(
    made: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    whole = {name: (made / name).read_bytes() for name in ("index.json", "meta.json")}
    index = json.loads(whole["index.json"])
    change(index)
    sign(made, json.dumps(index).encode())
    try:
        with pytest.raises(DataError, match=rf"is not the index of a data store: .*{words}"):
            open_store(made)
    finally:
        for name, data in whole.items():
            (made / name).write_bytes(data)


def test_shards(made: Path, seconds: float) -> None:
    """With the hash that the damaged file has: the places in it may lead anywhere."""
    shard = made / "shard.00000.mds"
    whole = {name: (made / name).read_bytes() for name in ("index.json", "meta.json")}

    def read() -> None:
        index = json.loads(whole["index.json"])
        raw = index["shards"][0]["raw_data"]
        raw.update(bytes=shard.stat().st_size, hashes={"sha256": file_sha256(shard)})
        sign(made, json.dumps(index).encode())
        try:
            read_store(made)
        finally:
            for name, data in whole.items():
                (made / name).write_bytes(data)

    survive(shard, mutations(random.Random(0), shard.read_bytes()), read, seconds)


def test_places_of_samples(made: Path) -> None:
    shard = made / "shard.00000.mds"
    entry = read_shards(made, read_meta(made))[0]
    data = bytearray(shard.read_bytes())
    for place, value in ((0, 1), (4, 2**32 - 1), (8, 0), (4 * (entry.samples + 1), 7)):
        damaged = data.copy()
        damaged[place : place + 4] = np.array([value], "<u4").tobytes()
        shard.write_bytes(damaged)
        own = replace(entry, path=shard, sha256=file_sha256(shard))
        with pytest.raises(DataError, match="its samples are not at the expected offsets"):
            own.check()
    shard.write_bytes(data)
    entry.check()


def use_tokenizer(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    for text in ("some words", "Ünseen \x00 🙂\r\n", "", ALONE):
        tokenizer.decode([tokenizer.begin_id, *tokenizer.encode(text), tokenizer.end_id])
    tokenizer.lost.report()


@pytest.mark.parametrize("kind", ["bytes", "words", "unigram"])
def test_tokenizer_json(kind: str, tmp_path: Path, seconds: float) -> None:
    file = tmp_path / "tokenizer.json"
    if kind == "bytes":
        train_tokenizer(["some words", "of text"], 270, file)
    elif kind == "words":
        plain(file, models.WordLevel({"some": 0, "words": 1, "[UNK]": 2}, "[UNK]"), "<s>", "</s>")
    else:
        entries = [("[UNK]", 0.0), *((letter, -1.0) for letter in "somewrd")]
        plain(file, models.Unigram(entries, 0), "<s>", "</s>")
    survive(file, damaged_json(file.read_bytes()), lambda: use_tokenizer(file), seconds / 2)


def test_tokenizer_model(tmp_path: Path, seconds: float) -> None:
    file = write_ranks(tmp_path / "tokenizer.model")
    damage = mutations(random.Random(0), file.read_bytes())
    survive(file, damage, lambda: use_tokenizer(file), seconds)


def test_a_cut_tokenizer_model_is_refused(tmp_path: Path) -> None:
    file = write_ranks(tmp_path / "tokenizer.model")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:200]))
    with pytest.raises(
        DataError, match=r"no ranks for 56 of the 256 single bytes; the file is truncated"
    ):
        load_tokenizer(file)


def test_a_token_of_a_huge_number(tmp_path: Path) -> None:
    file = byte_level(tmp_path / "t.json", ("<s>", True), ("</s>", True))
    values = json.loads(file.read_text())
    values["model"]["vocab"]["A"] = 2**32 - 1
    file.write_text(json.dumps(values))
    with pytest.raises(DataError, match="its largest token id is 4,294,967,295"):
        load_tokenizer(file)


def test_recipe(tmp_path: Path, seconds: float) -> None:
    file = tmp_path / "recipe.yaml"
    recipe = load_recipe(TRANSFORMER)
    file.write_text(recipe.to_yaml())
    survive(
        file, mutations(random.Random(0), file.read_bytes()), lambda: load_recipe(file), seconds
    )
    # JSON is YAML, too.
    file.write_text(json.dumps(recipe.to_dict()))
    damage = json_mutations(random.Random(0), recipe.to_dict())
    survive(file, damage, lambda: load_recipe(file), seconds)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    records = [*(training(step) for step in (10, 20, 30)), evaluation(30, 4.5)]
    return make_run(tmp_path / "runs" / "calm", "calm", records, environment=dict(H100))


def read_run_files(run: Path, out: Path | None) -> None:
    """By all that reads them; ``out`` is for the plots, too, which take a second."""
    [row] = list_runs([run.parent])
    table([row])
    read_records(run)
    options = {"autoencoder": None, "peak_tflops": None, "inference": None, "json": None}
    report_runs(Namespace(runs=[run], out=out, **options))
    with end_recorded(run):
        pass


@pytest.mark.parametrize("name", ["metrics.jsonl", "environment.json", "recipe.yaml"])
def test_run_files(name: str, run: Path, tmp_path: Path, seconds: float) -> None:
    file = run / name
    out = tmp_path / "report" if seconds == FULL_SECONDS else None
    whole = file.read_bytes()
    damage: Iterable[bytes] = mutations(random.Random(0), whole)
    if name == "environment.json":
        damage = damaged_json(whole)
    elif name == "metrics.jsonl":
        first, last = whole.splitlines()[0], whole.splitlines()[-1]
        lines = chain.from_iterable(
            zip_longest(
                json_mutations(random.Random(1), json.loads(first)),
                json_mutations(random.Random(2), json.loads(last)),
            )
        )
        damage = chain.from_iterable(zip_longest(damage, (whole + line + b"\n" for line in lines)))
    else:
        values = yaml.safe_load(whole)
        damage = chain.from_iterable(zip_longest(damage, json_mutations(random.Random(1), values)))
    survive(file, damage, lambda: read_run_files(run, out), seconds)


def test_how_a_run_failed_is_told_although_its_environment_is_damaged(run: Path) -> None:
    for text in ("[]", "3", "[" * 100_000, "\udcff"):
        (run / "environment.json").write_text(text, errors="surrogateescape")
        with pytest.raises(DataError, match="the reason"), end_recorded(run):
            raise DataError("the reason")
    (run / "environment.json").write_text("{}")
    with pytest.raises(DataError, match="the reason"), end_recorded(run):
        raise DataError("the reason")
    assert json.loads((run / "environment.json").read_text())["ended"]["how"] == FAILED


def test_a_listed_recipe_may_not_grow_or_nest_without_end(run: Path) -> None:
    laughs = ["a: &a [x, x]", *(f"{b}: &{b} [*{a}, *{a}]" for a, b in pairwise("abcdefghijklmnop"))]
    huge = "x" * (LARGEST_FILE + 1)
    for text in ("\n".join(laughs), "[" * 100_000, "- " * 100_000, '{"a":' * 50_000, huge):
        (run / "recipe.yaml").write_text(text)
        [row] = list_runs([run])
        assert row["state"] == DAMAGED and row["reason"].startswith("recipe.yaml: is not a recipe")


@pytest.mark.parametrize("scores", [[0.1] * 3, [0.1] * 5, [], [0.1, None, 0.1, 0.1]])
def test_scores_of_another_number_of_n_grams_are_damage(run: Path, scores: list[Any]) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(evaluation(40, 5.0, brier=scores)) + "\n")
    read = read_run(run)
    assert "brier" not in read.last_evaluation and read.last_evaluation["brierlm"] == 5.0
    assert read.damage == ("Damaged lines in metrics.jsonl: 1; the damaged parts are left out.",)
    read_run_files(run, None)


def test_a_damaged_wandb_id_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "wandb_id"
    for text in (b"\xff\xfe", b"", b"a b\n", b"x" * 2000):
        file.write_bytes(text)
        new = wandb_id(tmp_path)
        assert len(new) == 8 and wandb_id(tmp_path) == new
