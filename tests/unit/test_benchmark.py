"""The plain formulations compute what ours do, and a comparison says so."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCAB, tiny_model

from calm_dist.benchmark import plain
from calm_dist.benchmark.compare import Pair, compare, table
from calm_dist.benchmark.pairs import zipf_tokens
from calm_dist.evaluation.brier_tree import scores_from_softmax

CPU = torch.device("cpu")


def test_a_comparison_measures_time_memory_and_difference() -> None:
    def ours() -> list[torch.Tensor]:
        return [torch.ones(3)]

    def wasteful() -> list[torch.Tensor]:
        return [torch.ones(64 << 20)[:3] * 1.5]

    row = compare(Pair("ones", ours, wasteful, 3, "numbers", {}), 2, CPU)
    assert row["largest_difference"] == pytest.approx(1 / 3)
    assert row["plain"]["peak_mib"] > 200 > 20 > row["ours"]["peak_mib"]
    assert row["speedup"] > 1 and len(row["ours"]["all_seconds"]) == 2
    assert "| ones |" in table([row])


def test_plain_brier_has_the_same_expectation() -> None:
    """Brier-1..4 of a Transformer at five starts, within 4.5 standard errors of 300 runs."""
    model = tiny_model("transformer", block_steps=12)
    model.body.output_layer.weight.data.mul_(20)  # type: ignore[operator,union-attr]
    tokens = torch.randint(VOCAB, (12,), generator=torch.Generator().manual_seed(0))
    starts = torch.arange(2, 7)
    generator = torch.Generator().manual_seed(1)
    runs = torch.stack(
        [plain.transformer_brier(model.logits, tokens, starts, generator) for _ in range(300)]
    ).mean(1)
    ours = scores_from_softmax(
        model.logits, model.new_cache, tokens, starts, num_draws=500, seed=0
    ).scores.mean(0)
    assert runs[:, 3].std() > 0
    error = runs.std(0) / 300**0.5
    assert ((runs.mean(0) - ours).abs() < 4.5 * error + 1e-3).all()


def test_zipf_tokens_fall_as_one_over_rank() -> None:
    counts = zipf_tokens(50, 200_000, seed=0).bincount(minlength=50).double()
    expected = 200_000 / torch.arange(1, 51) / (1 / torch.arange(1, 51)).sum()
    assert ((counts - expected).square() / expected).sum() < 100  # chi², 49 degrees: p < 1e-4
