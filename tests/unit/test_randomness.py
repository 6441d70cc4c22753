"""Keys give the seeds that runs, stores and weights of earlier versions were made with."""

from __future__ import annotations

import ast
from pathlib import Path

from calm_dist.randomness import key_fraction, key_seed

PACKAGE = Path(__file__).parents[2] / "calm_dist"
PAGE = PACKAGE.parent / "docs" / "randomness.md"
# What takes a seed that a user gives, or that a key gave, and hands it to a generator.
MAKERS = ("manual_seed", "default_rng", "SeedSequence", "Random")


def test_keys_are_those_of_version_0_1() -> None:
    assert key_seed(0, 0, 5, 0, "posterior") == 66380503731984347
    assert key_seed(7, "head.net.weight") == 69613234190707976
    assert key_fraction(3, "split", "a/b.txt") == 0.004741474765054932


def test_the_page_names_every_file_that_makes_a_generator() -> None:
    """A generator that the page does not know is one whose key nobody thought about."""
    page = PAGE.read_text(encoding="utf-8")
    makers = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = getattr(node, "attr", getattr(node, "id", None))
            if name in MAKERS:
                makers.add(file.relative_to(PACKAGE).as_posix())
    unknown = {name for name in makers if f"`calm_dist/{name}`" not in page}
    assert makers and not unknown
