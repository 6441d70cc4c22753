"""Arg-max without all logits, against all logits."""

from __future__ import annotations

import pytest
import torch

from calm_dist.inference.decoding import GreedyDecoder, LazyPatches
from calm_dist.models.autoencoder import Autoencoder, AutoencoderConfig

COARSE = torch.cpu._is_vnni_supported()


def decoder(vocab_size: int, scale: float = 1.0, patch_size: int = 2) -> GreedyDecoder:
    torch.manual_seed(0)
    config = AutoencoderConfig(
        vocab_size, patch_size, latent_size=8, hidden_size=64, intermediate_size=96
    )
    model = Autoencoder(config).eval().requires_grad_(False)
    model.output_weight.copy_(scale * torch.randn(vocab_size, 64))
    return GreedyDecoder(model)


def expected(greedy: GreedyDecoder, hidden: torch.Tensor) -> torch.Tensor:
    return (hidden.double() @ greedy._weight.double().T).argmax(-1)


@pytest.mark.parametrize("vocab_size", [1, 100, 128, 1000, 5000])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_tokens_are_those_of_all_logits(vocab_size: int, scale: float) -> None:
    greedy = decoder(vocab_size, scale)
    hidden = torch.randn(300, 64)
    assert torch.equal(greedy.tokens(hidden), expected(greedy, hidden))
    assert greedy.tokens(hidden[:0]).shape == (0,)


@pytest.mark.parametrize("hidden_size", [1, 2, 3, 33, 100])
@pytest.mark.parametrize("vocab_size", [1, 7, 500])
def test_odd_sizes(hidden_size: int, vocab_size: int) -> None:
    config = AutoencoderConfig(
        vocab_size, 2, latent_size=8, hidden_size=hidden_size, intermediate_size=8
    )
    model = Autoencoder(config).eval().requires_grad_(False)
    model.output_weight.copy_(torch.randn(vocab_size, hidden_size))
    greedy = GreedyDecoder(model)
    for rows in (1, 2, 17):
        # Not contiguous, as what is cut out of all tokens of a patch.
        hidden = torch.randn(rows, 2, hidden_size)[:, 1]
        assert torch.equal(greedy.tokens(hidden), expected(greedy, hidden))


def test_words_that_int8_cannot_tell_apart() -> None:
    """Of rows that are equal in int8 only fp32 knows the largest; of equal ones it is the first."""
    greedy = decoder(1000)
    weight = greedy._weight
    weight[100:200] = weight[100] * (1 + 1e-4 * torch.randperm(100)[:, None] / 100)
    step = weight.abs().max() / 127
    assert len((weight[100:200] / step).round().unique(dim=0)) < 10
    weight[700] = weight[3]
    hidden = torch.cat([weight[100:200] * 2, weight[[3]]])
    tokens = greedy.tokens(hidden)
    assert torch.equal(tokens, expected(greedy, hidden))
    assert set(tokens[:100].tolist()) <= set(range(100, 200)) and tokens[-1] == 3


@pytest.mark.skipif(not COARSE, reason="this CPU does not multiply int8 fast")
@pytest.mark.parametrize("outlier", [1.0, 30.0])
def test_the_bound_holds_and_few_words_are_looked_at_again(
    monkeypatch: pytest.MonkeyPatch, outlier: float
) -> None:
    """Also where one dimension is so large that int8 has few steps for the others."""
    greedy = decoder(5000)
    greedy._weight[:, 3] *= outlier
    hidden = torch.randn(300, 64)
    hidden[:, 5] *= outlier
    logits, worth, bound = greedy._coarse_logits(hidden)
    error = logits[:, :5000] * worth[:, None] - hidden.double() @ greedy._weight.double().T
    assert (error.abs().amax(-1) <= bound).all()
    # It is no larger than it must be to be of use.
    assert (error.abs().amax(-1) > bound / 20).any()
    if outlier == 1:
        # And with all logits out of reach.
        monkeypatch.setattr(GreedyDecoder, "_all_logits", None)
    assert torch.equal(greedy.tokens(hidden), expected(greedy, hidden))


def test_logits_that_are_all_alike_or_not_finite_are_worked_out_in_full() -> None:
    greedy = decoder(1000)
    greedy._weight[:] = greedy._weight[0]
    hidden = torch.randn(5, 64)
    assert torch.equal(greedy.tokens(hidden), greedy._all_logits(hidden))
    hidden = torch.full((2, 64), torch.nan)
    assert torch.equal(greedy.tokens(hidden), (hidden @ greedy._weight.T).argmax(-1))


@pytest.mark.parametrize("count", [5, 40])
def test_lazy_patches_are_the_decoders(count: int) -> None:
    """A few, whose tokens are worked out together, and more."""
    greedy = decoder(500, patch_size=4)
    latents = torch.randn(count, 8)
    whole = greedy.tokens(greedy.hidden(latents).flatten(0, 1)).view(count, 4)
    patches = LazyPatches(greedy, latents)
    assert len(patches) == count
    assert patches.tokens([3, 4, 3], 1) == whole[[3, 4, 3], 1].tolist()
    assert patches.tokens(list(range(count)), 0) == whole[:, 0].tolist()
    for position in (1, 2, 3):
        assert patches.tokens([1, 4], position) == whole[[1, 4], position].tolist()
    assert patches.tokens(list(range(count)), 3) == whole[:, 3].tolist()
    assert [patches.patch(row) for row in range(count)] == [tuple(row) for row in whole.tolist()]
