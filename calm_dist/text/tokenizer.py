"""Tokenizers: a BPE trained on the corpus, any Hugging Face ``tokenizer.json``, or a tiktoken-style
``tokenizer.model`` (Llama 3).

Text never becomes special tokens: a ``<|end|>`` quoted in a corpus stays plain characters.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from calm_dist.errors import DataError, listed, shown
from calm_dist.files import file_sha256, replace_text
from calm_dist.text.byte_pairs import FASTER, LLAMA3, BytePairs, byte_pairs_of
from calm_dist.text.lost_text import LostText, SymbolCounter

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"

# Names of the three roles in published tokenizers, ours and Llama 3's first.
_BEGIN_NAMES = (BEGIN, "<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>",
                "<｜begin▁of▁sentence｜>")  # fmt: skip
_END_NAMES = (END, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|endoftext|>",
              "<｜end▁of▁sentence｜>")  # fmt: skip
_PAD_NAMES = (PAD, "<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<｜▁pad▁｜>")

# 256 byte symbols and the three special tokens.
SMALLEST_VOCABULARY = 256 + 3

# Special tokens of Llama 3 (llama-models, llama3/tokenizer.py).
_LLAMA3_NUM_SPECIAL = 256
_CHARACTER_BYTES = 4
"""Most bytes of a UTF-8 character."""
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


_NO_UNKNOWN_TOKEN = (
    "cannot encode a text; if it lacks an unknown token, give a tokenizer that has one, or a "
    "byte-level tokenizer"
)
TIKTOKEN_AFTER_CHARACTERS = 1 << 20
"""After so many characters a tokenizer.json is run by tiktoken, if both give the same tokens; the
check takes as long as encoding a few million characters."""

# More entries than any tokenizer has; a larger token id means a damaged file.
_MOST_ENTRIES = 1 << 24


class Tokenizer(ABC):
    """Text to token ids and back, with known begin, end and (if any) pad tokens.

    Attributes:
        path: the file it was loaded from.
        fingerprint: sha256 of that file.
        vocab_size: largest id + 1, special tokens included.
        begin_token, end_token: the tokens around a document; may be the same.
        begin_id, end_id: their ids.
        pad_token, pad_id: the padding token and its id, or None.
        lost: counts the text lost in encoding.
    """

    def __init__(
        self,
        path: Path,
        vocab_size: int,
        special: Mapping[str, int],
        entries: Mapping[str, int],
        begin_token: str | int | None,
        end_token: str | int | None,
    ) -> None:
        """``special``: tokens that text never becomes; ``entries``: all tokens that may be named
        as begin or end token."""
        of_number = {number: name for name, number in special.items()}
        if isinstance(begin_token, int):
            begin_token = of_number.get(begin_token)
        if isinstance(end_token, int):
            end_token = of_number.get(end_token)
        if vocab_size > _MOST_ENTRIES:
            raise DataError(
                f"tokenizer {path}: its largest token id is {vocab_size - 1:,}; the file is damaged"
            )
        self.path = path
        self.fingerprint = file_sha256(path)
        self.vocab_size = vocab_size
        self.begin_token = begin_token or _own(path, "begin", _BEGIN_NAMES, special, entries)
        self.end_token = end_token or _own(path, "end", _END_NAMES, special, entries)
        self.begin_id = _number(path, "begin", self.begin_token, special, entries)
        self.end_id = _number(path, "end", self.end_token, special, entries)
        self.pad_token = next((name for name in _PAD_NAMES if name in special), None)
        self.pad_id = None if self.pad_token is None else special[self.pad_token]
        self.lost = LostText()

    @abstractmethod
    def tokens_of(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without begin and end tokens; threads may call this at once.

        Raises:
            DataError: it has neither a token for some text nor an unknown token.
        """

    def count(self, texts: Sequence[str], batch: Sequence[list[int]]) -> None:
        """Add the tokens of some texts, and the text they lose, to `lost`."""
        self.lost.tokens += sum(map(len, batch))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, as `tokens_of` gives them; `lost` counts the text they lose."""
        batch = self.tokens_of(texts)
        self.count(texts, batch)
        return batch

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens are skipped."""

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, without begin and end tokens."""
        return self.encode_batch([text])[0]

    def decode_continuation(
        self, prompt: str, ids: Sequence[int], known: Sequence[int] | None = None
    ) -> str:
        """Text of the tokens that follow those of ``prompt``: ``prompt + text`` reads as one text.

        Args:
            known: the tokens of ``prompt``, if they are known.
        """
        known = self.encode(prompt) if known is None else known
        text = self.decode_after(known, ids)
        # A blank at the end of the prompt may have no token and would appear twice.
        if prompt[-1:].isspace() and known and not self.decode(known)[-1:].isspace():
            text = text.removeprefix(" ")
        return text

    def decode_after(self, known: Sequence[int], ids: Sequence[int]) -> str:
        """Text of the tokens ``ids`` that follow the tokens ``known``.

        The new tokens cannot be decoded alone, because a decoder may treat the beginning of a text
        specially (Llama 2 and other SentencePiece-like decoders strip its blank, WordPiece writes
        none).
        """
        known, new = list(known), list(ids)
        text = self.decode(new)
        # A decoder of byte groups may decode the prompt's last bytes differently if more bytes
        # follow; then try shorter pieces of the prompt, of at most one character.
        for length in (len(known), *range(_CHARACTER_BYTES, 0, -1)):
            before = self.decode(known[-length:]) if 0 < length <= len(known) else ""
            whole = self.decode(known[-length:] + new) if before else ""
            if before and whole.startswith(before):
                text = whole.removeprefix(before)
                break
        return text

    def describe_filling(self, patch_size: int) -> str | None:
        """How patches are filled if one token both begins and ends documents; otherwise None."""
        if self.begin_id != self.end_id:
            return None
        return (
            f"{shown(self.begin_token)} begins and ends documents: 1 to {patch_size} of it stand "
            "between two documents, and fill each prompt up to whole patches"
        )


def _own(
    path: Path, role: str, names: Sequence[str], special: Mapping[str, int], entries: Iterable[str]
) -> str:
    """The special token that has this role in published tokenizers."""
    for name in names:
        if name in special:
            return name
    unmarked = [name for name in names if name in entries]
    found = f"its special tokens are {listed(special)}" if special else "it has no special token"
    if unmarked:
        found += f", and {listed(unmarked)} is not marked as special"
    raise DataError(
        f"tokenizer {path}: has no {role} token, such as {', '.join(names)}; {found}. Documents "
        f"are joined by one end token and begin tokens: name a token with --{role}-token (in "
        f"recipes data.{role}_token); the same token may do both"
    )


def _number(
    path: Path, role: str, name: str, special: Mapping[str, int], entries: Mapping[str, int]
) -> int:
    if name in entries:
        return entries[name]
    likely = [entry for entry in entries if entry in special or entry.startswith(("<", "["))]
    near = difflib.get_close_matches(name[:100], likely, n=3)
    hint = f"did you mean {listed(near)}?" if near else f"its special tokens are {listed(special)}"
    raise DataError(f"tokenizer {path}: has no token {shown(name)} to {role} documents; {hint}")


def load_tokenizer(
    path: str | Path, begin_token: str | int | None = None, end_token: str | int | None = None
) -> Tokenizer:
    """Load a Hugging Face ``tokenizer.json`` or a tiktoken-style ``tokenizer.model``.

    Args:
        path: the file, or a directory that holds it.
        begin_token, end_token: names of the tokens around a document, marked as special or not;
            or numbers, which count only if they are those of special tokens, since configurations
            may state a default. None: the special tokens that have these roles in published
            tokenizers.

    Raises:
        DataError: the file is missing, damaged, of another kind, or lacks a begin or end token.
    """
    path = Path(path)
    if path.is_dir():
        inside = [path / name for name in ("tokenizer.json", "tokenizer.model")]
        path = next((file for file in inside if file.is_file()), inside[0])
    if not path.is_file():
        raise DataError(f"tokenizer {path}: no such file; give a tokenizer.json (Hugging Face) or "
                        "a tokenizer.model (tiktoken ranks, as Llama 3)")  # fmt: skip
    if path.suffix == ".json":
        return _HuggingFaceTokenizer(path, begin_token, end_token)
    return _TiktokenTokenizer(path, begin_token, end_token)


@contextmanager
def _library_errors(path: Path, problem: str) -> Iterator[None]:
    """Turn exceptions of tokenizers and tiktoken, and Rust panics, into a DataError."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except BaseException as error:
        # pyo3 derives PanicException from BaseException and does not export it.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error)[:300]
        raise DataError(f"tokenizer {path}: {problem} ({reason})") from error


def check_vocab_size(vocab_size: int) -> None:
    """Refuse a vocabulary that is too small to train; raises DataError."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(
            f"vocabulary size {vocab_size}: must be at least {SMALLEST_VOCABULARY} "
            "(256 bytes and 3 special tokens)"
        )


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, path: str | Path, *, show_progress: bool = False
) -> Tokenizer:
    """Train a byte-level BPE and save it as a Hugging Face ``tokenizer.json``.

    The same texts in the same order give the same file. If they hold too few distinct pairs, the
    vocabulary is smaller than requested.

    Args:
        texts: training text.
        vocab_size: entries, special tokens included; at least 259.
        path: file to write.
        show_progress: show the library's own bars on a terminal.

    Raises:
        DataError: ``vocab_size`` is too small, or the file cannot be written.
    """
    check_vocab_size(vocab_size)
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
    def __init__(
        self, path: Path, begin_token: str | int | None, end_token: str | int | None
    ) -> None:
        import tokenizers

        with _library_errors(path, "is not a Hugging Face tokenizer.json"):
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
            # Templates with begin and end tokens and length limits do not apply to a corpus.
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self._tokenizer.encode_special_tokens = True
            entries = self._tokenizer.get_vocab(with_added_tokens=True)
            added = self._tokenizer.get_added_tokens_decoder()
        special = {token.content: i for i, token in added.items() if token.special}
        size = 1 + max(entries.values(), default=-1)
        super().__init__(path, size, special, entries, begin_token, end_token)
        with _library_errors(path, "cannot be used"):
            # They may be plain entries of the file, but text must not become these tokens.
            self._tokenizer.add_special_tokens(
                [
                    tokenizers.AddedToken(name, special=True, normalized=False)
                    for name in {self.begin_token, self.end_token} - special.keys()
                ]
            )
            may_drop = SymbolCounter.needed(self._tokenizer)
            self._symbols = SymbolCounter(self._tokenizer) if may_drop else None
        unknown = _unknown_token(self._tokenizer)
        self._unknown_id = None if unknown is None else entries.get(unknown)
        self._pairs: BytePairs | None = None
        self._characters_left = TIKTOKEN_AFTER_CHARACTERS
        self._starting = threading.Lock()
        self.lost = LostText(None if self._unknown_id is None else unknown, may_drop)

    def count(self, texts: Sequence[str], batch: Sequence[list[int]]) -> None:
        super().count(texts, batch)
        own = {self.begin_id, self.end_id} - {self._unknown_id}
        if self._pairs is not None:
            own &= self._pairs.ids
        for text, ids in zip(texts, batch, strict=True):
            self.lost.special += sum(map(ids.count, own))
            if self._unknown_id is not None:
                self.lost.unknown += ids.count(self._unknown_id)
            if self._symbols is not None:
                self.lost.dropped += self._symbols.dropped(text, ids)

    def tokens_of(self, texts: Sequence[str]) -> list[list[int]]:
        pairs = self._pairs_for(sum(map(len, texts)))
        batch = [None if pairs is None else pairs.encode(text) for text in texts]
        others = [text for text, ids in zip(texts, batch, strict=True) if ids is None]
        if others:
            with _library_errors(self.path, _NO_UNKNOWN_TOKEN):
                encodings = self._tokenizer.encode_batch_fast(others, add_special_tokens=False)
                found = iter([encoding.ids for encoding in encodings])
            batch = [next(found) if ids is None else ids for ids in batch]
        return [ids for ids in batch if ids is not None]

    def _pairs_for(self, characters: int) -> BytePairs | None:
        """The same tokenizer in tiktoken, if there is one and it is worth its start-up."""
        if self._characters_left >= 0:
            with self._starting:
                left = self._characters_left
                self._characters_left = left - characters
            if left >= 0 > left - characters:
                # In this thread; others go on without it meanwhile.
                self._pairs = byte_pairs_of(self._tokenizer)
        return self._pairs

    def decode(self, ids: Sequence[int]) -> str:
        with _library_errors(self.path, "cannot decode"):
            return self._tokenizer.decode(list(ids), skip_special_tokens=True)


def _unknown_token(tokenizer: tokenizers.Tokenizer) -> str | None:
    """The name of the token for unknown text, which need not be one of the model's entries."""
    from tokenizers import models

    if not isinstance(tokenizer.model, models.Unigram):
        return tokenizer.model.unk_token
    # Only its serialized form holds the name (tokenizers 0.22).
    model = json.loads(tokenizer.model.__getstate__())
    return None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]


class _TiktokenTokenizer(Tokenizer):
    """Byte-pair ranks in base64, one per line, with Llama 3's pattern and special tokens."""

    def __init__(
        self, path: Path, begin_token: str | int | None, end_token: str | int | None
    ) -> None:
        ranks = _load_ranks(path)
        num_reserved = _LLAMA3_NUM_SPECIAL - len(_LLAMA3_SPECIAL)
        reserved = [f"<|reserved_special_token_{2 + i}|>" for i in range(num_reserved)]
        special = {name: len(ranks) + i for i, name in enumerate([*_LLAMA3_SPECIAL, *reserved])}
        with _library_errors(path, "is not a file of tiktoken ranks"):
            self._encoding = _tiktoken_encoding(path, ranks, special)
        self._num_text_ids = len(ranks)
        size = len(ranks) + _LLAMA3_NUM_SPECIAL
        super().__init__(path, size, special, special, begin_token, end_token)

    def tokens_of(self, texts: Sequence[str]) -> list[list[int]]:
        with _library_errors(self.path, "cannot encode a text"):
            return [self._encoding.encode_ordinary(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        with _library_errors(self.path, "cannot decode"):
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
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or b"" in ranks:
        # tiktoken would panic at the first text that needs one.
        raise DataError(
            f"tokenizer {path}: has no ranks for {len(missing)} of the 256 single bytes; the file "
            "is truncated or damaged"
        )
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
        "llama3", pat_str=FASTER[LLAMA3], mergeable_ranks=ranks, special_tokens=special
    )
