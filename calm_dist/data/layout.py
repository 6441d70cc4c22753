"""File names of data stores and the kinds of their addresses, for those who read no store."""

from __future__ import annotations

from pathlib import Path

META = "meta.json"
INDEX = "index.json"


def is_remote(path: str | Path) -> bool:
    """Whether a store is given by a URL and not by a local directory."""
    return "://" in str(path)
