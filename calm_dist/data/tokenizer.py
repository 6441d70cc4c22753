"""Tokenizers: a BPE trained on the corpus, any Hugging Face ``tokenizer.json``, or a tiktoken-style
``tokenizer.model`` (Llama 3).

Text never turns into special tokens: a corpus that quotes ``<|end|>`` keeps it as plain characters.
"""

from __future__ import annotations

import base64
import binascii
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from calm_dist.errors import DataError
from calm_dist.files import file_sha256, replace_text

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"

# Names under which published tokenizers carry the three roles, ours and Llama 3's first.
_BEGIN_NAMES = (BEGIN, "<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>",
                "<｜begin▁of▁sentence｜>")  # fmt: skip
_END_NAMES = (END, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|endoftext|>",
              "<｜end▁of▁sentence｜>")  # fmt: skip
_PAD_NAMES = (PAD, "<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<｜▁pad▁｜>")

# 256 byte symbols and the three special tokens.
SMALLEST_VOCABULARY = 256 + 3

# Split pattern and special tokens of Llama 3 (llama-models, llama3/tokenizer.py).
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_NUM_SPECIAL = 256
_CHARACTER_BYTES = 4
"""Bytes of a character of UTF-8, at most."""
_LLAMA3_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)


class Tokenizer(ABC):
    """Text to token ids and back, with known begin, end and (where there is one) pad tokens.

    Attributes:
        path: the file that it was loaded from.
        fingerprint: sha256 of that file.
        vocab_size: largest id + 1, special tokens included.
        begin_id, end_id: the tokens around a document.
        pad_id: the padding token, or None.
    """

    def __init__(self, path: Path, vocab_size: int, special: Mapping[str, int]) -> None:
        self.path = path
        self.fingerprint = file_sha256(path)
        self.vocab_size = vocab_size
        self.begin_id = _required(path, "begin", _BEGIN_NAMES, special)
        self.end_id = _required(path, "end", _END_NAMES, special)
        self.pad_id = next((special[name] for name in _PAD_NAMES if name in special), None)

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without begin and end tokens."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens give nothing."""

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, without begin and end tokens."""
        return self.encode_batch([text])[0]

    def decode_continuation(self, prompt: str, ids: Sequence[int]) -> str:
        """Text of tokens that follow those of ``prompt``: ``prompt + text`` reads as one text.

        A decoder may treat the beginning of a text in a way of its own (Llama 2 and other
        SentencePiece-like ones strip its blank, WordPiece writes none), so that the new tokens
        cannot be decoded alone.
        """
        known, new = self.encode(prompt), list(ids)
        text = self.decode(new)
        # One that decodes bytes in groups may read the prompt's last bytes otherwise with more of
        # them behind; a shorter piece of the prompt, of at most one character, then serves.
        for length in (len(known), *range(_CHARACTER_BYTES, 0, -1)):
            before = self.decode(known[-length:]) if 0 < length <= len(known) else ""
            whole = self.decode(known[-length:] + new) if before else ""
            if before and whole.startswith(before):
                text = whole.removeprefix(before)
                break
        # The blank at the prompt's end may be no token, and would be there twice.
        if prompt[-1:].isspace() and known and not self.decode(known)[-1:].isspace():
            text = text.removeprefix(" ")
        return text


def _required(path: Path, role: str, names: Sequence[str], special: Mapping[str, int]) -> int:
    for name in names:
        if name in special:
            return special[name]
    raise DataError(
        f"tokenizer {path}: has no {role} token; documents are joined by one end token and begin "
        f"tokens, so add one of {', '.join(names)} to its special tokens"
    )


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a Hugging Face ``tokenizer.json`` or a tiktoken-style ``tokenizer.model``.

    A directory stands for the tokenizer file in it.

    Raises:
        DataError: the file is missing or damaged, of another kind, or lacks a begin or end token.
    """
    path = Path(path)
    if path.is_dir():
        inside = [path / name for name in ("tokenizer.json", "tokenizer.model")]
        path = next((file for file in inside if file.is_file()), inside[0])
    if not path.is_file():
        raise DataError(f"tokenizer {path}: no such file; give a tokenizer.json (Hugging Face) or "
                        "a tokenizer.model (tiktoken ranks, as Llama 3)")  # fmt: skip
    if path.suffix == ".json":
        return _HuggingFaceTokenizer(path)
    return _TiktokenTokenizer(path)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, path: str | Path, *, show_progress: bool = False
) -> Tokenizer:
    """Train a byte-level BPE and save it as a Hugging Face ``tokenizer.json``.

    The same texts in the same order give the same file. Where they hold too few distinct pairs,
    the vocabulary stays smaller than asked for.

    Args:
        texts: training text.
        vocab_size: entries, special tokens included; at least 259.
        path: file to write.
        show_progress: bars of the library's own on a terminal.

    Raises:
        DataError: ``vocab_size`` is too small, or the file cannot be written.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(
            f"vocabulary size {vocab_size}: must be at least {SMALLEST_VOCABULARY} "
            "(256 bytes and 3 special tokens)"
        )
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    bpe.train_from_iterator(texts, trainer)
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, bpe.to_str(pretty=True))
    except OSError as error:
        raise DataError(f"tokenizer {path}: cannot be written ({error.strerror})") from error
    return load_tokenizer(path)


class _HuggingFaceTokenizer(Tokenizer):
    def __init__(self, path: Path) -> None:
        self._tokenizer = _load_json(path)
        # Neither a template with begin and end tokens nor limits of length apply to a corpus.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        special = {token.content: i for i, token in added.items() if token.special}
        super().__init__(path, 1 + max(vocabulary.values(), default=-1), special)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


def _load_json(path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for a file it cannot read
        raise DataError(f"tokenizer {path}: is not a Hugging Face tokenizer.json ({error})") from (
            error
        )


class _TiktokenTokenizer(Tokenizer):
    """Byte-pair ranks in base64, one a line, with Llama 3's pattern and special tokens."""

    def __init__(self, path: Path) -> None:
        ranks = _load_ranks(path)
        num_reserved = _LLAMA3_NUM_SPECIAL - len(_LLAMA3_SPECIAL)
        reserved = [f"<|reserved_special_token_{2 + i}|>" for i in range(num_reserved)]
        special = {name: len(ranks) + i for i, name in enumerate([*_LLAMA3_SPECIAL, *reserved])}
        self._encoding = _tiktoken_encoding(path, ranks, special)
        self._num_text_ids = len(ranks)
        super().__init__(path, len(ranks) + _LLAMA3_NUM_SPECIAL, special)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode([int(i) for i in ids if i < self._num_text_ids])


def _load_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError(
                f"tokenizer {path}:{number}: is not a tiktoken rank (base64, space, number); "
                "SentencePiece models are not supported, convert them to tokenizer.json"
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise DataError(f"tokenizer {path}: its ranks are not 0 to n-1; the file is damaged")
    return ranks


def _tiktoken_encoding(
    path: Path, ranks: dict[bytes, int], special: dict[str, int]
) -> tiktoken.Encoding:
    try:
        import tiktoken
    except ImportError as error:
        raise DataError(
            f"tokenizer {path}: needs the package tiktoken; pip install tiktoken"
        ) from (error)
    return tiktoken.Encoding(
        "llama3", pat_str=_LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special
    )
