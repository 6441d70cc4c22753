"""File names and kinds of addresses of data stores, for code that does not read stores."""

from __future__ import annotations

from pathlib import Path

META = "meta.json"
INDEX = "index.json"


def is_remote(path: str | Path) -> bool:
    """Whether a store is given by a URL, not by a local directory."""
    return "://" in str(path)
