"""docs/recipes.md says what the types say, about every field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from calm_dist.recipe import load_recipe
from calm_dist.recipe.reference import reference

ROOT = Path(__file__).parents[2]


def test_the_page_is_current() -> None:
    assert (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8") == reference(), (
        "run: python -m calm_dist.recipe.reference > docs/recipes.md"
    )


def fields_of(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield prefix + name
        if isinstance(value, Mapping):
            yield from fields_of(value, f"{prefix}{name}.")


def test_every_field_of_every_recipe_is_there() -> None:
    page = reference()
    named = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    sections = {line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")}
    for file in sorted((ROOT / "recipes").glob("*.yaml")):
        assert set(fields_of(load_recipe(file).to_dict())) <= named | sections, file


def test_limits_defaults_and_words_are_those_of_the_types() -> None:
    rows = [line.split(" | ") for line in reference().splitlines() if line.startswith("| `")]
    cells = {row[0].strip("| `"): row[1:] for row in rows}
    assert cells["model.head.beta"][:2] == ["number, above 0, below 2", "`1.0`"]
    assert cells["training.steps"][:2] == ["integer, from 1", "**required**"]
    assert cells["parallel.virtual_pipeline_size"][:2] == ["integer, from 2", "–"]
    assert cells["training.schedule"][:2] == ["`constant`, `cosine`, `linear`, `wsd`", "`constant`"]
    assert cells["health.timeout_seconds"][0] == "number, above 0, at most 1,000,000"
    assert cells["data.path"][0] == "text or list: text or list: `{path, weight, max_epochs}`"
    assert cells["checkpoint.async"][1] == "`true`"
    assert cells["model.kl_clamp"][2].startswith("Floor of the KL term")
