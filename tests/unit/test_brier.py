"""BrierLM against definitions, naive loops and known distributions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from calm_dist.evaluation import brier


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
    with pytest.raises(ValueError, match="the same shape"):
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


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("num_draws", [2, 8])
def test_scores_of_draws_are_unbiased(num_draws: int, seed: int) -> None:
    """2,000 positions of one known distribution over the 3^4 n-grams, within 4.5 standard errors.

    Four values: a correct estimator fails with probability < 2.8e-5 for any seed.
    """
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(3**4, generator=generator, dtype=torch.float64) ** 4
    probabilities /= probabilities.sum()
    number = torch.multinomial(probabilities, num_draws * 2000, True, generator=generator)
    draws = torch.stack([number // 3**power % 3 for power in (3, 2, 1, 0)], -1)
    target = torch.tensor([1, 0, 2, 2])
    scores = brier.scores_from_draws(draws.view(num_draws, 2000, 4), target.expand(2000, 4))
    joint = probabilities.view(3, 3, 3, 3)
    for n in range(1, 5):
        marginal = joint.sum(tuple(range(n, 4))) if n < 4 else joint
        expected = 2 * marginal[tuple(target[:n])] - marginal.square().sum()
        error = scores[:, n - 1].std() / 2000**0.5
        assert abs(scores[:, n - 1].mean() - expected) <= 4.5 * error
        # A pair of a draw with itself would add this much.
        assert (1 - marginal.square().sum()) / num_draws > 9 * error


@pytest.mark.parametrize("num_tokens", [3, 8, 9, 24, 31])
@pytest.mark.parametrize("patch_size", [1, 2, 3, 4, 8])
def test_starts_of_ngrams(patch_size: int, num_tokens: int) -> None:
    every = [q for q in range(num_tokens) if q >= patch_size and q + 4 <= num_tokens]
    assert brier.ngram_starts(num_tokens, patch_size, "all").tolist() == every
    aligned = [q for q in every if q % patch_size == 0]
    assert brier.ngram_starts(num_tokens, patch_size).tolist() == aligned


def test_standard_errors_against_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    blocks = 400
    values = 0.2 + 0.05 * rng.standard_normal((blocks, 4))
    result = brier.estimate_brierlm(values, seed=1, resamples=4000)
    closed = values.std(0, ddof=1) / blocks**0.5
    assert result.brier_stderr is not None
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


@pytest.mark.parametrize("blocks", [2, 4])
def test_standard_errors_of_few_blocks(blocks: int) -> None:
    """The closed form s / sqrt(n); means of resampled blocks alone vary less, by (n - 1) / n."""
    values = 0.2 + 0.05 * np.random.default_rng(0).random((blocks, 4))
    result = brier.estimate_brierlm(values, resamples=20_000)
    assert result.brier_stderr is not None
    closed = values.std(0, ddof=1) / blocks**0.5
    # A standard deviation of 20,000 numbers has an error of 0.5%.
    np.testing.assert_allclose(result.brier_stderr, closed, rtol=0.025)
