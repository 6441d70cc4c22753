"""The fused energy score against the formula; without a GPU in Triton's interpreter."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="needs triton, as bash tools/run_tests.sh installs it")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from calm_dist.losses import energy_kernel  # noqa: E402
from calm_dist.losses.energy import energy_score_reference  # noqa: E402
from calm_dist.losses.energy_kernel import fused_energy_score  # noqa: E402
from calm_dist.models.heads.energy import EnergyHead  # noqa: E402
from calm_dist.parallel.noise import KeyedNoise  # noqa: E402
from calm_dist.recipe import HeadRecipe  # noqa: E402

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")


def keys_of(positions: int, first: int) -> torch.Tensor:
    return first + torch.arange(positions, device=DEVICE)


def inputs(n: int, s: int, size: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.randn(n, s, size, generator=generator, device=DEVICE)
    mean = torch.randn(s, size, generator=generator, device=DEVICE)
    log_std = 0.3 * torch.randn(s, size, generator=generator, device=DEVICE) - 1
    return x, mean, log_std


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
@pytest.mark.parametrize(
    ("n", "m", "s", "size"), [(8, 100, 3, 128), (2, 1, 1, 7), (17, 33, 2, 40), (64, 20, 1, 256)]
)
def test_given_noise_gives_the_formula(beta: float, n: int, m: int, s: int, size: int) -> None:
    x, mean, log_std = inputs(n, s, size)
    noise = torch.randn(m, s, size, device=DEVICE)
    results = []
    for score_of in (fused_energy_score, energy_score_reference):
        leaf = x.clone().requires_grad_()
        score = score_of(leaf, mean, log_std, noise=noise, beta=beta)
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
    score = fused_energy_score(leaf, mean, log_std, noise=noise, beta=beta)
    (gradient,) = torch.autograd.grad(score.sum(), leaf)
    expected = energy_score_reference(x, mean, log_std, noise, beta)
    assert torch.allclose(score, expected, rtol=1e-5)
    assert gradient.isfinite().all()


def test_a_sample_that_is_no_number_shows_in_the_score() -> None:
    x, mean, log_std = inputs(4, 3, 16)
    x[2, 1, 5] = float("nan")
    noise = torch.randn(20, 3, 16, device=DEVICE)
    score = fused_energy_score(x, mean, log_std, noise=noise, beta=1.0)
    assert score.isnan().tolist() == [False, True, False]


def test_draws_are_normal_and_differ() -> None:
    """Of a single sample pair far away, ‖z - x‖² - ‖x‖² has the mean of the draws' squares. The
    score of 4,000 draws is within 5 standard errors of that of torch's."""
    x, mean, log_std = inputs(2, 4, 8)
    scores = [
        fused_energy_score(x, mean, log_std, keys_of(4, first), num_draws=4_000)
        for first in (0, 2**40)
    ]
    assert (scores[0] != scores[1]).all()
    noise = torch.randn(4_000, 4, 8, device=DEVICE)
    single = (mean + noise * log_std.exp() - x[0]).norm(dim=-1)
    error = 2 * 2**0.5 * single.std(0) / 4_000**0.5
    expected = energy_score_reference(x, mean, log_std, noise)
    for score in scores:
        assert ((score - expected).abs() < 5 * error).all()


def test_draws_are_normal_by_their_distribution() -> None:
    """Kolmogorov-Smirnov on the numbers themselves, each component apart, moments of their squares,
    and correlations between components, which come in pairs from one radius and angle."""
    from scipy import stats

    draws = drawn_numbers(200, 64, seed=11)
    pvalues = [stats.kstest(column, "norm").pvalue for column in draws.T]
    # 64 tests at a level of 1e-4 each.
    assert min(pvalues) > 1e-4
    flat = draws.ravel()
    assert stats.kstest(flat, "norm").pvalue > 1e-4
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = (variance / len(flat)) ** 0.5
        assert abs((flat**power).mean() - expected) < 5 * error
    for values in (draws, draws**2):
        correlations = np.corrcoef(values.T) - np.eye(64)
        # Of 2,016 pairs.
        assert abs(correlations).max() < 5.5 / 200**0.5


@triton.jit
def _pairs(radii, angles, pairs, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The kernel's normal numbers of given random bits, unsigned as the generator's are."""
    here = tl.arange(0, COUNT)
    of_radius = tl.load(radii + here).to(tl.uint32, bitcast=True)
    of_angle = tl.load(angles + here).to(tl.uint32, bitcast=True)
    first, second = energy_kernel._normal_pair(of_radius, of_angle)
    tl.store(pairs + here, first)
    tl.store(pairs + COUNT + here, second)


def test_normal_numbers_are_right_on_the_whole_circle() -> None:
    """Against the formula in fp64, for angles from none to a whole turn."""
    count = 1024
    angles = torch.linspace(-(2**31), 2**31 - 1, count, dtype=torch.float64).round()
    # Close to 2^31, rounding of the uniform number shows in a radius near zero.
    radii = torch.linspace(0, 2**29, count, dtype=torch.float64).round()
    found = torch.empty(2, count, device=DEVICE)
    bits = [numbers.to(torch.int32).to(DEVICE) for numbers in (radii, angles)]
    _pairs[(1,)](*bits, found, COUNT=count)
    radius = (-2 * ((radii + 0.5) / 2**31).log()).sqrt()
    turn = 2 * torch.pi * angles / 2**32
    expected = torch.stack([radius * turn.cos(), radius * turn.sin()])
    assert (found.cpu() - expected).abs().max() < 2e-6


def drawn_numbers(draws: int, size: int, seed: int) -> np.ndarray:
    """[draws, size]: the kernel's own numbers. With both samples at the posterior's mean and one
    draw z, the score is -2 ‖z‖ and its gradient with respect to a sample is z/‖z‖."""
    leaf = torch.zeros(2, draws, size, device=DEVICE, requires_grad=True)
    posterior = torch.zeros(draws, size, device=DEVICE)
    score = fused_energy_score(leaf, posterior, posterior, keys_of(draws, seed), num_draws=1)
    (gradient,) = torch.autograd.grad(score.sum(), leaf)
    return (gradient[0] * (-score.detach() / 2)[:, None]).cpu().numpy()


def test_draws_do_not_depend_on_how_positions_are_split() -> None:
    x, mean, log_std = inputs(3, 6, 20)
    keys = keys_of(6, 5)
    whole = fused_energy_score(x, mean, log_std, keys, num_draws=7)
    parts = [
        fused_energy_score(x[:, cut], mean[cut], log_std[cut], keys[cut], num_draws=7)
        for cut in (slice(0, 2), slice(2, 6))
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_draws_or_their_keys_are_given() -> None:
    x, mean, log_std = inputs(2, 2, 8)
    with pytest.raises(ValueError, match="either keys of the draws or noise"):
        fused_energy_score(x, mean, log_std)


def test_the_head_trains_with_the_kernel() -> None:
    """The same loss as with torch's score, but for noise and draws: the mean over positions agrees
    within 5 standard errors, the gradient points the same way; and a rank's part of the positions
    has the losses of the whole."""
    recipe = HeadRecipe(num_mlp_layers=1, num_samples=4, posterior_samples=50, noise_size=8)
    torch.manual_seed(0)
    head = EnergyHead(recipe, 32, 16).to(DEVICE)
    _, mean, log_std = inputs(1, 200, 16)
    hidden = torch.randn(200, 32, device=DEVICE)
    noise = KeyedNoise(7, 3, [11, 4], 0, 100, DEVICE)
    found = {}
    for kernel in ("torch", "triton"):
        head.kernel = kernel
        losses = head.position_loss(hidden, mean, log_std, noise)
        gradients = torch.autograd.grad(losses.mean(), list(head.parameters()))
        found[kernel] = losses.detach(), torch.cat([g.flatten() for g in gradients])
    difference = found["torch"][0] - found["triton"][0]
    assert difference.abs().mean() > 0
    assert difference.mean().abs() < 5 * difference.std() / 200**0.5
    assert torch.cosine_similarity(found["torch"][1], found["triton"][1], dim=0) > 0.97
    part = KeyedNoise(7, 3, [11, 4], 30, 90, DEVICE)
    rows = torch.cat([torch.arange(30, 90), torch.arange(130, 190)])
    losses = head.position_loss(hidden[rows], mean[rows], log_std[rows], part)
    assert torch.allclose(losses, found["triton"][0][rows], rtol=1e-5)


def test_bf16_samples_get_bf16_gradients() -> None:
    x, mean, log_std = inputs(4, 2, 16)
    noise = torch.randn(10, 2, 16, device=DEVICE)
    leaf = x.bfloat16().requires_grad_()
    score = fused_energy_score(leaf, mean, log_std, noise=noise)
    (gradient,) = torch.autograd.grad(score.sum(), leaf)
    assert score.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    assert torch.allclose(score, energy_score_reference(leaf, mean, log_std, noise), rtol=1e-5)
