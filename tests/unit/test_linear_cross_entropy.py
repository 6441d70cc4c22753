"""The cross entropy that keeps no logits, against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from calm_dist.benchmark.compare import peak_mib
from calm_dist.costs import chunks
from calm_dist.losses.linear_cross_entropy import linear_cross_entropy, weighted_cross_entropy

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(rows: int, vocab: int = 37, size: int = 8) -> Inputs:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, size, generator=generator).requires_grad_()
    weight = torch.randn(vocab, size, generator=generator).requires_grad_()
    return hidden, weight, torch.randint(0, vocab, (rows,), generator=generator)


def with_gradients(loss: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> Inputs:
    of_hidden, of_weight = torch.autograd.grad(3.5 * loss, (hidden, weight))
    return loss.detach(), of_hidden, of_weight


@pytest.mark.parametrize("rows_at_once", [1, 4, 100])
@pytest.mark.parametrize("rows", [1, 4, 10])
def test_equals_the_plain_form(
    rows: int, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "LOGITS", 37 * rows_at_once)
    hidden, weight, targets = inputs(rows)
    ours = with_gradients(linear_cross_entropy(hidden, weight, targets), hidden, weight)
    plain = with_gradients(F.cross_entropy(hidden @ weight.T, targets), hidden, weight)
    for found, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_weight_shared_with_the_embedding_gets_both_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunks, "LOGITS", 37 * 3)
    _, weight, targets = inputs(7)
    words = targets.flip(0)
    (ours,) = torch.autograd.grad(linear_cross_entropy(weight[words], weight, targets), weight)
    (plain,) = torch.autograd.grad(F.cross_entropy(weight[words] @ weight.T, targets), weight)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_rows_without_weight_do_not_count() -> None:
    """Nor do words that only pad the layer."""
    hidden, weight, targets = inputs(9)
    targets = targets.clamp(max=29)
    row_weight = torch.tensor([0.0, 1.0, 0.5] * 3)
    ours = with_gradients(
        weighted_cross_entropy(hidden, weight, targets, row_weight, at_once=37 * 2, real_words=30),
        hidden,
        weight,
    )
    losses = F.cross_entropy(hidden @ weight[:30].T, targets, reduction="none")
    plain = with_gradients((losses * row_weight).sum(), hidden, weight)
    for found, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not ours[1][::3].any() and not ours[2][30:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_that_of_a_chunk(dtype: torch.dtype) -> None:
    rows, words, size, chunk = 4096, 8192, 8, 64
    hidden = torch.randn(rows, size, dtype=dtype).requires_grad_()
    weight = torch.randn(words, size, dtype=dtype).requires_grad_()
    targets, row_weight = torch.randint(0, words, (rows,)), torch.ones(rows)

    def step() -> None:
        loss = weighted_cross_entropy(hidden, weight, targets, row_weight, at_once=chunk * words)
        torch.autograd.grad(loss, (hidden, weight))

    step()
    peak, _ = peak_mib(step, torch.device("cpu"))
    # Of the whole process, hence wrong by some MiB. A chunk's logits take 2 MiB, in bf16 with the
    # products before and the gradient after them 4 MiB.
    all_logits = rows * words * 4 / 2**20
    assert all_logits == 128 and peak is not None and peak < all_logits / 8


def test_large_logits_stay_finite() -> None:
    hidden, weight, targets = inputs(6)
    hidden = (1e4 * hidden).detach().requires_grad_()
    loss, *gradients = with_gradients(linear_cross_entropy(hidden, weight, targets), hidden, weight)
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, targets).detach())
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_under_autocast_the_products_are_those_of_a_layer() -> None:
    hidden, weight, targets = inputs(10)
    with torch.autocast("cpu", torch.bfloat16):
        ours = with_gradients(linear_cross_entropy(hidden, weight, targets), hidden, weight)
        logits = F.linear(hidden, weight)
        assert logits.dtype == torch.bfloat16
        plain = with_gradients(F.cross_entropy(logits.float(), targets), hidden, weight)
    assert [part.dtype for part in ours] == [torch.float32] * 3
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-6, atol=1e-6)
    for found, expected in zip(ours[1:], plain[1:], strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_without_gradients_there_are_none() -> None:
    hidden, weight, targets = inputs(4)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, targets).detach())
