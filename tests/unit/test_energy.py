"""The energy score against the formula as written, autograd, and the authors' numbers."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

from calm_dist.losses import energy
from calm_dist.losses.energy import energy_score, energy_score_reference

GOLDEN = Path(__file__).parents[1] / "golden"


def inputs(
    samples: int = 5, draws: int = 7, positions: int = 150, size: int = 6, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    return (
        normal(samples, positions, size),
        normal(positions, size),
        normal(positions, size) * 0.3 - 1,
        normal(draws, positions, size),
    )


def gradient(score: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    weight = torch.linspace(0.1, 1, len(score))
    return torch.autograd.grad((score * weight).sum(), samples)[0]


@pytest.fixture(params=["products", "differences"])
def both_forms(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form of distances for CPUs and that for GPUs."""
    form = getattr(energy, f"_squared_by_{request.param}")
    monkeypatch.setattr(energy, "_squared_distances_on", lambda device: form)


@pytest.mark.usefixtures("both_forms")
@pytest.mark.parametrize("beta", [0.25, 0.5, 1.0, 1.5, 1.9])
@pytest.mark.parametrize("positions", [1, 127, 300])
def test_score_and_gradient_equal_the_formula(beta: float, positions: int) -> None:
    samples, mean, log_std, noise = inputs(positions=positions)
    samples.requires_grad_()
    ours = energy_score(samples, mean, log_std, noise, beta)
    formula = energy_score_reference(samples, mean, log_std, noise, beta)
    torch.testing.assert_close(ours, formula, rtol=1e-5, atol=1e-5)
    expected = gradient(formula, samples)
    error = (gradient(ours, samples) - expected).abs().max() / expected.abs().max()
    assert error < 2e-5


def test_reference_is_the_released_formula_in_double_precision() -> None:
    """All N·N pairs, the diagonal included, as the released code sums them."""
    samples, mean, log_std, noise = (x.double() for x in inputs(positions=4))
    count = len(samples)
    draws = mean + noise * log_std.exp()
    between = torch.linalg.norm(samples[:, None] - samples[None], dim=-1).sum((0, 1))
    to_draws = torch.linalg.norm(samples[:, None] - draws[None], dim=-1).mean((0, 1))
    expected = between / (count * (count - 1)) - 2 * to_draws
    ours = energy_score_reference(samples, mean, log_std, noise)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
def test_golden(beta: float) -> None:
    io = load_file(GOLDEN / "energy.safetensors")
    names = ("latent_samples", "target_mean", "target_log_std", "target_eps")
    samples, mean, log_std, noise = (io[name] for name in names)
    score = energy_score(samples, mean, log_std, noise, beta)
    expected = io["energy_score" if beta == 1.0 else f"energy_score_beta{beta}"]
    assert (score - expected).abs().max() / expected.abs().max() < 1e-5


@pytest.mark.usefixtures("both_forms")
@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 1.9])
def test_gradient_is_finite_where_samples_meet(beta: float) -> None:
    samples, mean, log_std, noise = inputs(positions=3)
    samples[1] = samples[0]
    samples[2] = mean + noise[0] * log_std.exp()
    samples.requires_grad_()
    for function in (energy_score, energy_score_reference):
        score = function(samples, mean, log_std, noise, beta)
        assert torch.isfinite(score).all()
        assert torch.isfinite(gradient(score, samples)).all()


@pytest.mark.usefixtures("both_forms")
@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
def test_score_and_gradient_where_samples_coincide_or_nearly(beta: float) -> None:
    samples, mean, log_std, noise = inputs(positions=70)
    samples[1] = samples[0]
    samples[3] = samples[2] + 1e-2 * samples[3]
    samples[4] = mean + (noise[0] + 1e-2 * noise[1]) * log_std.exp()
    samples.requires_grad_()
    ours = energy_score(samples, mean, log_std, noise, beta)
    formula = energy_score_reference(samples, mean, log_std, noise, beta)
    torch.testing.assert_close(ours, formula, rtol=1e-5, atol=1e-5)
    expected = gradient(formula, samples)
    error = (gradient(ours, samples) - expected).abs().max() / expected.abs().max()
    assert error < 1e-4


def test_the_form_for_gpus_depends_on_no_number() -> None:
    """A fake tensor has none to read."""
    with FakeTensorMode(), torch.no_grad():
        x, z = torch.empty(3, 8, 16, device="cuda"), torch.empty(3, 100, 16, device="cuda")
        value, gradients = energy._mean_power(x, z, 1.0, needs_gradient=True)
        assert value.shape == (3,) and gradients is not None and gradients.shape == x.shape


@pytest.mark.usefixtures("both_forms")
def test_near_draws_do_not_lose_digits() -> None:
    """A distance of 1e-3 between vectors of size 100, where a product would cancel."""
    samples, mean, log_std, noise = inputs(positions=8, size=4)
    offset = torch.tensor([100.0, 0, 0, 0])
    samples = (mean + offset + 1e-3 * samples).requires_grad_()
    noise = offset / log_std.exp() + 0 * noise
    ours = energy_score(samples, mean, log_std, noise)
    formula = energy_score_reference(
        samples.double(), mean.double(), log_std.double(), noise.double()
    )
    # What is left is the rounding of the inputs themselves, 100 * 2^-24.
    assert (ours - formula).abs().max() < 2e-5


def test_draws_inside_are_seeded_and_unbiased() -> None:
    samples, mean, log_std, _ = inputs(positions=130)
    first = energy_score(samples, mean, log_std, num_draws=50, seed=3)
    assert torch.equal(first, energy_score(samples, mean, log_std, num_draws=50, seed=3))
    assert not torch.equal(first, energy_score(samples, mean, log_std, num_draws=50, seed=4))
    # Means over 200 seeds and over one large noise tensor: both estimate the same number. The
    # bound is 5 standard errors of the difference, estimated from the seeds themselves.
    many = torch.stack(
        [energy_score(samples, mean, log_std, num_draws=20, seed=s).mean() for s in range(200)]
    )
    noise = torch.randn(4000, *mean.shape, generator=torch.Generator().manual_seed(9))
    exact = energy_score(samples, mean, log_std, noise).mean()
    assert (many.mean() - exact).abs() < 5 * many.std() * (1 / 200 + 20 / 4000) ** 0.5


def test_posterior_that_needs_a_gradient_gets_one() -> None:
    samples, mean, log_std, noise = inputs(positions=5)
    mean.requires_grad_()
    score = energy_score(samples, mean, log_std, noise)
    assert torch.autograd.grad(score.sum(), mean)[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": torch.zeros(1, 4, 2)}, "N >= 2"),
        ({"mean": torch.zeros(3, 2)}, "mean"),
        ({"noise": torch.zeros(6, 4, 3)}, "noise"),
        ({"beta": 2.0}, "beta"),
        ({"beta": 0.0}, "beta"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    good: dict[str, object] = {
        "samples": torch.zeros(3, 4, 2),
        "mean": torch.zeros(4, 2),
        "log_std": torch.zeros(4, 2),
        "noise": torch.zeros(6, 4, 2),
        "beta": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        energy_score(**(good | change))  # type: ignore[arg-type]


def test_no_draws_are_refused() -> None:
    samples, posterior = torch.zeros(2, 4, 2), torch.zeros(4, 2)
    for given in ({"num_draws": 0}, {"noise": torch.zeros(0, 4, 2)}):
        with pytest.raises(ValueError, match="no draws"):
            energy_score(samples, posterior, posterior, **given)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_modes_change_nothing(threads: int) -> None:
    """Bit for bit on one thread and on two, in inference mode and under autocast."""
    samples, mean, log_std, noise = inputs()
    expected = energy_score(samples, mean, log_std, noise)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            assert torch.equal(energy_score(samples, mean, log_std, noise), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(energy_score(samples, mean, log_std, noise), expected)
        of_seed = energy_score(samples, mean, log_std, num_draws=7, seed=3)
        assert torch.equal(of_seed, energy_score(samples, mean, log_std, num_draws=7, seed=3))
        assert not torch.equal(of_seed, energy_score(samples, mean, log_std, num_draws=7, seed=4))
        found: list[int] = []
        new_thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        new_thread.start()
        new_thread.join()
        assert found == [threads] and torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
