"""The discrete head: exact probabilities, scores, temperatures and losses against enumeration."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from launches import recipe as recipe_file
from tiny_models import tiny_model
from torch import Tensor

from calm_dist.errors import RecipeError, UserError
from calm_dist.evaluation.block_scores import BlockScores, score_softmax_block
from calm_dist.evaluation.brier import NGRAM, ngram_starts
from calm_dist.inference.generate import continue_texts
from calm_dist.inference.growing import GrowingText
from calm_dist.inference.load import LoadedModel
from calm_dist.inference.softmax import draw_sharpened, draw_tokens, softmax_sampler
from calm_dist.models.heads.tokens import TokensHead
from calm_dist.recipe import HeadRecipe, load_recipe

VOCAB, STEPS = 3, 6
RUNS, SIGMAS = 60, 5.0
NO_TOKENS = torch.empty(1, 0, dtype=torch.long)


def model(patch_size: int, **more: Any) -> LoadedModel:
    """Its logits are spread, so that tokens have unlike probabilities."""
    made = tiny_model(
        head="tokens", patch_size=patch_size, vocab_size=VOCAB, block_steps=STEPS, **more
    )
    assert made.backbone.patch_tokens is not None
    made.backbone.patch_tokens.output_layer.weight.mul_(2.0)
    return made


def all_patches(patch_size: int) -> Tensor:
    """Every patch, [V^K, K]."""
    return torch.cartesian_prod(*[torch.arange(VOCAB)] * patch_size).reshape(-1, patch_size)


def patch_probabilities(made: LoadedModel, hidden: Tensor) -> Tensor:
    """Of every patch after each hidden state [..., d], token by token; float64 [..., V^K]."""
    patches = all_patches(made.recipe.model.patch_size)
    same = hidden[..., None, :].expand(*hidden.shape[:-1], len(patches), -1).flatten(0, -2)
    patches = patches.repeat(len(same) // len(patches), 1)
    chance = torch.ones(len(patches), dtype=torch.float64)
    for k in range(patches.shape[1]):
        softmax = made.token_logits(same, patches[:, :k]).double().softmax(-1)
        chance *= softmax.gather(-1, patches[:, k : k + 1])[:, 0]
    return chance.view(*hidden.shape[:-1], -1)


def hidden_after(made: LoadedModel, tokens: Tensor) -> Tensor:
    """After one text [T] or several [n, T]."""
    return made.hidden(tokens.view(-1, tokens.shape[-1]))[:, -1].view(*tokens.shape[:-1], -1)


def random_block(patch_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(VOCAB, (STEPS * patch_size,), generator=generator)


@pytest.mark.parametrize("independent", [False, True])
@torch.no_grad()
def test_states_depend_on_the_tokens_before_and_on_no_others(independent: bool) -> None:
    torch.manual_seed(0)
    head = TokensHead(HeadRecipe(kind="tokens", num_mlp_layers=2, independent=independent), 8, 0, 4)
    hidden, previous = torch.randn(5, 8), torch.randn(5, 3, 8)
    states = head(hidden, previous)
    for place in range(4):
        torch.testing.assert_close(head.state(hidden, previous[:, :place], place), states[:, place])
        changed = previous.clone()
        changed[:, place:] += 1
        torch.testing.assert_close(head(hidden, changed)[:, : place + 1], states[:, : place + 1])
        moved = (head(hidden, changed) - states).abs().amax((0, 2)) > 1e-4
        assert moved[place + 1 :].all() != independent or place == 3


@pytest.mark.parametrize(
    ("patch_size", "independent"),
    [(1, True), *((size, independent) for size in (2, 3, 4, 8) for independent in (False, True))],
)
def test_cross_entropy_is_that_of_the_probabilities(patch_size: int, independent: bool) -> None:
    made = model(patch_size, independent=independent)
    tokens = random_block(patch_size)
    numbers = all_patches(patch_size) if patch_size < 8 else None
    total = 0.0
    for step in range(1, STEPS):
        hidden = hidden_after(made, tokens[: step * patch_size])
        patch = tokens[step * patch_size : (step + 1) * patch_size]
        if numbers is None:
            for k in range(patch_size):
                logits = made.token_logits(hidden[None], patch[None, :k])[0].double()
                total -= float(logits.log_softmax(-1)[patch[k]])
            continue
        chances = patch_probabilities(made, hidden)
        assert float(chances.sum()) == pytest.approx(1)
        total -= float(chances[(numbers == patch).all(-1)].log())
    starts = ngram_starts(len(tokens), patch_size)
    starts = starts if len(starts) else torch.tensor([patch_size])
    result = scores(made, tokens, starts, 2, 0)
    expected = total / (len(tokens) - patch_size)
    assert result.means["cross_entropy"] == pytest.approx(expected, rel=1e-5)


def scores(
    made: LoadedModel, tokens: Tensor, starts: Tensor, samples: int, seed: int
) -> BlockScores:
    return score_softmax_block(made, {"tokens": tokens.numpy()}, starts, samples, seed)


def exact_brier(made: LoadedModel, tokens: Tensor, start: int) -> Tensor:
    """Brier-1..4 of the n-grams at ``start`` by summing over all patches that reach into them."""
    patch_size = made.recipe.model.patch_size
    # The block is cut so that a patch begins there.
    context = tokens[start % patch_size : start]
    paths, joint = context[None], torch.ones(1, dtype=torch.float64)
    for _ in range(-(-NGRAM // patch_size)):
        after = patch_probabilities(made, hidden_after(made, paths))
        joint = (joint[:, None] * after).flatten()
        every = all_patches(patch_size).repeat(len(paths), 1)
        paths = torch.cat([paths.repeat_interleave(VOCAB**patch_size, 0), every], dim=1)
    result = []
    for n in range(1, NGRAM + 1):
        marginal = joint.view(VOCAB**n, -1).sum(1).view([VOCAB] * n)
        result.append(2 * marginal[tuple(tokens[start : start + n])] - marginal.square().sum())
    return torch.stack(result)


@pytest.mark.parametrize("patch_size", [2, 3, 4])
def test_both_brier_estimates_are_unbiased(patch_size: int) -> None:
    """At every position of a block, against the sum over all patches."""
    made = model(patch_size, num_hidden_layers=1)  # the estimates are what is tested
    tokens = random_block(patch_size)
    starts = ngram_starts(len(tokens), patch_size, "all")
    expected = torch.stack([exact_brier(made, tokens, start) for start in starts.tolist()])
    results = [scores(made, tokens, starts, 6, run) for run in range(RUNS)]
    by_softmax = torch.stack([result.brier for result in results])
    drawn = [result.brier_of_samples for result in results]
    by_draws = torch.stack([values for values in drawn if values is not None])
    assert len(by_draws) == RUNS
    for runs, bias in ((by_softmax, 0.03), (by_draws, 0.12)):
        assert largest_z(runs, expected) < SIGMAS
        # Such a bias would be noticed.
        assert largest_z(runs, expected + bias) > SIGMAS
    # Brier-1 needs no sampling where the softmax is known.
    torch.testing.assert_close(by_softmax[0, :, 0], expected[:, 0], atol=1e-5, rtol=0)
    assert float(by_draws.std(0).mean()) > 1.5 * float(by_softmax.std(0).mean())


def largest_z(runs: Tensor, expected: Tensor) -> float:
    """Largest deviation of Brier-1..4, averaged over starts, in standard errors of the runs."""
    values = runs.mean(1)
    stderr = values.std(0) / len(values) ** 0.5
    return float(((values.mean(0) - expected.mean(0)).abs() / stderr.clamp(min=1e-6)).max())


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """In standard deviations from its mean, approximately normal for many draws."""
    cells = expected > 1
    value = float((np.square(counts - expected)[cells] / expected[cells]).sum())
    degrees = int(cells.sum()) - 1
    return (value - degrees) / (2 * degrees) ** 0.5


def with_known_logits(made: LoadedModel, hidden: Tensor) -> LoadedModel:
    """The model, which looks up what it computed once for every first part of a patch after one
    hidden state [d]."""
    tables = [
        made.token_logits(hidden[None].expand(VOCAB**k, -1), all_patches(k) if k else NO_TOKENS)
        for k in range(made.recipe.model.patch_size)
    ]

    class Known(LoadedModel):
        def token_logits(self, outputs: Tensor, previous: Tensor) -> Tensor:
            k = previous.shape[1]
            return tables[k][(previous * VOCAB ** torch.arange(k - 1, -1, -1)).sum(-1)]

    fields = dataclasses.fields(made)
    return Known(**{field.name: getattr(made, field.name) for field in fields})


def test_known_logits_are_those_of_the_model() -> None:
    made = model(3)
    hidden = hidden_after(made, random_block(3)[:6])
    known = with_known_logits(made, hidden)
    for k in range(3):
        rows = torch.tensor([0, 5, 2, 5, 3, 20, 26, 1])
        previous, same = all_patches(3)[rows, :k], hidden[None].expand(len(rows), -1)
        expected = made.token_logits(same, previous)
        torch.testing.assert_close(known.token_logits(same, previous), expected)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.5, 1 / 3])
def test_patches_of_a_temperature_are_exact(temperature: float) -> None:
    made = model(3)
    hidden = hidden_after(made, random_block(3)[:6])
    sharp = patch_probabilities(made, hidden).pow(1 / temperature).numpy()
    rng, draws = np.random.default_rng(0), 2000
    known = with_known_logits(made, hidden)
    places = VOCAB ** np.arange(2, -1, -1)
    numbers = [
        int(np.dot(draw_sharpened(known, hidden, temperature, rng, 10_000), places))
        for _ in range(draws)
    ]
    counts = np.bincount(numbers, minlength=VOCAB**3)
    assert chi_square(counts, draws * sharp / sharp.sum()) < SIGMAS
    if temperature < 0.4:
        # What a temperature for each token gives is another distribution.
        each = token_temperature(made, hidden, temperature)
        assert chi_square(counts, draws * each) > SIGMAS


def token_temperature(made: LoadedModel, hidden: Tensor, temperature: float) -> np.ndarray:
    """Probability of every patch with each token drawn at a temperature."""
    patches = all_patches(3)
    same = hidden[None].expand(len(patches), -1)
    chance = torch.ones(len(patches), dtype=torch.float64)
    for k in range(3):
        softmax = (made.token_logits(same, patches[:, :k]).double() / temperature).softmax(-1)
        chance *= softmax.gather(-1, patches[:, k : k + 1])[:, 0]
    return chance.numpy()


def test_tokens_of_a_temperature_are_those_of_the_softmax() -> None:
    made = model(3)
    hidden = hidden_after(made, random_block(3)[:6])
    uniform = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = draw_tokens(made, hidden[None].expand(4000, -1), 0.5, uniform)
    counts = np.bincount((draws.numpy() * VOCAB ** np.arange(2, -1, -1)).sum(-1), minlength=27)
    assert chi_square(counts, 4000 * token_temperature(made, hidden, 0.5)) < SIGMAS
    likeliest = draw_tokens(made, hidden[None], 0.0, uniform[:1])[0]
    for k in range(3):
        logits = made.token_logits(hidden[None], likeliest[None, :k])[0]
        assert int(logits.argmax()) == int(likeliest[k])


class _Tokenizer:
    begin_id, end_id = 0, 99


@pytest.mark.parametrize("method", ["auto", "exact"])
def test_texts_grow_alike_alone_and_together(method: Any) -> None:
    made = model(2)
    sampler = softmax_sampler(made, 0.5, method, 1000)
    prompts = [[1], [2, 0, 1], [1, 1]]

    def grow(chosen: list[int]) -> list[list[int]]:
        rows = [GrowingText(prompts[i], seed=i) for i in chosen]
        continue_texts(made, rows, sampler, _Tokenizer(), 7, reproducible=True)  # type: ignore[arg-type]
        assert all(len(row.new) == 7 for row in rows)
        return [row.new for row in rows]

    assert grow([0, 1, 2]) == [grow([i])[0] for i in range(3)]


def test_methods_that_it_does_not_have() -> None:
    made = model(2)
    with pytest.raises(UserError, match="method pool: is for samples of latents"):
        softmax_sampler(made, 0.5, "pool", 10)
    with pytest.raises(UserError, match="must lie in"):
        softmax_sampler(made, 2.0, "exact", 10)
    with pytest.raises(UserError, match="was accepted in 1 draws"):
        for _ in range(100):
            draw_sharpened(made, torch.zeros(16), 0.1, np.random.default_rng(1), 1)


def test_what_a_recipe_cannot_ask_for() -> None:
    calm = recipe_file("calm")
    tokens = "model.head.kind=tokens"
    with pytest.raises(RecipeError, match=r"model.head.independent: true, but the energy head"):
        load_recipe(calm, ["model.head.independent=true"])
    with pytest.raises(RecipeError, match=r"data.latents: on_the_fly, but the tokens head"):
        load_recipe(calm, [tokens, "data.latents=on_the_fly"])
    with pytest.raises(RecipeError, match=r"model.head.sampling_steps: 2, but the tokens head"):
        load_recipe(calm, [tokens, "model.head.sampling_steps=2"])
    with pytest.raises(RecipeError, match=r"model.patch_size: 1 leaves the tokens head no earlier"):
        load_recipe(calm, [tokens, "model.patch_size=1"])
    with pytest.raises(RecipeError, match=r"training.energy_kernel: triton"):
        load_recipe(calm, [tokens, "training.energy_kernel=triton"])


@pytest.mark.parametrize("variant", ["tokens", "fp16"])
def test_a_store_of_either_kind_will_do(variant: str) -> None:
    recipe = load_recipe(recipe_file("calm"), ["model.head.kind=tokens", "model.vocab_size=512"])
    has_latents = variant == "fp16"
    meta = {
        "variant": variant, "block_size": 512, "patch_size": 4, "vocab_size": 512,
        "latent_size": 16 if has_latents else None,
        "tokenizer": {"sha256": "0", "file": "tokenizer.json", "pad_id": 0},
        "autoencoder": {"file": "ae", "sha256": "1"} if has_latents else None,
    }  # fmt: skip
    filled = recipe.with_store(meta)
    assert filled.model == recipe.model
    with pytest.raises(RecipeError, match=r"model.patch_size: 4 in the recipe, 2 in the data"):
        recipe.with_store({**meta, "patch_size": 2})
