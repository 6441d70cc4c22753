"""Counts the text that a tokenizer loses: characters without a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calm_dist.errors import shown

if TYPE_CHECKING:
    import tokenizers


@dataclass
class LostText:
    """Counts over all texts that a tokenizer has encoded."""

    unknown_token: str | None = None
    """The token that replaces text without a token, if there is one."""
    may_drop: bool = False
    """Whether text without a token can vanish from the tokens without a trace."""
    tokens: int = 0
    unknown: int = 0
    """Tokens that are the unknown token."""
    dropped: int = 0
    """Characters (for byte-level tokenizers: bytes) that gave no token."""
    special: int = 0
    """Begin and end tokens that the text itself produced."""

    def since(self, before: LostText) -> dict[str, int]:
        """What was counted after ``before``, a copy of the counts at that time."""
        return {
            "tokens": self.tokens - before.tokens,
            "unknown_tokens": self.unknown - before.unknown,
            "dropped_characters": self.dropped - before.dropped,
            "special_words": self.special - before.special,
        }

    def report(self) -> str | None:
        """A line on the lost text; None for a tokenizer that loses nothing."""
        parts = []
        if self.unknown_token is not None:
            share = self.unknown / max(1, self.tokens)
            parts.append(
                f"{self.unknown:,} of {self.tokens:,} tokens ({share:.2%}) are the unknown token "
                f"{shown(self.unknown_token)}"
            )
        if self.may_drop:
            parts.append(
                f"{self.dropped:,} characters were dropped: it has no token for them, and no "
                "unknown token"
            )
        if self.special:
            parts.append(f"{self.special:,} words of the text became its begin or end token")
        return "; ".join(parts) or None


class SymbolCounter:
    """Counts the characters that a BPE without an unknown token silently drops.

    The tokens consist of the text's known characters, so the number dropped is the length of the
    text, after normalizer and pre-tokenizer, minus the total length of the tokens.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lengths = {i: self._length(token) for token, i in tokenizer.get_vocab().items()}

    @staticmethod
    def needed(tokenizer: tokenizers.Tokenizer) -> bool:
        """Whether this tokenizer can drop characters at all."""
        from tokenizers import models, pre_tokenizers

        model = tokenizer.model
        if not isinstance(model, models.BPE) or model.unk_token is not None:
            return False
        if model.byte_fallback and all(
            model.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256)
        ):
            return False
        steps = [tokenizer.normalizer, tokenizer.pre_tokenizer]
        byte_level = any(step is not None and b"ByteLevel" in step.__getstate__() for step in steps)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        return not (byte_level and all(model.token_to_id(c) is not None for c in alphabet))

    def dropped(self, text: str, ids: Sequence[int]) -> int:
        """Characters of ``text`` that are in none of its tokens ``ids``."""
        normalizer, splitter = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        if normalizer is not None:
            text = normalizer.normalize_str(text)
        size = len(text)
        if splitter is not None:
            size = sum(len(piece) for piece, _ in splitter.pre_tokenize_str(text))
        return max(0, size - sum(map(self._lengths.__getitem__, ids)))

    def _length(self, token: str) -> int:
        model = self._tokenizer.model
        if model.byte_fallback and len(token) == 6 and token.startswith("<0x"):
            try:
                # Only the first byte of a character counts.
                return int(not 0x80 <= int(token[3:5], 16) < 0xC0)
            except ValueError:
                pass
        prefix, suffix = model.continuing_subword_prefix, model.end_of_word_suffix
        return len(token.removeprefix(prefix or "").removesuffix(suffix or ""))
