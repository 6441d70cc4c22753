"""BrierLM against definitions, naive loops and known distributions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from calm_dist.evaluation import brier

VOCAB = 5


class TinyTransformer(torch.nn.Module):
    """A two-layer causal attention model with sinusoidal positions: the contract's `logits`."""

    def __init__(self, vocab: int = VOCAB, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Embedding(vocab, width)
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(width, 3 * width) for _ in range(2))
        self.out = torch.nn.Linear(width, vocab)
        self.double()

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        steps = tokens.shape[1]
        positions = torch.arange(steps) if positions is None else positions
        mask = torch.ones(steps, steps, dtype=torch.bool).tril() if mask is None else mask
        width = self.embed.embedding_dim
        angles = positions[:, None] * torch.logspace(0, -2, width, dtype=torch.float64)
        hidden = 2 * self.embed(tokens) + angles.sin()
        for layer in self.qkv:
            q, k, v = layer(hidden).chunk(3, -1)
            hidden = hidden + torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask
            )
        return self.out(hidden)


def test_scores_count_whole_prefixes() -> None:
    target = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    sample_a = torch.tensor([[1, 2, 0, 4], [1, 2, 3, 4]])
    sample_b = torch.tensor([[1, 0, 3, 4], [0, 2, 3, 4]])
    # Position 0: 1+1-1, 1+0-0, 0+0-0, 0; position 1: 1+0-0 for every length.
    expected = torch.tensor([2, 2, 1, 1], dtype=torch.float64) / 2
    assert torch.equal(brier.brier_scores(sample_a, sample_b, target), expected)


def test_scores_reach_their_bounds() -> None:
    target = torch.zeros(3, 2, 4, dtype=torch.long)
    assert brier.brier_scores(target, target, target).tolist() == [1.0] * 4
    assert brier.brier_scores(target + 1, target + 1, target).tolist() == [-1.0] * 4


def test_shapes_must_agree() -> None:
    tokens = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="one shape"):
        brier.brier_scores(tokens, tokens[:1], tokens)
    with pytest.raises(ValueError, match="no position"):
        brier.brier_scores(tokens[:0], tokens[:0], tokens[:0])


def test_brierlm_clamps_each_score_before_the_product() -> None:
    assert brier.brierlm([0.16, 0.16, 0.16, 0.16]) == pytest.approx(16.0)
    assert brier.brierlm(torch.tensor([1.0, 1.0, 1.0, 1.0])) == pytest.approx(100.0)
    # The product of two negative scores is positive: it must not count.
    assert brier.brierlm([0.5, 0.5, -0.5, -0.5]) == 0.0
    with pytest.raises(ValueError, match=r"Brier-1\.\.4"):
        brier.brierlm([0.5, 0.5])


@pytest.mark.parametrize("num_draws", [2, 3, 7])
def test_draws_equal_the_average_over_all_pairs(num_draws: int) -> None:
    generator = torch.Generator().manual_seed(num_draws)
    draws = torch.randint(0, 2, (num_draws, 6, 4), generator=generator)
    target = torch.randint(0, 2, (6, 4), generator=generator)
    pairs = [
        brier.brier_scores(draws[a], draws[b], target)
        for a, b in itertools.combinations(range(num_draws), 2)
    ]
    scores = brier.scores_from_draws(draws, target).mean(0)
    torch.testing.assert_close(scores, torch.stack(pairs).mean(0))


def test_large_token_numbers_do_not_collide() -> None:
    draws = torch.tensor([[[2**31, 0]], [[0, 2**31]], [[2**31, 1]]])
    scores = brier.scores_from_draws(draws, torch.tensor([[9, 9]]))
    torch.testing.assert_close(scores, torch.tensor([[-1 / 3, 0.0]], dtype=torch.float64))


def naive_distribution(model: TinyTransformer, context: Tensor, length: int) -> Tensor:
    """P(a_1..a_length | context) over all V^length continuations, one forward each."""
    joint = torch.ones((), dtype=torch.float64)
    for _ in range(length):
        contexts = context if context.ndim == 2 else context[None]
        conditional = model(contexts)[:, -1].softmax(-1)
        joint = (joint.reshape(-1, 1) * conditional).reshape(-1)
        vocab = conditional.shape[-1]
        context = torch.cat(
            [
                contexts.repeat_interleave(vocab, 0),
                torch.arange(vocab).repeat(len(contexts))[:, None],
            ],
            dim=1,
        )
    return joint


@torch.no_grad()
def exact_scores(model: TinyTransformer, tokens: Tensor, start: int) -> list[float]:
    scores = []
    for n in range(1, brier.NGRAM + 1):
        joint = naive_distribution(model, tokens[:start], n)
        index = 0
        for token in tokens[start : start + n].tolist():
            index = index * VOCAB + token
        scores.append(float(2 * joint[index] - joint.square().sum()))
    return scores


def test_branches_equal_separate_forwards() -> None:
    """A branch token's logits are those of a plain sequence: prefix + the branch up to it."""
    model = TinyTransformer()
    tokens = torch.randint(0, VOCAB, (16,), generator=torch.Generator().manual_seed(1))
    starts = brier.aligned_starts(16, 4)
    branches = torch.randint(0, VOCAB, (3, 3), generator=torch.Generator().manual_seed(2))
    positions, mask = brier.branch_layout(16, starts, 3)
    extended = torch.cat([tokens, branches.reshape(-1)])
    together = model(extended[None], positions, mask)[0]
    torch.testing.assert_close(together[:16], model(tokens[None])[0])
    for depth, branch in itertools.product(range(3), range(3)):
        plain = torch.cat([tokens[: starts[branch]], branches[: depth + 1, branch]])
        torch.testing.assert_close(
            together[16 + 3 * depth + branch], model(plain[None])[0, -1], msg=f"{depth}, {branch}"
        )


def test_softmax_scores_are_exact_where_they_should_be() -> None:
    model = TinyTransformer()
    tokens = torch.randint(0, VOCAB, (12,), generator=torch.Generator().manual_seed(3))
    starts = brier.aligned_starts(12, 4)
    assert starts.tolist() == [4, 8]
    result = brier.scores_from_softmax(model, tokens, starts, num_draws=1, seed=0)
    for row, start in enumerate(starts.tolist()):
        # Brier-1 needs no sampling; fp32 inside.
        assert float(result.scores[row, 0]) == pytest.approx(
            exact_scores(model, tokens, start)[0], abs=1e-6
        )
    expected = torch.nn.functional.cross_entropy(
        model(tokens[None])[0, :-1], tokens[1:], reduction="none"
    )
    torch.testing.assert_close(result.nats.double(), expected, atol=1e-5, rtol=1e-5)


def test_softmax_scores_are_unbiased() -> None:
    """Mean over 300 runs of 10 draws within 5 standard errors of the sum over all 5^4
    continuations.

    12 values (n=1 is exact), two-sided Student t with 299 degrees of freedom: a correct estimator
    fails with probability < 1.2e-5, and the seeds are fixed.
    """
    model = TinyTransformer()
    tokens = torch.randint(0, VOCAB, (20,), generator=torch.Generator().manual_seed(4))
    starts = brier.aligned_starts(20, 4)
    runs = torch.stack(
        [
            brier.scores_from_softmax(model, tokens, starts, num_draws=10, seed=seed).scores
            for seed in range(300)
        ]
    )
    expected = torch.tensor(
        [exact_scores(model, tokens, start) for start in starts.tolist()], dtype=torch.float64
    )
    stderr = runs.std(0) / 300**0.5
    assert ((runs.mean(0) - expected).abs() <= 5 * stderr + 1e-6).all()
    assert (stderr[:, 1:] > 0).any(0).all() and (stderr < 2e-3).all()


def test_samples_and_softmax_have_one_expectation() -> None:
    """Samples drawn from the exact distribution score as the softmax does, within 4.5 standard
    errors (4 values: < 2.8e-5 to fail by chance)."""
    model = TinyTransformer(seed=2)
    tokens = torch.randint(0, VOCAB, (8,), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        joint = naive_distribution(model, tokens[:4], 4)
    index = torch.multinomial(
        joint.expand(2000, -1), 8, replacement=True, generator=torch.Generator().manual_seed(6)
    )
    digits = torch.stack([index // VOCAB**power % VOCAB for power in (3, 2, 1, 0)], -1)
    scores = brier.scores_from_draws(digits.transpose(0, 1), tokens[4:].expand(2000, -1))
    expected = torch.tensor(exact_scores(model, tokens, 4), dtype=torch.float64)
    stderr = scores.std(0) / 2000**0.5
    assert ((scores.mean(0) - expected).abs() <= 4.5 * stderr).all()


def test_standard_errors_against_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    blocks = 400
    values = 0.2 + 0.05 * rng.standard_normal((blocks, 4))
    result = brier.estimate_brierlm(values, seed=1, resamples=4000)
    closed = values.std(0) / blocks**0.5
    np.testing.assert_allclose(result.brier_stderr, closed, rtol=0.06)
    # Delta method: BrierLM = 100 · exp(mean of logs), independent columns.
    gradient = result.brierlm / (4 * values.mean(0))
    assert result.brierlm_stderr == pytest.approx(
        float(np.sqrt(((gradient * closed) ** 2).sum())), rel=0.06
    )
    assert result.undefined is None
    assert result == brier.estimate_brierlm(values, seed=1, resamples=4000)


def test_standard_error_is_undefined_on_the_clamp() -> None:
    values = np.array([[0.5, 0.2, 0.1, -0.1], [0.5, 0.2, 0.1, 0.05]])
    result = brier.estimate_brierlm(values)
    assert result.brierlm == 0.0 and result.brierlm_stderr is None
    assert result.undefined is not None and "Brier-4" in result.undefined
    assert result.brier_stderr is not None and result.brier_stderr[0] == 0.0


def test_one_block_has_no_standard_error() -> None:
    result = brier.estimate_brierlm(np.full((1, 4), 0.16))
    assert result.brierlm == pytest.approx(16.0)
    assert result.brierlm_stderr is None and result.brier_stderr is None
    assert result.undefined is not None and "two" in result.undefined
