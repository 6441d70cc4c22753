"""Tokenizes texts in threads, while the next ones are read and the last ones are packed."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from calm_dist.text.tokenizer import Tokenizer

MOST_THREADS = 8
"""One process reads and packs for about this many; more processes use more cores."""


class Piece(NamedTuple):
    """A text that is tokenized at once: a document, or a part of a long one."""

    text: str
    begins: str | None
    """The id of the document that begins here."""
    ends: bool


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def tokenized_ahead(
    batches: Iterable[list[Piece]], tokenizer: Tokenizer
) -> Iterator[tuple[list[Piece], list[list[int]]]]:
    """Batches of texts with the tokens of each text, in order.

    Both libraries tokenize a text in one thread and without Python's lock, so a thread for each
    core keeps all of them busy whatever the lengths of the texts. If reading fails, what was read
    before is given first.

    Args:
        batches: the texts.
        tokenizer: it does not count them.

    Raises:
        DataError: as `Tokenizer.tokens_of`; and whatever reading raises.
    """
    threads = min(MOST_THREADS, cores())
    waiting: deque[tuple[list[Piece], Future[list[list[int]]]]] = deque()
    failed: Exception | None = None
    source = iter(batches)
    executor = ThreadPoolExecutor(threads, thread_name_prefix="tokenize")
    try:
        while True:
            try:
                batch = None if failed else next(source, None)
            except Exception as error:
                batch, failed = None, error
            if batch is not None:
                texts = [piece.text for piece in batch]
                waiting.append((batch, executor.submit(tokenizer.tokens_of, texts)))
            elif not waiting:
                break
            if batch is None or len(waiting) > threads:
                done, tokens = waiting.popleft()
                yield done, tokens.result()
        if failed is not None:
            raise failed
    finally:
        executor.shutdown(cancel_futures=True)
