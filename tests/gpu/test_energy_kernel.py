"""The fused energy score against the formula; without a GPU in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="the energy kernel needs triton: pip install '.[gpu]'")

from calm_dist.losses.energy import energy_score_reference  # noqa: E402
from calm_dist.losses.energy_kernel import fused_energy_score  # noqa: E402

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")


def inputs(n: int, s: int, size: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.randn(n, s, size, generator=generator, device=DEVICE)
    mean = torch.randn(s, size, generator=generator, device=DEVICE)
    log_std = 0.3 * torch.randn(s, size, generator=generator, device=DEVICE) - 1
    return x, mean, log_std


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
@pytest.mark.parametrize(("n", "m", "s", "size"), [(8, 100, 3, 128), (2, 1, 2, 5), (17, 33, 2, 40)])
def test_given_noise_gives_the_formula(beta: float, n: int, m: int, s: int, size: int) -> None:
    x, mean, log_std = inputs(n, s, size)
    noise = torch.randn(m, s, size, device=DEVICE)
    results = []
    for score_of in (fused_energy_score, energy_score_reference):
        leaf = x.clone().requires_grad_()
        score = score_of(leaf, mean, log_std, noise, beta)
        weights = torch.arange(1.0, s + 1, device=DEVICE)
        results.append([score.detach(), *torch.autograd.grad((score * weights).sum(), leaf)])
    for ours, expected in zip(*results, strict=True):
        assert (ours - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_coinciding_samples_have_finite_gradients(beta: float) -> None:
    x, mean, log_std = inputs(4, 2, 16)
    x[1] = x[0]
    noise = torch.randn(20, 2, 16, device=DEVICE)
    noise[3] = (x[2] - mean) / log_std.exp()
    leaf = x.requires_grad_()
    score = fused_energy_score(leaf, mean, log_std, noise, beta)
    (gradient,) = torch.autograd.grad(score.sum(), leaf)
    expected = energy_score_reference(x, mean, log_std, noise, beta)
    assert torch.allclose(score, expected, rtol=1e-5)
    assert gradient.isfinite().all()


def test_draws_are_normal_and_differ() -> None:
    """Of a single sample pair far away, ‖z - x‖² - ‖x‖² has the mean of the draws' squares. The
    score of 20,000 draws is within 5 standard errors of that of torch's."""
    x, mean, log_std = inputs(2, 4, 8)
    scores = [fused_energy_score(x, mean, log_std, num_draws=20_000, seed=seed) for seed in (0, 1)]
    assert (scores[0] != scores[1]).all()
    noise = torch.randn(20_000, 4, 8, device=DEVICE)
    single = (mean + noise * log_std.exp() - x[0]).norm(dim=-1)
    error = 2 * 2**0.5 * single.std(0) / 20_000**0.5
    expected = energy_score_reference(x, mean, log_std, noise)
    for score in scores:
        assert ((score - expected).abs() < 5 * error).all()


def test_draws_do_not_depend_on_how_positions_are_split() -> None:
    x, mean, log_std = inputs(3, 6, 20)
    whole = fused_energy_score(x, mean, log_std, num_draws=7, seed=5)
    parts = [
        fused_energy_score(
            x[:, cut], mean[cut], log_std[cut], num_draws=7, seed=5, first_position=cut.start
        )
        for cut in (slice(0, 2), slice(2, 6))
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_bf16_samples_get_bf16_gradients() -> None:
    x, mean, log_std = inputs(4, 2, 16)
    noise = torch.randn(10, 2, 16, device=DEVICE)
    leaf = x.bfloat16().requires_grad_()
    score = fused_energy_score(leaf, mean, log_std, noise)
    (gradient,) = torch.autograd.grad(score.sum(), leaf)
    assert score.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    assert torch.allclose(score, energy_score_reference(leaf, mean, log_std, noise), rtol=1e-5)
