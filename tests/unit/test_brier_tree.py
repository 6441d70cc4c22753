"""Brier-n of models whose distribution can be summed over: tree attention and unbiasedness."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from calm_dist.evaluation import brier, brier_softmax, brier_tree

VOCAB = 5
RUNS = 300
RUNS_THAT_NOTICE = 120
SIGMAS = 4.5
"""A correct estimator deviates further with probability < 1e-5 (Student t, 299 degrees of
freedom) for each of the four values of a test, < 4e-5 for a test with any seed."""


class TinyCache:
    """The steps of one text, to be computed again with each forward: a `StepCache`."""

    def __init__(self, *_: int) -> None:
        self.symbols = torch.zeros(1, 0, dtype=torch.long)
        self.positions = torch.zeros(0, dtype=torch.long)
        self.mask = torch.zeros(0, 0, dtype=torch.bool)

    def truncate(self, steps: int) -> None:
        self.symbols, self.positions = self.symbols[:, :steps], self.positions[:steps]
        self.mask = self.mask[:steps, :steps]

    def extend(self, symbols: Tensor, positions: Tensor, mask: Tensor | None) -> None:
        held, steps = self.symbols.shape[1], symbols.shape[1]
        if mask is None:
            mask = torch.ones(steps, held + steps, dtype=torch.bool).tril(held)
        self.symbols = torch.cat([self.symbols, symbols], 1)
        self.positions = torch.cat([self.positions, positions])
        unseen = torch.zeros(held, steps, dtype=torch.bool)
        self.mask = torch.cat([torch.cat([self.mask, unseen], 1), mask])


class TinyTransformer(torch.nn.Module):
    """A two-layer causal attention model with sinusoidal positions: a `StepFunction`.

    It maps symbols to logits of the next symbol. Of a Transformer the symbols are tokens; of a
    CALM they are patches, numbered by their tokens as digits, and the logits its hidden state.
    All symbols are possible: no probability is more than exp(2 · sharpness) times another.
    """

    def __init__(
        self,
        vocab: int = VOCAB,
        width: int = 16,
        seed: int = 0,
        patch_size: int = 1,
        sharpness: float = 1.0,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.patch_size, self.sharpness = patch_size, sharpness
        self.digits = vocab ** torch.arange(patch_size - 1, -1, -1)
        self.vocab, symbols = vocab, vocab**patch_size
        self.embed = torch.nn.Embedding(symbols, width)
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(width, 3 * width) for _ in range(2))
        self.out = torch.nn.Linear(width, symbols)
        self.double()

    @torch.no_grad()
    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: TinyCache | None = None,
    ) -> Tensor:
        symbols = (tokens.unflatten(1, (-1, self.patch_size)) * self.digits).sum(-1)
        steps = symbols.shape[1]
        positions = torch.arange(steps) if positions is None else positions
        mask = torch.ones(steps, steps, dtype=torch.bool).tril() if mask is None else mask
        if cache is not None:
            cache.extend(symbols, positions, None if len(mask) == mask.shape[1] else mask)
            symbols, positions, mask = cache.symbols, cache.positions, cache.mask
        width = self.embed.embedding_dim
        angles = positions[:, None] * torch.logspace(0, -2, width, dtype=torch.float64)
        hidden = 2 * self.embed(symbols) + angles.sin()
        for layer in self.qkv:
            q, k, v = layer(hidden).chunk(3, -1)
            hidden = hidden + torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask
            )
        return self.sharpness * self.out(hidden[:, -steps:]).tanh()

    def to_patches(self, symbols: Tensor) -> Tensor:
        """Symbols ``[...]`` -> tokens ``[..., K]``."""
        return symbols[..., None] // self.digits % self.vocab

    def draw(self, logits: Tensor, num_draws: int, generator: torch.Generator) -> Tensor:
        """Independent draws ``[m, b, K]``."""
        symbols = torch.multinomial(logits.softmax(-1), num_draws, True, generator=generator)
        return self.to_patches(symbols.T)


def random_tokens(vocab: int, count: int, seed: int) -> Tensor:
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed))


def exact_scores(model: TinyTransformer, tokens: Tensor, start: int) -> Tensor:
    """Brier-1..4 at the token ``start`` by summing over all continuations, one forward each."""
    contexts = tokens[None, :start]
    joint = torch.ones(1, dtype=torch.float64)
    num_symbols = model.vocab**model.patch_size
    for _ in range(brier_tree.patches_per_ngram(model.patch_size)):
        joint = (joint[:, None] * model(contexts)[:, -1].softmax(-1)).flatten()
        every = model.to_patches(torch.arange(num_symbols)).repeat(len(contexts), 1)
        contexts = torch.cat([contexts.repeat_interleave(num_symbols, 0), every], dim=1)
    scores = []
    for n in range(1, brier.NGRAM + 1):
        marginal = joint.view(model.vocab**n, -1).sum(1).view([model.vocab] * n)
        true = marginal[tuple(tokens[start : start + n])]
        scores.append(2 * true - marginal.square().sum())
    return torch.stack(scores)


def largest_z(runs: Tensor, expected: Tensor) -> float:
    """Largest deviation of Brier-1..4 from the truth in standard errors, over independent runs.

    Args:
        runs: ``[runs, S, 4]``.
        expected: ``[S, 4]``.
    """
    values = runs.mean(1)
    stderr = values.std(0) / len(values) ** 0.5
    # Where nothing is sampled, the deviation is rounding in fp32.
    deviation = (values.mean(0) - expected.mean(0)).abs()
    return float((deviation / stderr.clamp(min=1e-6)).max())


def test_softmax_scores_are_exact_where_they_should_be() -> None:
    model = TinyTransformer()
    tokens = random_tokens(VOCAB, 12, seed=3)
    starts = torch.tensor([4, 8])
    result = brier_softmax.scores_from_softmax(
        model, TinyCache, tokens, starts, num_draws=1, seed=0
    )
    for row, start in enumerate(starts.tolist()):
        # Brier-1 needs no sampling; fp32 inside.
        expected = float(exact_scores(model, tokens, start)[0])
        assert float(result.scores[row, 0]) == pytest.approx(expected, abs=1e-6)
    expected_nats = torch.nn.functional.cross_entropy(
        model(tokens[None])[0, :-1], tokens[1:], reduction="none"
    )
    torch.testing.assert_close(result.nats.double(), expected_nats, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("smallest", [0.0, 1 / 64, 1 / 8, 0.9])
def test_softmax_scores_are_unbiased(smallest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the sum over all continuations, at 13 starts, in several forwards; whether no, some
    or nearly all paths may end early."""
    monkeypatch.setattr(brier_tree, "_STEPS_AT_ONCE", 128)
    monkeypatch.setattr(brier_softmax, "_SMALLEST_PRODUCT", max(smallest, 1e-12))
    model = TinyTransformer()
    tokens = random_tokens(VOCAB, 20, seed=4)
    starts = brier.ngram_starts(20, 4, "all")
    assert len(starts) == 13
    # The paths of a start that is given again are others: each call is as many runs as it has
    # copies of the starts.
    copies = 20
    calls = [
        brier_softmax.scores_from_softmax(
            model, TinyCache, tokens, starts.repeat(copies), num_draws=4, seed=seed
        ).scores.unflatten(0, (copies, -1))
        for seed in range(RUNS // copies)
    ]
    runs = torch.cat(calls)
    assert runs.shape == (RUNS, len(starts), 4)
    expected = torch.stack([exact_scores(model, tokens, start) for start in starts.tolist()])
    assert largest_z(runs, expected) < SIGMAS
    assert (runs.std(0)[:, 1:] > 0).all()
    # A bias that would move BrierLM by about 0.2 is noticed, not only in Brier-1, which is exact.
    assert largest_z(runs[..., 2:], expected[:, 2:] + 0.002) > SIGMAS


def test_a_transformer_that_always_agrees_with_itself() -> None:
    """Block 256, stride 1, a softmax that leaves no choice: Brier-n is 2·hit - 1."""
    tokens = random_tokens(2, 256, seed=5)
    followers = torch.tensor([1, 0])

    def logits(tokens: Tensor, positions: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        return 200 * torch.nn.functional.one_hot(followers[tokens], 2).float()

    starts = brier.ngram_starts(256, 4, "all")
    result = brier_softmax.scores_from_softmax(
        logits, TinyCache, tokens, starts, num_draws=2, seed=0
    )
    alternates = (tokens[1:] == followers[tokens[:-1]]).tolist()
    hits = [[all(alternates[q - 1 : q - 1 + n]) for n in (1, 2, 3, 4)] for q in starts.tolist()]
    assert 5 < sum(hit[3] for hit in hits) < 100
    torch.testing.assert_close(result.scores, 2 * torch.tensor(hits, dtype=torch.float64) - 1)


Sampler = Callable[[TinyTransformer, Tensor, int, torch.Generator], Tensor]


def independent(model: TinyTransformer, logits: Tensor, m: int, g: torch.Generator) -> Tensor:
    return model.draw(logits, m, g)


def repeated(model: TinyTransformer, logits: Tensor, m: int, g: torch.Generator) -> Tensor:
    """One draw m times: all its pairs are pairs with itself."""
    return model.draw(logits, 1, g).repeat(m, 1, 1)


def run_scores(
    model: TinyTransformer,
    tokens: Tensor,
    patches: Tensor,
    *,
    seed: int,
    num_draws: int,
    count: int = RUNS,
    first: Sampler = independent,
    further: Sampler = independent,
) -> Tensor:
    """Scores ``[count, S, 4]`` of independent runs of the estimator for CALM."""
    generator = torch.Generator().manual_seed(seed)
    hidden = model(tokens[None])[0]
    target = tokens[model.patch_size * patches[:, None] + torch.arange(brier.NGRAM)]

    def draw(hidden: Tensor, starts: Tensor, depth: int) -> Tensor:
        return further(model, hidden, num_draws, generator)

    cache = TinyCache()
    model(tokens[None], cache=cache)
    return torch.stack(
        [
            brier_tree.scores_from_patches(
                model, cache, draw, first(model, hidden, num_draws, generator), patches, target
            )
            for _ in range(count)
        ]
    )


# (K, vocabulary, draws): all continuations of a patch can be listed.
SIZES = [(1, 3, 4), (2, 3, 2), (2, 3, 6), (3, 2, 4), (4, 2, 4), (8, 2, 4)]


def enumerable_calm(patch_size: int, vocab: int) -> tuple[TinyTransformer, Tensor, Tensor]:
    """A model, a block, the patches where its n-grams begin."""
    model = TinyTransformer(vocab, patch_size=patch_size)
    tokens = random_tokens(vocab, (9 + 3 * (patch_size == 1)) * patch_size, seed=7)
    patches = brier.ngram_starts(len(tokens), patch_size) // patch_size
    return model, tokens, patches


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("patch_size", "vocab", "num_draws"), SIZES)
def test_patch_scores_are_unbiased(patch_size: int, vocab: int, num_draws: int, seed: int) -> None:
    """Against the sum over all continuations, at seven to nine starts."""
    model, tokens, patches = enumerable_calm(patch_size, vocab)
    starts = (patch_size * patches).tolist()
    expected = torch.stack([exact_scores(model, tokens, start) for start in starts])
    runs = run_scores(model, tokens, patches, seed=seed, num_draws=num_draws)
    assert largest_z(runs, expected) < SIGMAS


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("patch_size", "vocab"), [(1, 3), (2, 3), (3, 2), (4, 2), (8, 2)])
def test_biased_patch_scores_are_noticed(patch_size: int, vocab: int, seed: int) -> None:
    """Pairs of a draw with itself, in the first patch or only in the continuation, are noticed
    in fewer runs than the unbiased estimator is tested with."""
    model, tokens, patches = enumerable_calm(patch_size, vocab)
    starts = (patch_size * patches).tolist()
    expected = torch.stack([exact_scores(model, tokens, start) for start in starts])
    given: dict[str, Any] = {"seed": seed, "num_draws": 4, "count": RUNS_THAT_NOTICE}
    runs = run_scores(model, tokens, patches, first=repeated, **given)
    assert largest_z(runs, expected) > SIGMAS
    if patch_size < brier.NGRAM:
        runs = run_scores(model, tokens, patches, further=repeated, **given)
        assert largest_z(runs[..., patch_size:], expected[:, patch_size:]) > SIGMAS
        assert largest_z(runs[..., :patch_size], expected[:, :patch_size]) < SIGMAS


def hashed_draws(model: TinyTransformer, hidden: Tensor, num_draws: int) -> Tensor:
    """Two or three different patches among m "draws" that follow from the hidden state alone."""
    digits = (hidden[:, :1].abs() * 1e6).long() // 10 ** torch.arange(num_draws)
    symbols = digits % 3 % model.vocab**model.patch_size
    return model.to_patches(symbols.T)


def naive_collisions(
    model: TinyTransformer, context: Tensor, num_draws: int, length: int
) -> list[float]:
    """Shares of agreeing pairs in the first 1..length tokens, by recursion over the groups."""
    draws = hashed_draws(model, model(context[None])[0, -1:], num_draws)[:, 0]
    pairs = list(itertools.permutations([tuple(draw.tolist()) for draw in draws], 2))
    shares = [
        sum(a[:n] == b[:n] for a, b in pairs) / len(pairs)
        for n in range(1, min(length, model.patch_size) + 1)
    ]
    further = [0.0] * (length - len(shares))
    if further:
        for patch, count in Counter(a for a, b in pairs if a == b).items():
            below = naive_collisions(
                model, torch.cat([context, torch.tensor(patch)]), num_draws, len(further)
            )
            for n, share in enumerate(below):
                further[n] += count / len(pairs) * share
    return shares + further


@pytest.mark.parametrize(("patch_size", "vocab"), [(1, 3), (2, 3), (3, 2), (4, 2)])
@pytest.mark.parametrize("at_once", [1, 512])
def test_tree_equals_recursion(
    patch_size: int, vocab: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same draws, one forward for each context: equal, in one forward or in many."""
    monkeypatch.setattr(brier_tree, "_STEPS_AT_ONCE", at_once)
    model, tokens, patches = enumerable_calm(patch_size, vocab)
    forwards = []

    def hidden(tokens: Tensor, positions: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        forwards.append(tokens.shape)
        return model(tokens, positions, mask, cache)

    def draw(hidden: Tensor, starts: Tensor, depth: int) -> Tensor:
        return hashed_draws(model, hidden, 6)

    target = torch.full((len(patches), brier.NGRAM), -1)  # no hits
    draws = hashed_draws(model, model(tokens[None])[0], 6)
    cache = TinyCache()
    model(tokens[None], cache=cache)
    scores = brier_tree.scores_from_patches(hidden, cache, draw, draws, patches, target)
    naive = [naive_collisions(model, tokens[:start], 6, 4) for start in patch_size * patches]
    torch.testing.assert_close(-scores, torch.tensor(naive, dtype=torch.float64))
    if patch_size < brier.NGRAM:
        assert (scores[:, 3] < 0).any()
        # A forward for each patch of each level's branches.
        fewest = sum(range(brier_tree.patches_per_ngram(patch_size)))
        assert (len(forwards) == fewest) == (at_once == 512)


def test_accuracy_joins_draws_of_consecutive_patches() -> None:
    """Sample a of an n-gram is the a-th draw of each patch; nothing agrees, so nothing collides."""
    draws = torch.tensor([[[1, 2], [3, 4], [5, 6]], [[7, 8], [9, 4], [5, 0]]])
    target = torch.tensor([[1, 2, 3, 4], [9, 4, 5, 6]])

    def unused(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("no branch to continue")

    scores = brier_tree.scores_from_patches(
        unused, TinyCache(), unused, draws, torch.tensor([1, 2]), target
    )
    # One of two samples is right for 1..4 tokens, or up to the third: twice the mean.
    assert scores.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
