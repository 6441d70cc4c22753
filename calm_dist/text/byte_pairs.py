"""Runs the byte-level BPE of a ``tokenizer.json`` in tiktoken, which is several times faster.

tiktoken merges two adjacent tokens if their bytes together are an entry; tokenizers merges them if
that pair is in its list of merges. Both take the merge of the lowest rank, from the left. So they
agree on every text if, wherever tokenizers can reach two adjacent tokens that together are an
entry, the pair is in the list. That is the case if merging the bytes of each entry alone gives this
entry: no token has crossed the borders of the two, so their bytes were merged as they would be
alone, and there the next and only possible step makes the entry. `byte_pairs_of` checks this for
all entries, and compares the tokens of a sample for everything else: the pattern that splits a
text, and the versions of Unicode that the two libraries know.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Split pattern of Llama 3 (llama-models, llama3/tokenizer.py)."""

# The same pieces without backtracking: up to 1.3 times faster.
FASTER = {
    GPT2: r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    LLAMA3: (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+|"
        r" ?[^\s\p{L}\p{N}]++[\r\n]*+|\s*[\r\n]|\s++$|\s+(?!\S)|\s"
    ),
}

# Anchors and flags that Oniguruma, which tokenizers uses, and Rust's library take differently (^ is
# the start of a line or of the text), and that a sample may not tell apart.
_AMBIGUOUS = re.compile(r"(?<![\[\\])\^|(?<!\\)\$|\\[AGKZz]|\(\?[a-z-]*[msx]")

_SAMPLE_ENTRIES = 20_000
_HARD_TEXTS = (
    "I'm we'll they've 'S 'LL 'Re don''t 'ſ 'K '\u017f x's\u0301",
    "a  b   c\n\n\n d \r\n\r\n\te\t\t\tf \u00a0 g\u2028h\u2029 i\u0085j\u3000k\v\f\x1c\x1d ",
    "1 12 123 1234 12345678 ²³ ½ Ⅷ ٣٤٥ 一二三 1a2b a1 -5.7e-10 3,141",
    "naïve nai\u0308ve ﬁ Å \u212b 数学 ひらがな カタカナ 한국어 ไทย हिन्दी العربية עברית",
    "👩‍👩‍👧‍👦 🇩🇪 🙂\ufe0f \u200b\u200d\ufeff \x00\x01\x7f \ue000 \U000f0000 \U0010ffff \uffff",
    "def f(x):\n    return x**2  # ok\n\n\n\tif (a!=b)&&c{}[];:\"'`~@$%^&*_+=|\\<>/?…—“”\n ",
    " ", "  ", "\n", " \n ", "\r", "\t\n\t", "a ", " a", "'", "''s", " '", "1 ", "  1", "\n1",
    " \u00a0", "<|begin|> <|end|> <s> </s> [UNK] Ġ Ċ ĠĠ",
    "a" * 999, "aab" * 333, " " * 999, "\n" * 99 + "x", "=" * 999, "7" * 100, "\r\n" * 50,
)  # fmt: skip


class BytePairs:
    """A byte-level BPE in tiktoken.

    Attributes:
        ids: the tokens that text can become.
    """

    def __init__(
        self,
        encoding: tiktoken.Encoding,
        ids: frozenset[int],
        added: Sequence[str],
        normalize: Callable[[str], str] | None,
    ) -> None:
        """``added``: texts that tokenizers does not leave to its BPE."""
        self.ids = ids
        self._encode = encoding.encode_ordinary
        self._added = re.compile("|".join(map(re.escape, added))) if added else None
        self._normalize = normalize

    def encode(self, text: str) -> list[int] | None:
        """The tokens of a text; None if it has to be left to tokenizers."""
        if self._has_added(text):
            return None
        if self._normalize is not None and not text.isascii():
            text = self._normalize(text)
            if self._has_added(text):
                return None
        try:
            return self._encode(text)
        except MemoryError:
            raise
        except BaseException as error:
            # The backtracking of its patterns is limited. pyo3 does not export PanicException.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            return None

    def _has_added(self, text: str) -> bool:
        return self._added is not None and self._added.search(text) is not None


def byte_pairs_of(tokenizer: tokenizers.Tokenizer) -> BytePairs | None:
    """The same tokenizer in tiktoken, or None where equal tokens are not certain.

    Takes about two seconds of CPU for 128,000 entries.

    Args:
        tokenizer: with ``encode_special_tokens``; not changed.
    """
    values = json.loads(tokenizer.to_str())
    pattern, model = _pattern(values["pre_tokenizer"]), values["model"]
    normalizes = values["normalizer"] not in (None, {"type": "Sequence", "normalizers": []})
    if (
        pattern is None
        or (normalizes and values["normalizer"] != {"type": "NFC"})
        or model["type"] != "BPE"
        or model.get("dropout")
        or model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
        or model.get("byte_fallback")
    ):
        return None
    ranks = _ranks(model)
    if ranks is None or not _entries_merge_to_themselves(tokenizer, model, ranks):
        return None
    import tiktoken

    try:
        encoding = tiktoken.Encoding(
            "of_tokenizer_json", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )
    except ValueError:
        # The pattern is not one for Rust's library.
        return None
    added = [token["content"] for token in values["added_tokens"] if not token["special"]]
    normalize = tokenizer.normalizer.normalize_str if normalizes else None
    if normalize is not None:
        # Those marked as normalized are found in normalized text, in their normalized form.
        added += [normalize(content) for content in added]
    made = BytePairs(encoding, frozenset(ranks.values()), added, normalize)
    sample = list(_sample(ranks))
    expected = tokenizer.encode_batch_fast(sample, add_special_tokens=False)
    for text, encoded in zip(sample, expected, strict=True):
        found = made.encode(text)
        if found is not None and found != encoded.ids:
            return None
    return made


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """tiktoken's pattern for a pre-tokenizer that ends in bytes; None if it has none."""
    steps = [pre_tokenizer] if pre_tokenizer else []
    if pre_tokenizer and pre_tokenizer["type"] == "Sequence":
        steps = pre_tokenizer["pretokenizers"]
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    by_words = steps[-1].get("use_regex", True)
    if len(steps) == 1 and by_words:
        return FASTER[GPT2]
    if len(steps) != 2 or by_words or steps[0]["type"] != "Split":
        return None
    split = steps[0]
    if split["behavior"] != "Isolated" or split["invert"] or "Regex" not in split["pattern"]:
        return None
    given = split["pattern"]["Regex"]
    if _AMBIGUOUS.search(given):
        return None
    # tiktoken drops what no piece matches; tokenizers makes it a piece of its own.
    return FASTER.get(given) or f"(?:{given})|(?:(?!{given})[\\s\\S])+"


def _ranks(model: dict[str, Any]) -> dict[bytes, int] | None:
    """The id of each entry that merging can give, by its bytes.

    tiktoken takes ids for ranks. So None if the ids are not in the order of the merges, or if a
    byte has no entry. Several merges in a row may give one entry; only one of them is reachable.
    """
    vocabulary: dict[str, int] = model["vocab"]
    if not set(_alphabet()) <= vocabulary.keys():
        return None
    ranks = {bytes([byte]): vocabulary[character] for byte, character in enumerate(_alphabet())}
    last = -1
    for merge in model["merges"]:
        entry = "".join(merge if isinstance(merge, list) else merge.split(" "))
        number, merged = vocabulary[entry], _bytes_of(entry)
        if merged is None or number < last:
            return None
        ranks[merged] = last = number
    # Several entries with one id would make tiktoken panic.
    return ranks if len(set(ranks.values())) == len(ranks) else None


def _bytes_of(entry: str) -> bytes | None:
    """The bytes of an entry; None if it has a character that stands for none."""
    byte_of = _byte_of()
    if not byte_of.keys() >= set(entry):
        return None
    return bytes(map(byte_of.__getitem__, entry))


@cache
def _byte_of() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(_alphabet())}


def _alphabet() -> str:
    """The characters that stand for the bytes 0 to 255 in a byte-level ``tokenizer.json``."""
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
             *range(ord("®"), ord("ÿ") + 1)}  # fmt: skip
    others = (chr(256 + i) for i in range(256))
    return "".join(chr(byte) if byte in shown else next(others) for byte in range(256))


def _entries_merge_to_themselves(
    tokenizer: tokenizers.Tokenizer, model: dict[str, Any], ranks: dict[bytes, int]
) -> bool:
    """Whether the bytes of each entry, merged alone, give it; see the top of this module."""
    from tokenizers import models

    merges = [
        tuple(merge if isinstance(merge, list) else merge.split(" ")) for merge in model["merges"]
    ]
    # A plain one: `ignore_merges` of the original would take the entry without merging.
    plain = models.BPE(model["vocab"], merges)
    reached = set(ranks.values())
    for entry, number in model["vocab"].items():
        if number in reached:
            if [token.id for token in plain.tokenize(entry)] != [number]:
                return False
        elif model.get("ignore_merges") and (text := _text_of(entry)) is not None:
            # Text that is exactly this entry may become it.
            (encoded,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
            if number in encoded.ids:
                return False
    return True


def _text_of(entry: str) -> str | None:
    """The text that an entry stands for; None if it is a part of characters, which no piece is."""
    found = _bytes_of(entry)
    try:
        return None if found is None else found.decode()
    except UnicodeDecodeError:
        return None


def _sample(ranks: dict[bytes, int]) -> Iterator[str]:
    """Texts with what tells patterns and versions of Unicode apart, and with many entries."""
    yield from _HARD_TEXTS
    # Characters that Python's version of Unicode does not know yet, and a few of all others.
    places = chain(range(0xD800), range(0xE000, 0x32000))
    characters = [
        chr(place)
        for place in places
        if place % 64 == 0 or (place % 8 == 0 and unicodedata.category(chr(place)) == "Cn")
    ]
    for start in range(0, len(characters), 512):
        yield "".join(f"a{c} {c}1{c}{c}\n" for c in characters[start : start + 512])
    entries = list(ranks)
    step = max(1, len(entries) // _SAMPLE_ENTRIES)
    chosen = [entry.decode("utf-8", "replace") for entry in entries[::step]]
    for start in range(0, len(chosen), 512):
        for separator in ("", " "):
            yield separator.join(chosen[start : start + 512])
