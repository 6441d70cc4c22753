"""Paths that pages and docstrings of pages name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# `calm_dist/data/guard.py`, `tests/unit`; also without the package's name, `parallel/noise.py`.
QUOTED = re.compile(r"`([\w.]+(?:/[\w.*-]+)+/?)`")
LINKED = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
ROOTS = ("calm_dist", "recipes", "slurm", "tools", "tests", "docs", ".ci")


def is_ours(path: str) -> bool:
    """Whether a quoted path is one of the repository, rather than of a run or a data directory."""
    return path.startswith(tuple(f"{root}/" for root in ROOTS)) or path.endswith(".py")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    # Files of the packages that these pages make.
    text = re.sub(r"`(gaussian_head|nesterov)/", "`", text) if page.parent.name == "howto" else text
    gone = []
    for path in filter(is_ours, QUOTED.findall(text)):
        places = (ROOT, ROOT / "calm_dist")
        if not any(list(place.glob(path.rstrip("/"))) for place in places):
            gone.append(path)
    gone += [link for link in LINKED.findall(text) if not (page.parent / link).exists()]
    assert not gone


def test_the_tree_of_the_code_names_files_that_exist() -> None:
    """Each file in the directory under which docs/code.md's tree lists it; every room is there."""
    page = (ROOT / "docs" / "code.md").read_text(encoding="utf-8")
    tree = page.split("```")[1].split("recipes/ ")[0]
    rooms: set[str] = set()
    room, gone = "", []
    for line in tree.splitlines():
        if entry := re.match(r"[├└]── (\w+)(/| )", line):
            room = entry[1] if entry[2] == "/" else ""
            rooms.add(room)
        directory = ROOT / "calm_dist" / room
        for name in re.findall(r"[\w/*]+\.py\b", line):
            if not any(directory.rglob(name)) and not (ROOT / "calm_dist" / name).is_file():
                gone.append(f"{room}: {name}")
    assert not gone
    packages = {path.parent.name for path in (ROOT / "calm_dist").glob("*/__init__.py")}
    assert packages <= rooms
