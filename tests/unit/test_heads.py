"""The generative heads: values of the released code, layouts of noise, what they can learn."""

from __future__ import annotations

from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from calm_dist.errors import RecipeError
from calm_dist.heads import all_specs
from calm_dist.heads.energy import EnergySpec
from calm_dist.models.heads import GenerativeHead, latent_head, make_head
from calm_dist.models.heads.diffusion import (
    DiffusionHead,
    DiffusionSchedule,
    cosine_alpha_bar,
    schedule,
)
from calm_dist.models.heads.energy import EnergyHead
from calm_dist.models.heads.flow import FlowHead
from calm_dist.models.weights import head_init_std
from calm_dist.parallel.noise import KeyedNoise
from calm_dist.recipe import HeadRecipe, load_recipe
from calm_dist.training.build import build_head, check_randomness

GOLDEN = Path(__file__).parents[1] / "golden"
RECIPE = Path(__file__).parents[1] / "recipes" / "calm_4_layers.yaml"
CPU = torch.device("cpu")
HIDDEN, LATENT = 24, 16
# The tokens head has tests of its own.
LATENT_HEADS = [kind for kind, spec in all_specs().items() if spec.predicts == "latents"]


def golden_head(kind: str) -> GenerativeHead:
    head = latent_head(make_head(HeadRecipe(kind=kind, num_mlp_layers=2), HIDDEN, LATENT))
    head.load_state_dict(load_file(GOLDEN / f"{kind}_head.safetensors"))
    return head


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.fixture(scope="module")
def io() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "heads_io.safetensors")


@torch.no_grad()
def test_flow_equals_the_released_code(io: dict[str, torch.Tensor]) -> None:
    head = golden_head("flow")
    assert isinstance(head, FlowHead)
    start = io["x0_or_noise"][None]
    loss = head.path_loss(io["z"], io["target"][None], start, io["flow.t"][None])
    assert_close(loss[0], io["flow.loss"], 2e-6)
    assert_close(head.sample(io["z"], start)[0], io["flow.sample"])


@torch.no_grad()
def test_diffusion_equals_the_released_code(io: dict[str, torch.Tensor]) -> None:
    head = golden_head("diffusion")
    assert isinstance(head, DiffusionHead)
    start = io["x0_or_noise"][None]
    loss = head.level_loss(io["z"], io["target"][None], start, io["diff.t"][None])
    assert_close(loss[0], io["diff.loss"], 2e-6)
    noise = torch.cat([start, io["diff.step_noise"]])[:, None]
    assert_close(head.sample(io["z"], noise)[0], io["diff.sample"])


@torch.no_grad()
def test_diffusion_at_the_first_level_equals_the_released_code(io: dict[str, torch.Tensor]) -> None:
    """There the bound is a probability of one of 256 levels; targets inside -1..1 and beyond."""
    head = golden_head("diffusion")
    assert isinstance(head, DiffusionHead)
    target = io["first_level.target"]
    levels = torch.zeros(1, len(target), dtype=torch.long)
    loss = head.level_loss(io["z"], target[None], io["x0_or_noise"][None], levels)
    assert_close(loss[0], io["first_level.loss"])


def test_levels_for_sampling_lie_on_the_trained_ones() -> None:
    trained = cosine_alpha_bar()
    for steps in (2, 7, 100, 1000):
        some = schedule(steps)
        assert len(some) == steps and some.times[0] == 0
        assert some.times[-1] == 999
        torch.testing.assert_close(
            some.signal.double() ** 2, trained[some.times], atol=1e-7, rtol=0
        )
        assert all(part.isfinite().all() for part in (some.log_beta, some.log_posterior_variance))


def test_any_name_may_be_initialised() -> None:
    """Only the backbone's projections of these names add to a residual stream."""
    model = load_recipe(RECIPE, ["model.init=fan_in"]).model
    assert model.kind == "calm"
    std = head_init_std(model)
    assert std("head.linear_fc2.weight", torch.Size([4, 16])) == 0.25


@torch.no_grad()
def test_the_diffusion_head_copies_its_tables_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy to a GPU is a wait of the host; the device of shapes stands for one."""
    copies: list[torch.device] = []
    real = DiffusionSchedule.to

    def copied(self: DiffusionSchedule, device: torch.device) -> DiffusionSchedule:
        copies.append(device)
        return real(self, device)

    monkeypatch.setattr(DiffusionSchedule, "to", copied)
    recipe = HeadRecipe(kind="diffusion", num_mlp_layers=1, sampling_steps=5)
    head = make_head(recipe, 8, 4).to("meta")
    assert isinstance(head, DiffusionHead)
    hidden, latents = torch.empty(3, 8, device="meta"), torch.empty(2, 3, 4, device="meta")
    levels = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    noise = torch.empty(head.num_steps + 1, 2, 3, 4, device="meta")
    for _ in range(2):
        assert head.level_loss(hidden, latents, latents, levels).is_meta
        assert head.sample(hidden, noise).is_meta
    # One for training and one for sampling.
    assert copies == [torch.device("meta")] * 2


def test_the_diffusion_head_needs_two_levels() -> None:
    values = HeadRecipe(kind="diffusion", sampling_steps=1)
    (problem,) = values.spec.problems(values)
    assert problem.startswith("model.head.sampling_steps: 1") and "use at least 2" in problem
    assert values.spec.problems(HeadRecipe(kind="diffusion", sampling_steps=2)) == []


@pytest.mark.parametrize("kind", LATENT_HEADS)
@torch.no_grad()
def test_samples_of_a_position_depend_on_its_own_noise_alone(kind: str) -> None:
    torch.manual_seed(0)
    head = latent_head(make_head(HeadRecipe(kind=kind, num_mlp_layers=2), HIDDEN, LATENT)).double()
    hidden = torch.randn(5, HIDDEN, dtype=torch.float64)
    noise = head.draw_noise(torch.Generator().manual_seed(1), 3, 5).double()
    samples = head.sample(hidden, noise)
    assert samples.shape == (3, 5, LATENT)
    one = head.sample(hidden[2:3], noise.narrow(-2, 2, 1))
    torch.testing.assert_close(one[:, 0], samples[:, 2])
    other = head.draw_noise(torch.Generator().manual_seed(2), 3, 5).double()
    assert not torch.allclose(head.sample(hidden, other), samples)


@pytest.mark.parametrize("kind", LATENT_HEADS)
def test_shards_add_up_to_the_whole_loss(kind: str) -> None:
    torch.manual_seed(0)
    settings = HeadRecipe(kind=kind, num_mlp_layers=1, num_samples=3, posterior_samples=4)
    head = latent_head(make_head(settings, HIDDEN, LATENT))
    hidden, mean = torch.randn(2, 100, HIDDEN), torch.randn(2, 100, LATENT)
    log_std, weight = torch.randn(2, 100, LATENT) - 1, torch.rand(2, 100)

    def loss(start: int, stop: int) -> torch.Tensor:
        noise = KeyedNoise(0, 0, [5, 9], start, stop, CPU)
        parts = (x[:, start:stop].flatten(0, 1) for x in (hidden, mean, log_std))
        return head(*parts, noise, weight[:, start:stop].flatten())

    whole = loss(0, 100)
    torch.testing.assert_close(loss(0, 30) + loss(30, 90) + loss(90, 100), whole)
    assert whole.isfinite()


@pytest.mark.parametrize("kind", LATENT_HEADS)
@pytest.mark.parametrize("init", ["fan_in", "released"])
def test_gradients_reach_every_weight_after_a_step(kind: str, init: str) -> None:
    """Layers that start at zero hold up the others for a step or two, not longer."""
    overrides = [f"model.head.kind={kind}", f"model.init={init}"]
    model = load_recipe(RECIPE, overrides).model
    assert model.kind == "calm"
    head = build_head(model, seed=0)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    hidden = torch.randn(8, model.hidden_size)
    mean, log_std = torch.randn(2, 8, model.latent_size or 0)
    for step in range(4):
        optimizer.zero_grad()
        noise = KeyedNoise(0, step, [0], 0, 8, CPU)
        head(hidden, mean, log_std, noise, torch.ones(8)).backward()
        optimizer.step()
    dead = [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


class ScaledHead(EnergyHead):
    """A head with learned scalar and vector, as another package may add it."""

    def __init__(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> None:
        super().__init__(head, hidden_size, latent_size)
        self.log_scale = torch.nn.Parameter(torch.tensor(-2.0))
        self.shift = torch.nn.Parameter(torch.zeros(latent_size))


class ScaledSpec(EnergySpec):
    kind = "scaled"
    module = f"{__name__}:ScaledHead"

    def parameters(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        return super().parameters(head, hidden_size, latent_size) + 1 + latent_size

    def vector_value(self, name: str) -> float | None:
        return {"head.log_scale": -2.0, "head.shift": 0.0}.get(name)


def built_as(spec: EnergySpec, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    monkeypatch.setitem(all_specs(), spec.kind, spec)
    model = load_recipe(RECIPE, [f"model.head.kind={spec.kind}"]).model
    assert model.kind == "calm"
    return build_head(model, seed=0)


def test_initial_values_of_learned_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    head = built_as(ScaledSpec(), monkeypatch)
    assert isinstance(head, ScaledHead)
    assert head.log_scale == -2.0 and not head.shift.any()
    assert (head.norm_noise.weight == 1).all() and not head.noise_embd.bias.any()
    monkeypatch.delattr(ScaledSpec, "vector_value")
    with pytest.raises(RecipeError, match=r"initial value of the parameter head\.log_scale of "):
        built_as(ScaledSpec(), monkeypatch)


def test_a_head_of_another_size_than_described(monkeypatch: pytest.MonkeyPatch) -> None:
    held = sum(p.numel() for p in built_as(ScaledSpec(), monkeypatch).parameters())
    monkeypatch.delattr(ScaledSpec, "parameters")
    with pytest.raises(RecipeError, match=f"scaled, whose module has {held:,} parameters, its "):
        built_as(ScaledSpec(), monkeypatch)


def test_a_head_with_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would begin again at each resume."""
    init = ScaledHead.__init__

    def with_buffer(head: ScaledHead, *sizes: Any, persistent: bool) -> None:
        init(head, *sizes)
        head.register_buffer("center", torch.zeros(3), persistent=persistent)

    monkeypatch.setattr(ScaledHead, "__init__", partialmethod(with_buffer, persistent=True))
    with pytest.raises(RecipeError, match="scaled, whose module has the buffer center; checkpoint"):
        built_as(ScaledSpec(), monkeypatch)
    monkeypatch.setattr(ScaledHead, "__init__", partialmethod(with_buffer, persistent=False))
    built_as(ScaledSpec(), monkeypatch)


def test_a_head_that_predicts_tokens_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScaledSpec, "predicts", "tokens")
    with pytest.raises(RecipeError, match="scaled, which predicts tokens: its module must be a"):
        built_as(ScaledSpec(), monkeypatch)


@pytest.mark.parametrize(
    "kind", [kind for kind, spec in all_specs().items() if spec.predicts == "latents"]
)
def test_no_head_draws_from_the_default_generator(kind: str) -> None:
    model = load_recipe(RECIPE, [f"model.head.kind={kind}"]).model
    assert model.kind == "calm"
    check_randomness(latent_head(build_head(model, seed=0)), model)


def test_a_head_with_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = ScaledHead.position_loss

    def dropped(head: ScaledHead, hidden: torch.Tensor, *given: Any) -> torch.Tensor:
        return loss(head, torch.nn.functional.dropout(hidden, 0.1, head.training), *given)

    monkeypatch.setattr(ScaledHead, "position_loss", dropped)
    with pytest.raises(RecipeError, match="scaled, whose loss draws from torch's default gener"):
        built_as(ScaledSpec(), monkeypatch)


def trained_on_two_gaussians(kind: str) -> tuple[GenerativeHead, torch.Tensor]:
    """A head after 400 steps on latents N(-2, 0.5²) or N(2, 0.5²), and the two hidden states."""
    torch.manual_seed(0)
    settings = HeadRecipe(kind=kind, num_mlp_layers=2, num_samples=16, posterior_samples=16)
    head = latent_head(make_head(settings, 32, 2))
    which = torch.arange(64) % 2
    hidden = torch.nn.functional.one_hot(which, 32).float() * 4
    mean = torch.where(which == 0, -2.0, 2.0)[:, None].expand(64, 2)
    log_std = torch.full((64, 2), 0.5).log()
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    for step in range(400):
        optimizer.zero_grad()
        noise = KeyedNoise(0, step, [0], 0, 64, CPU)
        head(hidden, mean, log_std, noise, torch.full((64,), 1 / 64)).backward()
        optimizer.step()
    return head, hidden[:2]


@pytest.mark.parametrize("kind", ["energy", "flow"])
def test_heads_learn_a_distribution(kind: str) -> None:
    """Seen over seeds 0..2: means off by up to 0.03, spreads 0.45 to 0.53."""
    head, hidden = trained_on_two_gaussians(kind)
    noise = head.draw_noise(torch.Generator().manual_seed(0), 2000, 2)
    with torch.no_grad():
        samples = head.sample(hidden, noise)
    assert float((samples.mean(0) - torch.tensor([[-2.0], [2.0]])).abs().max()) < 0.1
    assert float((samples.std(0) - 0.5).abs().max()) < 0.1


def test_the_diffusion_head_learns_to_denoise() -> None:
    """Whole chains need far longer training: the first steps multiply the network's error."""
    head, hidden = trained_on_two_gaussians("diffusion")
    assert isinstance(head, DiffusionHead)
    torch.manual_seed(1)
    target = torch.tensor([[-2.0], [2.0]]) + 0.5 * torch.randn(500, 2, 2)
    added, levels = torch.randn(500, 2, 2), torch.full((500, 2), 600)
    trained = head.level_loss(hidden, target, added, levels).mean()
    swapped = head.level_loss(hidden.flip(0), target, added, levels).mean()
    # Without any knowledge of the latent the squared error alone is 1.
    assert trained < 0.3 and swapped > 3 * trained
