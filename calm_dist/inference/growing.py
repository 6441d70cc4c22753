"""Texts that grow token by token: where they stop, and their text as far as it is settled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from calm_dist.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are not a character, or not yet a whole one."""
_LONGEST_PENDING = 64
"""Tokens to wait for the rest of a character; a model that writes text needs 4 at most."""
_TAIL = 16
"""Tokens before the new ones that a decoder needs, to see what it writes between them."""


class GrowingString:
    """The text of a continuation, decoded while its tokens arrive; each costs the same.

    Args:
        tokenizer: decodes the tokens.
        prompt: the text before, and ``known``, its tokens.
        stop: strings that end the text.
        show: called with each piece of text once no later token can change or cut it. (Some
            decoders show all of a row of bytes as replacement characters if one of them is wrong:
            what was shown of such a row before stays.)
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: str,
        known: Sequence[int],
        stop: Sequence[str] = (),
        show: Callable[[str], None] | None = None,
    ) -> None:
        self._tokenizer, self._prompt, self._stop, self._show = tokenizer, prompt, stop, show
        self._known = list(known)
        self._settled = ""
        self._pending: list[int] = []
        self._begun = False
        self._shown = 0

    def add(self, token: int) -> bool:
        """Add a token; returns whether the text now contains a stop string."""
        self._pending.append(token)
        if self._begun:
            piece = self._tokenizer.decode_after(self._known, self._pending)
        else:
            piece = self._tokenizer.decode_continuation(self._prompt, self._pending, self._known)
        text = self._settled + piece
        # A new stop string ends in the piece.
        longest = max(map(len, self._stop), default=0)
        recent = text[max(0, len(self._settled) - longest) :]
        if any(string in recent for string in self._stop):
            return True
        if not piece.endswith(_REPLACEMENT) or len(self._pending) >= _LONGEST_PENDING:
            self._begun = self._begun or piece != ""
            self._settled = text
            self._known = (self._known + self._pending)[-_TAIL:] if self._begun else self._known
            self._pending = [] if self._begun else self._pending
        return False

    def show_settled(self) -> None:
        """Show what is settled and cannot be the beginning of a stop string."""
        if self._show is None:
            return
        text = self._settled if self._begun else ""
        end = len(text)
        for string in self._stop:
            for length in range(1, len(string)):
                if text.endswith(string[:length]):
                    end = min(end, len(text) - length)
        if end > self._shown:
            self._show(text[self._shown : end])
            self._shown = end

    def finish(self, text: str) -> None:
        """Show the rest of the whole text."""
        if self._show is not None and len(text) > self._shown:
            self._show(text[self._shown :])


@dataclass
class GrowingText:
    """A prompt and its continuation so far."""

    prompt: list[int]
    seed: int
    string: GrowingString | None = None
    """Its text, if it is looked at before it has ended."""
    new: list[int] = field(default_factory=list)
    stopped_by: Literal["end", "length", "stop"] = "length"

    def take(self, step: list[int], end_id: int, max_new_tokens: int) -> bool:
        """Add the tokens of a step; returns whether the text continues."""
        going = self._add(step, end_id, max_new_tokens)
        if self.string is not None:
            self.string.show_settled()
        return going

    def _add(self, step: list[int], end_id: int, max_new_tokens: int) -> bool:
        for token in step:
            if token == end_id:
                self.stopped_by = "end"
                return False
            self.new.append(token)
            if self.string is not None and self.string.add(token):
                self.stopped_by = "stop"
                return False
            if len(self.new) == max_new_tokens:
                return False
        return True
