"""Progress on the console: a bar on a terminal, else a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0

T = TypeVar("T")


def progress(items: Iterable[T], total: int, *, label: str, unit: str) -> Iterator[T]:
    """Yield ``items`` while showing how many of ``total`` are done, the rate and the time left."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=label, unit=f" {unit}", dynamic_ncols=True)
        return
    start = shown = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - shown >= SECONDS_BETWEEN_LINES:
            shown = now
            meter = tqdm.format_meter(done, total, now - start, prefix=label, unit=f" {unit}")
            print(meter, file=sys.stderr, flush=True)
        yield item
