"""The three models of the quickstart are comparable: same text, shape and training FLOPs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from calm_dist.flops import count
from calm_dist.recipe import LanguageModelRecipe, load_recipe

ROOT = Path(__file__).parents[2]
# calm is the reference; the Transformer has no patches.
SHARED = {
    "model": "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads init",
    "data": "path block_size seed",
    "training": "global_batch_size schedule warmup_steps",
    "evaluation": "blocks samples seed",
}


def tiny(kind: str) -> LanguageModelRecipe:
    recipe = load_recipe(ROOT / "recipes" / f"{kind}_tiny.yaml")
    assert isinstance(recipe, LanguageModelRecipe)
    return recipe


@pytest.mark.parametrize("kind", ["tokens", "transformer"])
def test_comparable_with_the_calm(kind: str) -> None:
    calm, other = tiny("calm"), tiny(kind)
    ours = count(calm).train_flops_ours
    assert count(other).train_flops_ours == pytest.approx(ours, rel=0.01)

    def facts(recipe: LanguageModelRecipe) -> dict[str, Any]:
        return {
            f"{section}.{name}": getattr(getattr(recipe, section), name)
            for section, names in SHARED.items()
            for name in names.split()
        }

    assert facts(other) == facts(calm)
