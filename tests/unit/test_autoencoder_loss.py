"""The autoencoder, its loss and its statistics against the released code and closed forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

from calm_dist.interop.huggingface import load_autoencoder
from calm_dist.losses import reconstruction
from calm_dist.losses.autoencoder import (
    AutoencoderLoss,
    TrainingNoise,
    autoencoder_loss,
    draw_training_noise,
    kl_per_dimension,
)
from calm_dist.losses.reconstruction import Reconstruction
from calm_dist.models.autoencoder import Autoencoder, AutoencoderConfig
from calm_dist.models.weights import init_std, initialize_module
from calm_dist.recipe import AutoencoderModel

GOLDEN = Path(__file__).parents[1] / "golden"
VOCAB, LATENT = 40, 6
Golden = tuple[Autoencoder, dict[str, torch.Tensor]]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[2, 4], ids="K={}".format)
def golden(request: pytest.FixtureRequest) -> Golden:
    directory = GOLDEN / f"ae_k{request.param}"
    return load_autoencoder(directory), load_file(directory / "io.safetensors")


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Relative to the largest value: single entries near zero carry no precision."""
    torch.testing.assert_close(
        found, expected, rtol=0, atol=tolerance * float(expected.abs().max())
    )


def small_autoencoder(patch_size: int = 4, **changes: float) -> Autoencoder:
    config = AutoencoderConfig(
        vocab_size=VOCAB,
        patch_size=patch_size,
        latent_size=LATENT,
        hidden_size=16,
        intermediate_size=24,
        **changes,  # type: ignore[arg-type]
    )
    model = Autoencoder(config)
    initialize_module(model, "", init_std(AutoencoderModel(kind="autoencoder")), seed=0)
    return model


def set_posterior(model: Autoencoder, mean: torch.Tensor, log_std: torch.Tensor) -> None:
    """Give every patch the same posterior."""
    with torch.no_grad():
        model.encoder.hidden_to_latent.weight.zero_()
        model.encoder.hidden_to_latent.bias.copy_(torch.cat([mean, log_std]))


def test_encode_decode_and_eval_loss_equal_the_released_code(golden: Golden) -> None:
    model, io = golden
    tokens = io["input_ids"]
    mean, log_std = model.encode(tokens)
    close(mean, io["eval.mean"])
    close(log_std, io["eval.log_std"])
    close(model.decode(mean), io["eval.decoder_logits_of_mean"])
    logits = model.decode(mean + io["eval.eps"].view_as(mean) * log_std.exp())
    close(F.cross_entropy(logits.flatten(0, 1), tokens.flatten()), io["eval.loss"])


def test_training_loss_and_gradients_equal_the_released_code(golden: Golden) -> None:
    model, io = golden
    model.requires_grad_(True)
    tokens, latent_shape = io["input_ids"], io["eval.mean"].shape
    noise = TrainingNoise(
        token_keep=io["train.token_uniform"].view_as(tokens) > model.config.token_dropout,
        eps=io["train.eps"].view(latent_shape),
        latent_keep=io["train.latent_keep_mask"].view(latent_shape) > 0,
    )
    losses = autoencoder_loss(model, tokens, noise)
    losses.total.backward()
    close(losses.total, io["train.loss_fp32"])
    expected = {
        name.removeprefix("train.grad_fp32."): gradient
        for name, gradient in io.items()
        if name.startswith("train.grad_fp32.")
    }
    assert len(expected) == 4
    for name, gradient in expected.items():
        found = model.get_parameter(name).grad
        assert found is not None
        close(found, gradient, 2e-5)


@pytest.mark.parametrize("patch_size", [1, 8])
def test_other_patch_sizes(patch_size: int) -> None:
    """Shapes, and each patch by itself: K = 1 has no neighbours, K = 8 packs eight tokens."""
    model = small_autoencoder(patch_size)
    tokens = torch.randint(VOCAB, (3, 5 * patch_size))
    mean, log_std = model.encode(tokens)
    assert mean.shape == log_std.shape == (3, 5, LATENT)
    logits = model.decode(mean)
    assert logits.shape == (3, 5 * patch_size, VOCAB)

    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % VOCAB
    changed = model.encode(other)[0] - mean
    assert torch.all(changed[:, :-1].abs() < 1e-5) and torch.all(changed[:, -1].abs().sum(-1) > 0.1)


def test_tokens_that_fill_no_patch_are_refused() -> None:
    with pytest.raises(ValueError, match="10 tokens are not a multiple of patch_size=4"):
        small_autoencoder().encode(torch.zeros(1, 10, dtype=torch.int64))


def test_kl_of_a_dimension_is_torchs() -> None:
    mean, log_std = torch.randn(2, 100).unbind()
    expected = kl_divergence(Normal(mean, log_std.exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(kl_per_dimension(mean, log_std), expected)


def test_kl_is_raised_to_the_floor_dimension_by_dimension() -> None:
    """Constant posterior: dimension d costs max(0.5, KL_d), and below the floor has no gradient."""
    model = small_autoencoder(kl_weight=10.0)
    mean = torch.tensor([0.0, 0.5, 0.99, 1.01, 2.0, -3.0])
    set_posterior(model, mean, torch.zeros(LATENT))
    tokens = torch.randint(VOCAB, (2, 20))
    losses = autoencoder_loss(
        model, tokens, draw_training_noise(model, tokens, torch.Generator().manual_seed(0))
    )
    # KL of a unit variance is mean² / 2.
    assert losses.kl.item() == pytest.approx(3 * 0.5 + 0.5 * (1.01**2 + 4 + 9))
    total = 4 * losses.cross_entropy.item() + 10 * losses.kl.item()
    assert losses.total.item() == pytest.approx(total)
    (gradient,) = torch.autograd.grad(losses.kl, [model.encoder.hidden_to_latent.bias])
    torch.testing.assert_close(gradient[:LATENT], torch.where(mean.abs() > 1, mean, 0.0))


def trained_part(model: Autoencoder, tokens: torch.Tensor) -> AutoencoderLoss:
    """The loss with noise of seed 0, ready for gradients."""
    noise = draw_training_noise(model, tokens, torch.Generator().manual_seed(0))
    return autoencoder_loss(model, tokens, noise)


def gradients(loss: torch.Tensor, model: Autoencoder) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_plain_is_reconstruction_alone(patch_size: int) -> None:
    """kl_weight 0: K·CE, to the bit and with its gradients, whatever the clamp."""
    model = small_autoencoder(patch_size, kl_weight=0.0, kl_clamp=0.5)
    tokens = torch.randint(VOCAB, (3, 6 * patch_size))
    losses = trained_part(model, tokens)
    assert losses.total == patch_size * losses.cross_entropy
    assert losses.kl >= LATENT * 0.5
    # The cross entropy's graph can be gone through once.
    expected = gradients(patch_size * trained_part(model, tokens).cross_entropy, model)
    for found, wanted in zip(gradients(losses.total, model), expected, strict=True):
        assert torch.equal(found, wanted)


def test_kl_without_clamp_is_torchs_and_pulls_every_dimension() -> None:
    """kl_clamp 0, constant posterior: dKL/dmean = mean and dKL/dlog_std = std² - 1."""
    model = small_autoencoder(kl_clamp=0.0)
    mean = torch.tensor([0.0, 0.1, 0.5, -0.9, 2.0, -3.0])
    log_std = torch.tensor([0.1, -0.2, 0.0, 0.3, -1.0, 0.0])
    set_posterior(model, mean, log_std)
    losses = trained_part(model, torch.randint(VOCAB, (2, 20)))
    expected = kl_divergence(Normal(mean, log_std.exp()), Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(losses.kl, expected)
    (gradient,) = torch.autograd.grad(losses.kl, [model.encoder.hidden_to_latent.bias])
    torch.testing.assert_close(gradient, torch.cat([mean, (2 * log_std).exp() - 1]))


def test_without_dropout_only_the_posterior_is_drawn() -> None:
    """Both dropouts 0: the loss of the unchanged tokens and of z = mean + eps * std."""
    model = small_autoencoder(token_dropout=0.0, ae_dropout=0.0)
    tokens = torch.randint(VOCAB, (3, 24))
    noise = draw_training_noise(model, tokens, torch.Generator().manual_seed(0))
    losses = autoencoder_loss(model, tokens, noise)
    mean, log_std = model.encode(tokens)
    logits = model.decode(mean + noise.eps * log_std.exp())
    expected = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(losses.cross_entropy, expected)


@pytest.mark.parametrize("replaced", [0, 7, VOCAB - 1])
def test_encoder_sees_the_replaced_token_and_the_loss_the_true_one(replaced: int) -> None:
    model = small_autoencoder(replaced_token_id=replaced)
    tokens = torch.randint(VOCAB, (3, 24))
    keep = torch.rand(3, 24) > 0.3
    seen = tokens.masked_fill(~keep, replaced)
    eps = torch.randn(3, 6, LATENT)
    kept = torch.ones(3, 6, LATENT, dtype=torch.bool)
    losses = autoencoder_loss(model, tokens, TrainingNoise(keep, eps, kept))
    mean, log_std = model.encode(seen)
    logits = model.decode((mean + eps * log_std.exp()) / (1 - model.config.ae_dropout))
    expected = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(losses.cross_entropy, expected)
    kl = kl_divergence(Normal(mean, log_std.exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(losses.kl, kl.clamp(min=0.5).sum(-1).mean())


@pytest.mark.parametrize("name", ["num_encoder_layers", "num_decoder_layers"])
@pytest.mark.parametrize(("layers", "use"), [(-1, 2), (0, 2), (1, 2), (3, 4)])
def test_layers_that_cannot_be_halved_are_refused(name: str, layers: int, use: int) -> None:
    with pytest.raises(ValueError, match=f"{name}: {layers} is not an even number.*use {use}"):
        AutoencoderConfig(vocab_size=VOCAB, **{name: layers})


def test_training_noise_has_the_asked_rates() -> None:
    model = small_autoencoder(token_dropout=0.15, ae_dropout=0.3)
    tokens = torch.zeros(50, 400, dtype=torch.int64)
    noise = draw_training_noise(model, tokens, torch.Generator().manual_seed(0))
    for keep, dropout in ((noise.token_keep, 0.15), (noise.latent_keep, 0.3)):
        rate = 1 - keep.double().mean()
        assert abs(rate - dropout) < 5 * (dropout * (1 - dropout) / keep.numel()) ** 0.5
    assert abs(noise.eps.mean()) < 5 / noise.eps.numel() ** 0.5
    assert noise.eps.std() == pytest.approx(1, abs=0.02)
    calm = small_autoencoder(token_dropout=0.0, ae_dropout=0.0)
    noise = draw_training_noise(calm, tokens, torch.Generator().manual_seed(0))
    assert noise.token_keep.all() and noise.latent_keep.all()


def test_reconstruction_counts_tokens_with_the_mean_and_with_a_sample(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One posterior for all patches; every fourth has other tokens than its mean decodes to, and
    noise of a smaller or larger size than the posterior's changes fewer or more of them.

    Patches are decoded in chunks of 3, and blocks differ in size.
    """
    monkeypatch.setattr(reconstruction, "CHUNK_LOGITS", 3 * 4 * VOCAB)
    model = small_autoencoder()
    mean = torch.randn(LATENT)
    set_posterior(model, mean, torch.full((LATENT,), 0.3).log())
    decoded = model.decode(mean[None, None])[0].argmax(-1)
    result = Reconstruction(LATENT, torch.device("cpu"))
    sizes = (0.3, *reconstruction.NOISE_SIZES)
    right = [0] * len(sizes)
    for patches in (40, 24):
        tokens = decoded.repeat(patches, 1)
        tokens[::4] = (tokens[::4] + 1) % VOCAB
        eps = torch.randn(patches, LATENT)
        result.add_block(model, tokens.flatten(), eps)
        for i, size in enumerate(sizes):
            guesses = model.decode(mean + size * eps[None])[0].argmax(-1)
            right[i] += int((guesses == tokens.flatten()).sum())
    summary = result.summary(patch_size=4)
    assert summary["token_accuracy_mean"] == 0.75
    assert summary["token_accuracy"] == right[0] / 256
    under_noise = summary["token_accuracy_under_noise"]
    assert under_noise == {str(size): right[i] / 256 for i, size in enumerate(sizes[1:], start=1)}
    assert 0 < under_noise["1.0"] < under_noise["0.1"] < 0.75
    assert summary["blocks"] == 2 and summary["latent_size"] == LATENT


def test_collapsed_and_active_dimensions() -> None:
    """Dimensions at the prior, around the threshold, far away but constant, and used."""
    model = small_autoencoder()
    threshold = (2 * reconstruction.COLLAPSED_NATS) ** 0.5
    mean = torch.tensor([0.0, 0.99 * threshold, 1.01 * threshold, 3.0, 0.0, 0.0])
    set_posterior(model, mean, torch.tensor([0.0, 0.0, 0.0, 0.0, -2.0, -2.0]))
    with torch.no_grad():
        model.encoder.hidden_to_latent.weight[4:6].normal_()
    result = Reconstruction(LATENT, torch.device("cpu"))
    tokens = torch.randint(VOCAB, (400,))
    result.add_block(model, tokens, torch.zeros(100, LATENT))
    summary = result.summary(patch_size=4)
    assert summary["collapsed_dims"] == 2
    assert summary["active_dims"] == 2
    expected = [0.5 * float(m) ** 2 for m in mean[:4]]
    assert summary["kl_per_dim"][:4] == pytest.approx(expected, abs=1e-6)
    assert summary["mean_std"] == pytest.approx((4 + 2 * float(torch.tensor(-2.0).exp())) / 6)
    with torch.no_grad():
        means, _ = model.encode(tokens[None])
    expected_spread = means[0].var(0, correction=0).mean().sqrt()
    assert summary["spread"] == pytest.approx(float(expected_spread), rel=1e-5)
