"""Tokenizers: round trips, special tokens, fingerprints and the faults of files."""

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizer_kinds import ids_of, llama2_like, metaspace, wordpiece

from calm_dist.errors import DataError
from calm_dist.text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

TEXTS = ["def main():\n    return 'naïve'\n", "the cat sat on the mat. " * 20, "数 <|end|> x"]


@pytest.fixture
def trained(tmp_path: Path) -> Tokenizer:
    return train_tokenizer(TEXTS, 300, tmp_path / "tokenizer.json")


def write_ranks(path: Path) -> Path:
    """A tiktoken file: all bytes, then two merges."""
    tokens = [bytes([i]) for i in range(256)] + [b"th", b"the"]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_trained_tokenizer_round_trips_every_text(trained: Tokenizer) -> None:
    assert trained.vocab_size == 300
    unseen = "Ünseen \x00 text 🙂\r\n\ttab"
    for text in [*TEXTS, unseen]:
        assert trained.decode(trained.encode(text)) == text
    assert trained.encode_batch(TEXTS) == [trained.encode(text) for text in TEXTS]


CASES = {
    "llama2_like": [
        ("The sea", "▁is ▁the ▁sea", " is the sea"),
        ("The sea", "▁i s", " is"),
        ("The s", "e a", "ea"),
        ("The sea ", "i s", "is"),
        ("", "▁The ▁sea", "The sea"),
        # Characters of several bytes, whole and split between the prompt's and the new tokens.
        ("The é", "▁is", " is"),
        ("é", "<0xC3> <0xA9>", "é"),
        ("The sea", "<0xF0> <0x9F> <0x99> <0x82>", "🙂"),
        ("The é", "<0x80>", "\N{REPLACEMENT CHARACTER}"),
        ("The é", "<0x80> ▁sea", "\N{REPLACEMENT CHARACTER} sea"),
    ],
    "metaspace": [
        ("The sea", "▁is ▁the ▁sea", " is the sea"),
        ("The s", "e a", "ea"),
        ("", "▁The ▁sea", "The sea"),
        ("The sea", "▁ a", " a"),
    ],
    "wordpiece": [
        ("The Sea", "is the sea .", " is the sea."),
        ("un", "##aff ##able .", "affable."),
        ("the sea", ".", "."),
        # The blank of the prompt is no token, and is not there twice.
        ("The sea ", "is", "is"),
        ("", "the sea", "the sea"),
        (" ", "the sea", "the sea"),
    ],
}


@pytest.mark.parametrize("kind", [llama2_like, metaspace, wordpiece])
def test_prompt_and_continuation_read_as_one_text(
    kind: Callable[[Path], Tokenizer], tmp_path: Path
) -> None:
    tokenizer = kind(tmp_path / "tokenizer.json")
    for prompt, names, expected in CASES[kind.__name__]:
        new = ids_of(tokenizer, *names.split())
        assert tokenizer.decode_continuation(prompt, new) == expected, (prompt, names)
        # Begin tokens, with which prompts are filled, give no text in any of them.
        whole = [tokenizer.begin_id, tokenizer.begin_id, *tokenizer.encode(prompt), *new]
        assert tokenizer.decode(whole) == tokenizer.decode([*tokenizer.encode(prompt), *new])


def test_byte_level_continuations(trained: Tokenizer, tmp_path: Path) -> None:
    """Text is cut at every token, also within characters of several bytes."""
    for tokenizer in (trained, load_tokenizer(write_ranks(tmp_path / "tokenizer.model"))):
        for text in ("naïve 数 🙂 the cat", " the", "x\n\n y"):
            assert tokenizer.decode_continuation("", tokenizer.encode(text)) == text
            for cut in range(len(text)):
                new = tokenizer.encode(text[cut:])
                assert text[:cut] + tokenizer.decode_continuation(text[:cut], new) == text


def test_special_names_in_text_stay_text(trained: Tokenizer) -> None:
    ids = trained.encode("a <|end|> b <|begin|>")
    assert not {trained.begin_id, trained.end_id, trained.pad_id} & set(ids)
    assert trained.decode([trained.begin_id, *trained.encode("x"), trained.end_id]) == "x"


def test_training_is_deterministic_and_fingerprint_is_the_files_hash(
    trained: Tokenizer, tmp_path: Path
) -> None:
    again = train_tokenizer(TEXTS, 300, tmp_path / "again.json")
    assert again.fingerprint == trained.fingerprint
    assert trained.fingerprint == hashlib.sha256(trained.path.read_bytes()).hexdigest()
    assert load_tokenizer(tmp_path).encode("the cat") == trained.encode("the cat")


def test_too_small_a_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"vocabulary size 100.*259"):
        train_tokenizer(TEXTS, 100, tmp_path / "tokenizer.json")


def test_tiktoken_file_has_llama_3_ids(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_ranks(tmp_path / "tokenizer.model"))
    # Llama 3's own file has 128,000 ranks: begin 128000, end 128001, pad 128004, 128,256 in all.
    assert (tokenizer.begin_id, tokenizer.end_id, tokenizer.pad_id) == (258, 259, 262)
    assert tokenizer.vocab_size == 258 + 256
    assert tokenizer.encode("the th") == [257, 32, 256]
    text = "the naïve <|end_of_text|> 12345\n\n  x"
    ids = tokenizer.encode(text)
    assert tokenizer.end_id not in ids
    assert tokenizer.decode([tokenizer.begin_id, *ids, tokenizer.end_id]) == text


def test_template_of_a_published_tokenizer_is_not_applied(
    trained: Tokenizer, tmp_path: Path
) -> None:
    spec = json.loads(trained.path.read_text())
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|begin|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [0], "tokens": ["<|begin|>"]}},
    }
    spec["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst",
                          "stride": 0}  # fmt: skip
    other = tmp_path / "other.json"
    other.write_text(json.dumps(spec))
    assert load_tokenizer(other).encode("the cat sat") == trained.encode("the cat sat")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.json", None, "no such file"),
        ("bad.json", "{]", "not a Hugging Face tokenizer.json"),
        ("bad.model", "AAA= 0\n%% 1\n", r"bad.model:2: is not a tiktoken rank"),
        ("holes.model", "AA== 0\nAQ== 2\n", "ranks are not 0 to n-1"),
        ("empty.model", "", "ranks are not 0 to n-1"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path / name)


def test_tokenizer_without_begin_token_tells_what_to_add(
    trained: Tokenizer, tmp_path: Path
) -> None:
    other = tmp_path / "other.json"
    other.write_text(trained.path.read_text().replace("<|begin|>", "<|start|>"))
    with pytest.raises(
        DataError, match=r"has no begin token.*special tokens are <\|start\|>.*--begin-token"
    ):
        load_tokenizer(other)
