"""A tokenizer.json in tiktoken gives the tokens of tokenizers, or is not used."""

from __future__ import annotations

import itertools
import random
import sysconfig
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers
from tokenizer_kinds import llama2_like, metaspace, wordpiece
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from calm_dist.text import tokenizer as tokenizer_module
from calm_dist.text.byte_pairs import FASTER, LLAMA3, byte_pairs_of
from calm_dist.text.tokenizer import load_tokenizer
from calm_dist.text.tokenizing import Piece, tokenized_ahead

ENDS = ("<s>", "</s>")
# Qwen's, which has no faster form here.
SINGLE_DIGITS = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
LIBRARY = [
    (Path(sysconfig.get_path("stdlib")) / name).read_text()
    for name in ("argparse.py", "turtle.py", "test/test_unicodedata.py")
    if (Path(sysconfig.get_path("stdlib")) / name).is_file()
]
TEXTS = [
    *LIBRARY,
    "naïve nai\u0308ve 数学 한국어 हिन्दी 👩‍👩‍👧‍👦  \u00a0x\u2028y 12345 I'LL 'ſ \r\n\r\n\t z  ",
    "<|call|> a<|call|> <s> </s>",
    "a" * 5000 + " " * 5000 + "b",
    "",
]


def split_by(pattern: str, **options: Any) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated", **options),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def trained(
    splitter: pre_tokenizers.PreTokenizer, size: int = 900, **options: Any
) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE(**options))
    made.pre_tokenizer = splitter
    made.decoder = decoders.ByteLevel()
    made.encode_special_tokens = True
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[*ENDS], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(LIBRARY[:1], trainer)
    return made


def expected(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    return [found.ids for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize("splitter", [GPT2, *map(split_by, (LLAMA3, SINGLE_DIGITS))])
@pytest.mark.parametrize("kind", ["plain", "NFC", "added", "ignore_merges"])
def test_tokens_are_equal(splitter: pre_tokenizers.PreTokenizer, kind: str) -> None:
    tokenizer = trained(splitter, ignore_merges=kind == "ignore_merges")
    if kind == "NFC":
        tokenizer.normalizer = normalizers.NFC()
    if kind == "added":
        tokenizer.add_tokens(["<|call|>"])
    pairs = byte_pairs_of(tokenizer)
    assert pairs is not None
    found = [pairs.encode(text) for text in TEXTS]
    wanted = expected(tokenizer, TEXTS)
    for text, ours, theirs in zip(TEXTS, found, wanted, strict=True):
        if kind == "added" and "<|call|>" in text:
            assert ours is None
        else:
            assert ours == theirs
    assert set(itertools.chain(*wanted)) - {tokenizer.token_to_id("<|call|>")} <= pairs.ids


@pytest.mark.parametrize("pattern", FASTER)
def test_the_faster_patterns_cut_texts_at_the_same_places(pattern: str) -> None:
    """With an entry for every string of up to four of these characters, tokens show the pieces."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for length in (2, 3, 4):
        for characters in itertools.product(b" \n\t\ra", repeat=length):
            ranks[bytes(characters)] = len(ranks)
    given, faster = (
        tiktoken.Encoding("test", pat_str=one, mergeable_ranks=ranks, special_tokens={})
        for one in (pattern, FASTER[pattern])
    )
    texts = ["".join(cut) for n in range(1, 7) for cut in itertools.product(" \n\ta'", repeat=n)]
    chance = random.Random(0)
    some = " \n\t\r\u00a0\u3000aZ1'sltvedmSL.,#é数\u2028"
    texts += ["".join(chance.choices(some, k=chance.randint(1, 12))) for _ in range(50_000)]
    for text in texts:
        assert faster.encode_ordinary(text) == given.encode_ordinary(text), repr(text)


def test_text_without_a_piece_is_kept() -> None:
    tokenizer = trained(split_by(r"[a-z]+| "))
    pairs = byte_pairs_of(tokenizer)
    assert pairs is not None
    assert [pairs.encode(text) for text in TEXTS] == expected(tokenizer, TEXTS)


def bpe(
    merges: list[tuple[str, str]], order: Callable[[list[str]], list[str]] = list, **options: Any
) -> tokenizers.Tokenizer:
    """All bytes, then the merges' entries in another order."""
    entries = [*pre_tokenizers.ByteLevel.alphabet(), *order([a + b for a, b in merges])]
    extra = options.pop("extra", [])
    vocabulary = {entry: number for number, entry in enumerate([*entries, *extra])}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges, **options))
    made.pre_tokenizer = split_by(LLAMA3)
    made.encode_special_tokens = True
    return made


MERGES = [("a", "b"), ("c", "d"), ("ab", "cd")]


def lazy(splitter: pre_tokenizers.PreTokenizer) -> Callable[[], tokenizers.Tokenizer]:
    return lambda: trained(splitter, 300)


@pytest.mark.parametrize(
    "make",
    [
        # "abc" becomes "ab" and "c", although there is an entry for all of it.
        lambda: bpe([("a", "b"), ("b", "c"), ("a", "bc")]),
        lambda: bpe(MERGES, lambda entries: entries[::-1]),
        lambda: bpe(MERGES, extra=["xyz"], ignore_merges=True),
        # " xyz" and "ét", in the characters that stand for their bytes.
        lambda: bpe(MERGES, extra=["Ġxyz"], ignore_merges=True),
        lambda: bpe(MERGES, extra=["Ã©t"], ignore_merges=True),
        # "▁" stands for no byte.
        lambda: bpe([*MERGES, ("▁", "a")], extra=["▁"]),
        lambda: bpe(MERGES, dropout=0.1),
        # {1,3}+ is one piece of any length to tokenizers, and one of three letters to tiktoken.
        lazy(split_by(r"\p{L}{1,3}+|\P{L}")),
        # Lines begin with ^ to tokenizers, and the text does to tiktoken; . may be a newline.
        lazy(split_by(r"^[a-z]+|[^\n]+|\n")),
        lazy(split_by(r"[a-z ]+$|[^$]|\$")),
        lazy(split_by(r"(?m:.)x|(?i)a|[\s\S]")),
        # Rust has no absence operator.
        lazy(split_by(r"(?~\n)|\n")),
        lazy(split_by(LLAMA3, invert=True)),
        lazy(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lazy(pre_tokenizers.Sequence([pre_tokenizers.Digits(), split_by(LLAMA3)])),
    ],
)
def test_what_may_differ_is_left_to_tokenizers(make: Callable[[], tokenizers.Tokenizer]) -> None:
    assert byte_pairs_of(make()) is None
    assert byte_pairs_of(bpe(MERGES)) is not None


def test_added_tokens_are_found_in_their_normalized_form() -> None:
    tokenizer = bpe(MERGES)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([tokenizers.AddedToken("e\u0301", normalized=True)])
    pairs = byte_pairs_of(tokenizer)
    assert pairs is not None and pairs.encode("ab") == expected(tokenizer, ["ab"])[0]
    for text in ("caf\u00e9", "cafe\u0301"):
        assert tokenizer.token_to_id("e\u0301") in expected(tokenizer, [text])[0]
        assert pairs.encode(text) is None


@pytest.mark.parametrize("kind", [llama2_like, metaspace, wordpiece])
def test_other_kinds_are_left_to_tokenizers(kind: Any, tmp_path: Path) -> None:
    made = kind(tmp_path / "tokenizer.json")
    assert byte_pairs_of(tokenizers.Tokenizer.from_file(str(made.path))) is None


def test_a_tokenizer_changes_to_tiktoken_after_some_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_module, "TIKTOKEN_AFTER_CHARACTERS", 1000)
    plain = trained(GPT2)
    plain.save(str(tmp_path / "tokenizer.json"))
    made: list[Any] = []
    original = byte_pairs_of

    def watched(tokenizer: tokenizers.Tokenizer) -> Any:
        made.append(original(tokenizer))
        return made[-1]

    monkeypatch.setattr(tokenizer_module, "byte_pairs_of", watched)
    tokenizer = load_tokenizer(tmp_path, *ENDS)
    assert tokenizer.encode_batch(["x" * 1000]) == expected(plain, ["x" * 1000]) and not made
    assert [tokenizer.encode_batch(TEXTS) for _ in range(2)] == [expected(plain, TEXTS)] * 2
    (pairs,) = made
    assert pairs is not None
    monkeypatch.setattr(pairs, "encode", lambda text: [7])
    assert tokenizer.encode("y") == [7]


def test_batches_are_tokenized_in_order_and_read_ahead(tmp_path: Path) -> None:
    trained(GPT2, 300).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path, *ENDS)
    # Released once the second batch has been read: with one batch at a time this would wait.
    second = threading.Event()
    tokens_of = tokenizer.tokens_of

    def waiting(texts: Any) -> list[list[int]]:
        assert second.wait(60)
        return tokens_of(texts)

    tokenizer.tokens_of = waiting  # type: ignore[method-assign]

    def batches() -> Iterator[list[Piece]]:
        for number in range(40):
            if number:
                second.set()
            yield [Piece(f"{number} {i}", None, True) for i in range(3)]
        raise OSError("the rest cannot be read")

    found = []
    with pytest.raises(OSError, match="the rest"):
        for batch, tokens in tokenized_ahead(batches(), tokenizer):
            assert tokens == tokens_of([piece.text for piece in batch])
            found.append(batch[0].text)
    assert found == [f"{number} 0" for number in range(40)]


@pytest.mark.full
@pytest.mark.parametrize("splitter", [GPT2, split_by(LLAMA3), split_by(SINGLE_DIGITS)])
def test_every_character_and_a_whole_library(splitter: pre_tokenizers.PreTokenizer) -> None:
    """All characters of Unicode, each in several surroundings, and all of Python's sources."""
    tokenizer = trained(splitter, 5000)
    pairs = byte_pairs_of(tokenizer)
    assert pairs is not None
    texts = [
        "".join(f"a{c} {c}1{c}{c}\n{c}'s  {c}" for c in map(chr, range(start, start + 1024)))
        for start in range(0, 0x110000, 1024)
        if not 0xD800 <= start < 0xE000
    ]
    for file in Path(sysconfig.get_path("stdlib")).glob("*.py"):
        texts.append(file.read_text(encoding="utf-8", errors="replace"))
    for start in range(0, len(texts), 64):
        some = texts[start : start + 64]
        assert [pairs.encode(text) for text in some] == expected(tokenizer, some)
