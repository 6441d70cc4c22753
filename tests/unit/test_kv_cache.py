"""The KV cache against the forward without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import VOCAB, tiny_model

from calm_dist.inference.contexts import Contexts
from calm_dist.inference.load import LoadedModel

STEPS = 20
TOLERANCE = 1e-5


def run(model: LoadedModel, tokens: torch.Tensor, **cache: Any) -> torch.Tensor:
    return (model.hidden if model.kind == "calm" else model.logits)(tokens, **cache)


def random_tokens(model: LoadedModel, rows: int, steps: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, steps * model.recipe.model.patch_size)
    return torch.randint(VOCAB, shape, generator=generator)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("kind", ["calm", "transformer"])
@pytest.mark.parametrize("groups", [None, 2, 1])
@pytest.mark.parametrize("prefill", [1, 2, 7, STEPS - 1])
def test_prefill_and_decode_equal_the_forward(kind: str, groups: int | None, prefill: int) -> None:
    model = tiny_model(kind, num_key_value_heads=groups)
    tokens = random_tokens(model, 3, STEPS)
    expected = run(model, tokens)
    size = model.recipe.model.patch_size
    cache = model.new_cache(3, STEPS)
    parts = [run(model, tokens[:, : prefill * size], cache=cache)]
    for step in tokens[:, prefill * size :].split(size, dim=1):
        parts.append(run(model, step, cache=cache))
    # With a cache, a Transformer returns the logits of the last token only.
    found = torch.cat(parts, dim=1)
    assert found.shape[1] == (STEPS if kind == "calm" else STEPS - prefill + 1)
    assert_close(found, expected[:, -found.shape[1] :])


@pytest.mark.parametrize("kind", ["calm", "transformer"])
def test_several_steps_behind_a_cache(kind: str) -> None:
    model = tiny_model(kind)
    tokens = random_tokens(model, 2, 9)
    cut = 5 * model.recipe.model.patch_size
    cache = model.new_cache(2, 9)
    run(model, tokens[:, :cut], cache=cache)
    found = run(model, tokens[:, cut:], cache=cache)
    assert_close(found, run(model, tokens)[:, -found.shape[1] :])


def test_rows_of_unequal_length() -> None:
    """Twelve rows, more than one forward takes, each at its own length; one begins again."""
    model = tiny_model("calm", patch_size=2)
    lengths = [1, 9, 3, 70, 5, 2, 66, 8, 1, 4, 30, 7]
    rows = [random_tokens(model, 1, length + 1, seed)[0] for seed, length in enumerate(lengths)]
    cache = model.new_cache(len(rows), 71)
    run(model, rows[1][None, :6], cache=cache.select(slice(0, 1)))
    cache.clear(0)
    for number, row in enumerate(rows):
        run(model, row[None, :-2], cache=cache.select(slice(number, number + 1)))
    assert cache.lengths.tolist() == lengths
    found = run(model, torch.stack([row[-2:] for row in rows]), cache=cache)
    expected = torch.cat([run(model, row[None])[:, -1:] for row in rows])
    assert_close(found, expected)


def test_kept_rows_are_a_copy() -> None:
    model = tiny_model("transformer")
    tokens = random_tokens(model, 3, 6)
    cache = model.new_cache(3, 6)
    run(model, tokens[:, :5], cache=cache)
    kept = cache.select([2, 0])
    found = run(model, tokens[[2, 0], 5:], cache=kept)
    assert_close(found, run(model, tokens[[2, 0]])[:, -1:])
    assert cache.lengths.tolist() == [5, 5, 5]


def test_a_full_cache_is_an_error() -> None:
    model = tiny_model("transformer")
    # Slots come in multiples of 64.
    cache = model.new_cache(1, 3)
    run(model, random_tokens(model, 1, 64), cache=cache)
    with pytest.raises(ValueError, match="65 steps do not fit in a cache of 64 steps"):
        run(model, random_tokens(model, 1, 1), cache=cache)


@pytest.mark.parametrize(("kind", "patch_size"), [("calm", 4), ("calm", 1), ("transformer", 1)])
def test_a_text_has_the_same_bits_alone_and_in_a_batch(kind: str, patch_size: int) -> None:
    """Eleven texts of 1 to 90 steps, ten more steps each, through windows that fill up."""
    model = tiny_model(kind, patch_size=patch_size, block_steps=70, hidden_size=32)
    lengths = [1, 64, 3, 90, 5, 4, 65, 68, 17, 2, 33]
    texts = [random_tokens(model, 1, n, n)[0].tolist() for n in lengths]
    new = [random_tokens(model, len(texts), 1, 100 + step).tolist() for step in range(10)]

    def outputs(rows: list[int]) -> torch.Tensor:
        contexts = Contexts(model, [texts[row] for row in rows], len(new), reproducible=True)
        found = [contexts.start()]
        for step in new:
            found.append(contexts.extend(list(range(len(rows))), [step[row] for row in rows]))
        return torch.stack(found, dim=1)

    together = outputs(list(range(len(texts))))
    for row in range(len(texts)):
        assert torch.equal(outputs([row])[0], together[row])


@pytest.mark.parametrize(("kind", "groups"), [("calm", None), ("transformer", 2)])
def test_texts_that_step_together_equal_those_alone(kind: str, groups: int | None) -> None:
    """Of unequal lengths, through windows that fill up at different steps, some of which end."""
    model = tiny_model(kind, block_steps=70, hidden_size=32, num_key_value_heads=groups)
    lengths = [66, 66, 1, 90, 5, 67, 5, 5]
    texts = [random_tokens(model, 1, n, n)[0].tolist() for n in lengths]
    rows = list(range(len(texts)))
    contexts = [Contexts(model, texts, 8, reproducible=alone) for alone in (False, True)]
    assert_close(*(c.start() for c in contexts))
    for number in range(8):
        # A text ends: its row leaves the cache.
        going = [at for at in range(len(rows)) if not (number == 4 and at == 3)]
        rows = [rows[at] for at in going]
        steps = random_tokens(model, len(rows), 1, 100 + number).tolist()
        assert_close(*(c.extend(going, steps) for c in contexts))
