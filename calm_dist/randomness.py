"""Seeds as a function of what a random number is for; docs/randomness.md lists all keys."""

from __future__ import annotations

import hashlib


def key_seed(*parts: int | str) -> int:
    """A seed in [0, 2**56) that is a function of its parts alone.

    Equal on every machine, layout and version: runs, stores and weights of earlier versions depend
    on it.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "little")


def key_fraction(*parts: int | str) -> float:
    """A number in [0, 1) that is a function of its parts alone; of data, see `key_seed`."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
