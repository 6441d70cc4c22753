"""Small tokenizers of the kinds that published models come with."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from calm_dist.text.tokenizer import Tokenizer, load_tokenizer

_WORDS = ("▁The", "▁sea", "▁is", "▁the")


def llama2_like(path: Path) -> Tokenizer:
    """As Llama 2's: a blank is put before the text, spaces are ▁, characters that the vocabulary
    lacks become bytes; the decoder strips the first blank."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    merges = []
    for word in _WORDS:
        for end in range(1, len(word) + 1):
            vocabulary.setdefault(word[end - 1], len(vocabulary))
            vocabulary.setdefault(word[:end], len(vocabulary))
            if end > 1 and (word[: end - 1], word[end - 1]) not in merges:
                merges.append((word[: end - 1], word[end - 1]))
    made = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["<s>", "</s>"])
    return _saved(made, path)


def metaspace(path: Path) -> Tokenizer:
    """As T5's or newer Llama-like ones: pre-tokenizer and decoder are Metaspace."""
    names = ["<s>", "</s>", *_WORDS, *"▁abcdefghijklmnopqrstuvwxyzT."]
    vocabulary = {name: number for number, name in enumerate(names)}
    merges = [(word[:end], word[end]) for word in _WORDS for end in range(1, len(word))]
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    made = tokenizers.Tokenizer(models.BPE(vocabulary, list(dict.fromkeys(merges))))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    made.add_special_tokens(["<s>", "</s>"])
    return _saved(made, path)


def wordpiece(path: Path) -> Tokenizer:
    """As BERT's: lower case, words continued with ##, spaces that are no tokens."""
    names = ["[UNK]", "[BOS]", "[EOS]", "the", "sea", "is", "un", "##aff", "##able", "."]
    vocabulary = {name: number for number, name in enumerate(names)}
    made = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.add_special_tokens(["[UNK]", "[BOS]", "[EOS]"])
    return _saved(made, path)


def ids_of(tokenizer: Tokenizer, *names: str) -> list[int]:
    """Numbers of entries of a tokenizer.json."""
    known = tokenizers.Tokenizer.from_file(str(tokenizer.path)).get_vocab()
    return [known[name] for name in names]


def _saved(made: tokenizers.Tokenizer, path: Path) -> Tokenizer:
    made.save(str(path))
    return load_tokenizer(path)
