"""The released checkpoint in our backbone and head, against numbers of the authors' own code."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from calm_dist.evaluation.brier import brier_scores
from calm_dist.inference.load import LoadedModel
from calm_dist.inference.sampling import pool_candidates
from calm_dist.interop.huggingface import load_calm
from calm_dist.losses.energy import energy_score
from calm_dist.models.heads.base import Draw
from calm_dist.recipe import CalmModel
from calm_dist.released.calm import released_calm

GOLDEN = Path(__file__).parents[1] / "golden"
# max|a-b| / max|b|
TENSOR, GRADIENT, TIGHT = 1e-5, 2e-5, 2e-6


@dataclass(frozen=True)
class Golden:
    """A model, and what the authors' code made of the same weights, input and noise."""

    model: LoadedModel
    io: dict[str, torch.Tensor]
    facts: dict[str, Any]

    @property
    def recipe(self) -> CalmModel:
        assert isinstance(self.model.recipe.model, CalmModel)
        return self.model.recipe.model

    def hidden(self) -> torch.Tensor:
        """Hidden states of the backbone that predict something: [B*P, d], with gradients."""
        tokens = self.io["input_ids"]
        output = self.model.backbone(tokens, tokens.shape[1] // self.recipe.patch_size)
        return output.transpose(0, 1)[:, :-1].flatten(0, 1)

    def targets(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior mean and log_std of the predicted patches [B*P, l]."""
        assert self.model.autoencoder is not None
        mean, log_std = self.model.autoencoder.encode(self.io["input_ids"])
        return mean[:, 1:].flatten(0, 1), log_std[:, 1:].flatten(0, 1)


class GoldenNoise:
    """The noise of the golden files as a head asks for it."""

    def __init__(self, io: dict[str, torch.Tensor]) -> None:
        self._noise = {"head": io["noise_uniform01"] - 0.5, "posterior": io["target_eps"]}

    def whole(self, kind: str, draw: Draw) -> torch.Tensor:
        return self._noise[kind]

    def chunks(
        self, kind: str, draw: Draw
    ) -> Iterator[tuple[int, int, Callable[[], torch.Tensor]]]:
        yield 0, self._noise[kind].shape[1], lambda: self._noise[kind]

    def keys(self, kind: str) -> torch.Tensor:
        raise NotImplementedError("golden noise is stored, not drawn by keys")


def gradients_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return found


@pytest.fixture(scope="module", params=[2, 4], ids=lambda patch_size: f"K={patch_size}")
def golden(request: pytest.FixtureRequest) -> Golden:
    directory = GOLDEN / f"calm_k{request.param}"
    facts = json.loads((directory / "io.json").read_text(encoding="utf-8"))
    return Golden(load_calm(directory), load_file(directory / "io.safetensors"), facts)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def test_patch_embedding(golden: Golden) -> None:
    assert golden.model.backbone.embedding is not None
    embedded = golden.model.backbone.embedding(golden.io["input_ids"]).transpose(0, 1)
    assert error(embedded[:, :-1], golden.io["patch_embeds"]) < TENSOR


def test_hidden_states(golden: Golden) -> None:
    hidden = golden.model.hidden(golden.io["input_ids"])
    assert error(hidden[:, :-1], golden.io["hidden_states"]) < TIGHT


def test_head_samples(golden: Golden) -> None:
    hidden = golden.io["hidden_states"].flatten(0, 1)
    samples = golden.model.head.sample(hidden, golden.io["noise_uniform01"] - 0.5)
    assert error(samples, golden.io["latent_samples"]) < TENSOR


def test_targets(golden: Golden) -> None:
    mean, log_std = golden.targets()
    assert error(mean, golden.io["target_mean"]) < TENSOR
    assert error(log_std, golden.io["target_log_std"]) < TENSOR


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
def test_energy_score(golden: Golden, beta: float) -> None:
    names = ("latent_samples", "target_mean", "target_log_std", "target_eps")
    samples, mean, log_std, noise = (golden.io[name] for name in names)
    score = energy_score(samples, mean, log_std, noise, beta)
    expected = golden.io["energy_score" if beta == 1.0 else f"energy_score_beta{beta}"]
    assert error(score, expected) < TENSOR


def test_loss_and_gradients(golden: Golden) -> None:
    """The whole way from tokens to gradients, which are compared under their released names."""
    backbone, head = golden.model.backbone, golden.model.head
    for module in (backbone, head):
        module.requires_grad_(True)
        module.zero_grad()
    loss = head.position_loss(golden.hidden(), *golden.targets(), GoldenNoise(golden.io)).mean()
    loss.backward()
    gradients = released_calm(golden.recipe, gradients_of(backbone), gradients_of(head))
    assert error(loss.detach(), golden.io["loss_fp32"]) < TIGHT

    stored = {name.removeprefix("grad."): t for name, t in golden.io.items() if "grad." in name}
    assert stored
    for name, expected in stored.items():
        assert error(gradients[name], expected) < GRADIENT, name
    norms = golden.facts["grad_norms"]["fp32"]
    # The file names a head's parameters once.
    assert norms.keys() == {name for name in gradients if not name.startswith("generative_head.")}
    for name, expected_norm in norms.items():
        assert abs(float(gradients[name].norm()) - expected_norm) < GRADIENT * expected_norm, name


def test_brier(golden: Golden) -> None:
    assert golden.model.autoencoder is not None
    decode, io = golden.model.autoencoder.decode, golden.io
    predicted = torch.stack([decode(latents).argmax(-1) for latents in io["brier.latents"]])
    assert torch.equal(predicted.view_as(io["brier.pred"]), io["brier.pred"])
    if golden.recipe.patch_size >= 4:
        targets = io["brier.targets"].view_as(io["brier.pred"][0])
        scores = brier_scores(io["brier.pred"][0], io["brier.pred"][1], targets)
        assert error(scores.float(), io["brier.out"]) < TENSOR


def test_temperature_pool(golden: Golden) -> None:
    """The draws of a pool, decoded: the authors' tokens are the most likely ones, to rounding."""
    assert golden.model.autoencoder is not None
    noise = golden.io["temp.noise_uniform01"].transpose(0, 1) - 0.5
    latents = golden.model.head.sample(golden.io["temp.hidden"], noise).transpose(0, 1)
    pool = golden.io["temp.pool"].long()
    logits = golden.model.autoencoder.decode(latents).unflatten(1, pool.shape[1:])
    best, tokens = logits.max(-1)
    chosen = logits.gather(-1, pool[..., None])[..., 0]
    assert bool((best - chosen <= TENSOR * best.abs()).all())
    # Two tokens of one pool are as likely as each other to seven digits.
    assert int((tokens != pool).sum()) <= 1


@pytest.mark.parametrize("temperature", ["0.5000", "0.3333"])
def test_temperature_candidates(golden: Golden, temperature: str) -> None:
    expected = golden.facts["temperature"][temperature]
    for pool, chosen in zip(golden.io["temp.pool"], expected, strict=True):
        candidates = pool_candidates(pool.numpy(), round(1 / float(temperature)))
        assert [list(patch) for patch in candidates.patches] == chosen["patches"]
        assert candidates.weights == chosen["weights"]
