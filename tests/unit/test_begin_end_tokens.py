"""Tokenizers whose begin and end tokens have to be named, and those that lose text: from encoding
to generation, which all use the tokens of the store."""

from __future__ import annotations

import json
import runpy
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from launches import language_recipe
from tiny_models import tiny_model
from tokenizers import decoders, models, pre_tokenizers

from calm_dist.data.latents import finished_store, plan_store, read_meta, write_store
from calm_dist.data.store import fingerprint
from calm_dist.errors import CheckpointError, DataError, RecipeError
from calm_dist.evaluation.evaluate import check_store_fits
from calm_dist.inference.generate import token_names
from calm_dist.recipe import LanguageModelRecipe
from calm_dist.text.corpus import Document, pack_blocks
from calm_dist.text.prepare import prepare_corpus
from calm_dist.text.tokenizer import Tokenizer, load_tokenizer
from calm_dist.training.resolve import resolve

ROOT = Path(__file__).parents[2]
ALONE = "<|endoftext|>"
TRANSFORMER = ROOT / "recipes" / "transformer_tiny.yaml"


def byte_level(path: Path, *added: tuple[str, bool]) -> Path:
    """GPT-2's kind: bytes, and added tokens (name, whether marked as special)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    for name, special in added:
        token = tokenizers.AddedToken(name, special=special, normalized=False)
        (made.add_special_tokens if special else made.add_tokens)([token])
    made.save(str(path))
    return path


def plain(path: Path, model: models.Model, *special: str) -> Path:
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(list(special))
    made.save(str(path))
    return path


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    return byte_level(tmp_path / "tokenizer.json", (ALONE, True))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "corpus.jsonl"
    texts = [f"text {i} about the {i * i}" for i in range(90)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def write_tokens(corpus: Path, tokenizer: Tokenizer, out: Path) -> Path:
    plan = plan_store([corpus], tokenizer, variant="tokens", block_size=16, patch_size=4)
    write_store(out, [corpus], tokenizer, plan)
    return out


def as_of_an_earlier_version(store: Path) -> Path:
    """The same store with a meta.json that does not name the tokens."""
    meta = json.loads((store / "meta.json").read_text())
    del meta["tokenizer"]["begin_token"], meta["tokenizer"]["end_token"]
    meta["fingerprint"] = fingerprint(meta, (store / "index.json").read_bytes())
    (store / "meta.json").write_text(json.dumps(meta))
    return store


def transformer(store: Path, *overrides: str) -> LanguageModelRecipe:
    own = ["model.vocab_size=null", "data.block_size=null", f"data.path={store}"]
    return language_recipe(TRANSFORMER, [*own, *overrides])


def test_one_token_for_both_has_to_be_named(gpt2: Path) -> None:
    with pytest.raises(DataError, match=r"has no begin token.*are <\|endoftext\|>.*--begin-token"):
        load_tokenizer(gpt2)
    tokenizer = load_tokenizer(gpt2, begin_token=ALONE)
    assert tokenizer.begin_id == tokenizer.end_id == 256
    assert (tokenizer.begin_token, tokenizer.end_token) == (ALONE, ALONE)
    assert "1 to 4 of it stand" in (tokenizer.describe_filling(4) or "")
    text = f"a {ALONE} b"
    ids = tokenizer.encode(text)
    assert 256 not in ids
    assert tokenizer.decode([256, *ids, 256]) == text


def test_tokens_that_are_not_marked_as_special(tmp_path: Path) -> None:
    file = byte_level(tmp_path / "t.json", ("<s>", False), ("</s>", False))
    with pytest.raises(DataError, match=r"no special token, and <s> is not marked as special"):
        load_tokenizer(file)
    tokenizer = load_tokenizer(file, "<s>", "</s>")
    assert (tokenizer.begin_id, tokenizer.end_id, tokenizer.vocab_size) == (256, 257, 258)
    text = "<s>a</s>"
    ids = tokenizer.encode(text)
    assert not {256, 257} & set(ids)
    assert tokenizer.decode([256, *ids, 257]) == text
    # Plain entries of the model can be named, too.
    words = plain(tmp_path / "w.json", models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, "a"))
    tokenizer = load_tokenizer(words, "<s>", "</s>")
    assert tokenizer.encode("a a") == [2, 2] and tokenizer.decode([0, 2, 1]) == "a"


def test_names_that_are_not_there(gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no token '<\|endoftex\|>' to begin.*did you mean <\|endof"
    ):
        load_tokenizer(gpt2, begin_token="<|endoftex|>")
    many = byte_level(tmp_path / "many.json", *((f"<|{i:03}|>", True) for i in range(500)))
    for name in ("begin", "x" * 100_000):
        with pytest.raises(DataError, match="and 490 more") as error:
            load_tokenizer(many, name, name)
        assert len(str(error.value)) < 800
    with pytest.raises(DataError, match="and 490 more"):
        load_tokenizer(many)


def test_the_end_of_a_document_is_the_beginning_of_the_next(gpt2: Path) -> None:
    tokenizer = load_tokenizer(gpt2, ALONE, ALONE)
    documents = [Document(str(i), "x" * (1 + i % 7)) for i in range(300)]
    stream = np.concatenate(list(pack_blocks(documents, tokenizer, 8, 4, seed=3))).tolist()
    text = "".join("|" if token == 256 else "x" for token in stream)
    runs = Counter(map(len, filter(None, text.split("x"))))
    # As a prompt is filled in generation, and nothing else.
    assert text[0] == "|" and runs.keys() == {1, 2, 3, 4} and min(runs.values()) > 40


def test_the_store_says_which_tokens_and_all_use_them(
    gpt2: Path, corpus: Path, tmp_path: Path
) -> None:
    store = write_tokens(corpus, load_tokenizer(gpt2, ALONE, ALONE), tmp_path / "store")
    meta = read_meta(store)
    assert (meta.tokenizer.begin_token, meta.tokenizer.end_token) == (ALONE, ALONE)
    recipe = resolve(transformer(store))
    assert (recipe.data.begin_token, recipe.data.end_token) == (ALONE, ALONE)
    assert resolve(transformer(store, f"data.begin_token={ALONE}")) == recipe
    with pytest.raises(
        RecipeError, match=r"data.end_token: '<x>' in the recipe, '<\|endoftext\|>'"
    ):
        resolve(transformer(store, "data.end_token=<x>"))

    model = tiny_model("transformer")
    values = model.recipe.to_dict()
    values["data"] |= {"begin_token": ALONE, "end_token": ALONE}
    model = replace(model, recipe=LanguageModelRecipe.from_dict(values))
    assert token_names(model) == (ALONE, ALONE) == token_names(model, ALONE)
    with pytest.raises(CheckpointError, match=r"--end-token '</s>': .* was trained with"):
        token_names(model, end_token="</s>")
    other = meta.model_copy(
        update={"tokenizer": meta.tokenizer.model_copy(update={"begin_token": "<s>"}),
                "vocab_size": 1}
    )  # fmt: skip
    with pytest.raises(DataError, match=r"begin_token: <s> in the store, <\|endoftext\|> in"):
        check_store_fits(model, other)


def test_stores_of_earlier_versions(corpus: Path, tmp_path: Path) -> None:
    file = byte_level(tmp_path / "t.json", ("<s>", True), ("</s>", True))
    tokenizer = load_tokenizer(file)
    store = as_of_an_earlier_version(write_tokens(corpus, tokenizer, tmp_path / "old"))
    assert read_meta(store).tokenizer.begin_token is None
    assert resolve(transformer(store)).data.begin_token is None
    # Named all the same, they are looked up in the store's own tokenizer.
    assert resolve(transformer(store, "data.begin_token=<s>")).data.begin_token == "<s>"
    with pytest.raises(RecipeError, match=r"data.begin_token: '</s>' is token 257.*with token 256"):
        resolve(transformer(store, "data.begin_token=</s>"))
    # The same tokens make the same store; others do not.
    plan = plan_store([corpus], tokenizer, variant="tokens", block_size=16, patch_size=4)
    assert finished_store(store, plan) == read_meta(store)
    turned = load_tokenizer(file, "</s>", "<s>")
    plan = plan_store([corpus], turned, variant="tokens", block_size=16, patch_size=4)
    with pytest.raises(DataError, match="another tokenizer"):
        finished_store(store, plan)
    # Beside a store that names them, in one mixture.
    new = write_tokens(corpus, tokenizer, tmp_path / "new")
    for first, second in ((store, new), (new, store)):
        mixture = transformer(first, f"data.path=[{{path: {first}}}, {{path: {second}}}]")
        assert resolve(mixture).data.begin_token == "<s>"


def run_tool(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
    return int(ended.value.code or 0)


def test_command_lines(
    gpt2: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "data"
    prepare = ["--corpus", corpus, "--tokenizer", gpt2, "--out", out]
    assert run_tool(monkeypatch, "prepare_corpus.py", *prepare) == 2
    assert "name a token with --begin-token" in capfd.readouterr().err
    ends = ["--begin-token", ALONE, "--end-token", ALONE]
    for _ in range(2):
        assert run_tool(monkeypatch, "prepare_corpus.py", *prepare, *ends) == 0
    manifest = json.loads((out / "corpus" / "manifest.json").read_text())
    assert manifest["made_from"]["begin_token"] == ALONE
    assert run_tool(monkeypatch, "prepare_corpus.py", *prepare, "--begin-token", ALONE) == 2
    assert "end_token: <|endoftext|> there, None now" in capfd.readouterr().err

    encode = ["--corpus", out / "corpus" / "train.jsonl", "--tokenizer", out / "tokenizer.json"]
    encode += ["--variant", "tokens", "--patch-size", 4, "--block-size", 16, "--out", out / "store"]
    assert run_tool(monkeypatch, "encode_latents.py", *encode, *ends) == 0
    said = capfd.readouterr().out
    assert "'<|endoftext|>' begins and ends documents: 1 to 4 of it stand" in said
    assert "unknown" not in said and "dropped" not in said
    assert read_meta(out / "store").tokenizer.end_token == ALONE
    assert run_tool(monkeypatch, "encode_latents.py", *encode) == 2
    assert "has no begin token" in capfd.readouterr().err


def test_names_without_a_tokenizer_are_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="given with --tokenizer"):
        prepare_corpus(tmp_path / "out", [corpus], begin_token="<s>")


ENDS = ("<s>", "</s>")


@pytest.mark.parametrize(
    ("model", "text", "report"),
    [
        (models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]"), "a b a c", "2 of 4 tokens (50.00%)"),
        (models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"), "a b", "1 of 2 tokens"),
        (models.Unigram([("[UNK]", 0.0), ("a", -1.0)], 0), "a bb a", "1 of 3 tokens"),
        (models.BPE({"a": 0, "[UNK]": 1}, [], unk_token="[UNK]"), "aba", "1 of 3 tokens"),
        (
            models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]),
            "abxab yä",
            "3 characters were dropp",
        ),
        (models.BPE({"a": 0, "b": 1}, []), "ab", "0 characters were dropped"),
        (models.BPE({"a": 0, "<0x41>": 1}, [], byte_fallback=True), "aAbä", "2 characters were dr"),
        (
            models.BPE({"a": 0, "a</w>": 1, "b": 2}, [], end_of_word_suffix="</w>"),
            "aba cb",
            "2 characters were dropped",
        ),
        (
            models.WordLevel({"a": 0, "[UNK]": 1, "<s>": 2}, "[UNK]"),
            "a <s>",
            "1 words of the text became",
        ),
    ],
)
def test_lost_text_is_counted(model: models.Model, text: str, report: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(plain(tmp_path / "t.json", model, *ENDS))
    tokenizer.encode_batch([text])
    assert report in (tokenizer.lost.report() or "")
    if "[UNK]" in model.__getstate__().decode():
        assert "unknown token '[UNK]'" in (tokenizer.lost.report() or "")


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"a": 0}, "[UNK]"),
        models.WordPiece({"a": 0}, unk_token="[UNK]"),
        models.Unigram([("a", -1.0)], None),
        models.BPE({"a": 0}, [], unk_token="[UNK]"),
    ],
)
def test_text_that_no_token_stands_for_is_an_error(model: models.Model, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(plain(tmp_path / "t.json", model, *ENDS))
    assert tokenizer.encode("a") == [0] and tokenizer.lost.report() is None
    with pytest.raises(DataError, match=r"t.json: cannot encode a text; if it lacks an unknown"):
        tokenizer.encode_batch(["a", "b"])


def test_bytes_that_a_byte_level_tokenizer_lacks(tmp_path: Path) -> None:
    whole = byte_level(tmp_path / "whole.json", *((name, True) for name in ENDS))
    assert load_tokenizer(whole).lost.report() is None
    values = json.loads(whole.read_text())
    del values["model"]["vocab"]["Ã"]
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(values))
    tokenizer = load_tokenizer(broken)
    tokenizer.encode_batch(["a é", "ü a"])
    assert "2 characters were dropped" in (tokenizer.lost.report() or "")


def test_the_loss_is_reported_while_encoding(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    vocabulary = {"[UNK]": 0, "text": 1, "about": 2, "the": 3}
    file = plain(tmp_path / "t.json", models.WordLevel(vocabulary, "[UNK]"), *ENDS)
    arguments = ["--corpus", corpus, "--tokenizer", file, "--out", tmp_path / "store"]
    arguments += ["--variant", "tokens", "--patch-size", 4, "--block-size", 16]
    assert run_tool(monkeypatch, "encode_latents.py", *arguments) == 0
    said = capfd.readouterr().out
    assert "180 of 450 tokens (40.00%) are the unknown token '[UNK]'" in said
