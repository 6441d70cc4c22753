"""The chain head, and autoencoders whose latents are cut into slots."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launches import recipe as recipe_file

from calm_dist.errors import CheckpointError, RecipeError
from calm_dist.inference.decoding import GreedyDecoder, LazyPatches
from calm_dist.interop.convert import export_checkpoint
from calm_dist.interop.huggingface import load_autoencoder, save_autoencoder
from calm_dist.losses.energy import energy_score_reference
from calm_dist.models.autoencoder import Autoencoder, AutoencoderConfig
from calm_dist.models.heads import make_head
from calm_dist.models.heads.base import normal_noise
from calm_dist.models.heads.chain import ChainHead
from calm_dist.parallel.noise import KeyedNoise
from calm_dist.recipe import HeadRecipe, load_recipe

CPU = torch.device("cpu")
POSITIONS, HIDDEN, LATENT, SLOTS = 70, 24, 12, 4
SLOT = LATENT // SLOTS


def chain(**fields: object) -> ChainHead:
    torch.manual_seed(0)
    settings = {"num_mlp_layers": 2, "noise_size": 5, "num_samples": 3, "posterior_samples": 6}
    head = make_head(HeadRecipe(kind="chain", **settings | fields), HIDDEN, LATENT, SLOTS)  # type: ignore[arg-type]
    assert isinstance(head, ChainHead)
    return head


@torch.no_grad()
def test_sampling_gives_each_slot_the_ones_before() -> None:
    head = chain()
    hidden = torch.randn(POSITIONS, HIDDEN)
    noise = head.draw_noise(torch.Generator().manual_seed(1), 2, POSITIONS)
    samples = head.sample(hidden, noise)
    assert samples.shape == (2, POSITIONS, LATENT)
    for one in range(2):
        # Forced to its own sample, it makes the same one.
        forced = head.teacher_forced(hidden, samples[one], noise[one : one + 1])
        torch.testing.assert_close(forced.view(POSITIONS, LATENT), samples[one])


@torch.no_grad()
def test_a_slot_depends_on_no_later_one() -> None:
    head = chain(width=16)
    hidden, latent = torch.randn(POSITIONS, HIDDEN), torch.randn(POSITIONS, LATENT)
    noise = head.draw_noise(torch.Generator().manual_seed(1), 1, POSITIONS)

    def made(latent: torch.Tensor) -> torch.Tensor:
        return head.teacher_forced(hidden, latent, noise).view(POSITIONS, SLOTS, SLOT)

    before = made(latent)
    for slot in range(SLOTS):
        changed = latent.clone()
        changed[:, slot * SLOT :] += 1
        difference = (made(changed) - before).abs().amax((0, 2))
        assert (difference[: slot + 1] < 1e-6).all() and (difference[slot + 1 :] > 1e-5).all()


def test_the_loss_is_the_sum_of_the_slots_scores() -> None:
    head = chain(beta=1.3)
    hidden, mean = torch.randn(POSITIONS, HIDDEN), torch.randn(POSITIONS, LATENT)
    log_std = torch.randn(POSITIONS, LATENT) - 1
    noise = KeyedNoise(0, 0, [3], 0, POSITIONS, CPU)
    found = head.position_loss(hidden, mean, log_std, noise)

    of_head = noise.whole("head", lambda g, n: head.draw_noise(g, 3, n))
    draws = noise.whole("posterior", normal_noise(6, LATENT))
    before = mean + log_std.exp() * noise.whole("before", normal_noise(1, LATENT))[0]
    samples = head.teacher_forced(hidden, before, of_head).view(3, POSITIONS, SLOTS, SLOT)
    expected = torch.zeros(POSITIONS)
    for slot in range(SLOTS):
        part = slice(slot * SLOT, (slot + 1) * SLOT)
        expected -= energy_score_reference(
            samples[:, :, slot], mean[:, part], log_std[:, part], draws[..., part], 1.3
        )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    gradients = [parameter.grad for parameter in head.parameters()]
    assert all(gradient is not None and gradient.any() for gradient in gradients)


def test_it_learns_what_slots_have_in_common() -> None:
    """The second slot repeats the sign of the first, which is a coin: a joint distribution that
    independent slots would miss."""
    torch.manual_seed(0)
    settings = HeadRecipe(
        kind="chain", num_mlp_layers=2, noise_size=8, num_samples=8, posterior_samples=8
    )
    head = make_head(settings, 32, 2, 2)
    assert isinstance(head, ChainHead)
    hidden = torch.ones(64, 32)
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    for step in range(400):
        sign = torch.randint(0, 2, (64, 1), generator=torch.Generator().manual_seed(step)) * 2.0 - 1
        optimizer.zero_grad()
        noise = KeyedNoise(0, step, [0], 0, 64, CPU)
        log_std = torch.full((64, 2), -2.0)
        head(hidden, sign.expand(64, 2), log_std, noise, torch.full((64,), 1 / 64)).backward()
        optimizer.step()
    drawn = head.draw_noise(torch.Generator().manual_seed(0), 2000, 1)
    with torch.no_grad():
        first, second = head.sample(hidden[:1], drawn)[:, 0].unbind(-1)
    assert 0.4 < float((first > 0).double().mean()) < 0.6
    assert float(((first > 0) == (second > 0)).double().mean()) > 0.9


def autoencoder(slots: int) -> Autoencoder:
    torch.manual_seed(0)
    config = AutoencoderConfig(
        50, SLOTS, LATENT, hidden_size=16, intermediate_size=24, latent_slots=slots
    )
    return Autoencoder(config).eval().requires_grad_(False)


def test_the_decoder_of_a_token_sees_no_later_slot() -> None:
    model = autoencoder(SLOTS)
    latents = torch.randn(3, 2, LATENT)
    logits = model.decode(latents).unflatten(1, (2, SLOTS))
    for slot in range(SLOTS):
        changed = latents.clone()
        changed[..., slot * SLOT : (slot + 1) * SLOT] += 1
        moved = (model.decode(changed).unflatten(1, (2, SLOTS)) - logits).abs().amax((0, 1, 3))
        assert (moved[:slot] == 0).all() and (moved[slot:] > 1e-4).all()
    # The last token sees all of it, by the same parameters.
    whole = autoencoder(1).decode(latents).unflatten(1, (2, SLOTS))
    torch.testing.assert_close(logits[:, :, -1], whole[:, :, -1])


def test_greedy_decoding_of_slots() -> None:
    model = autoencoder(SLOTS)
    latents = torch.randn(30, LATENT)
    expected = model.decode(latents[None])[0].argmax(-1).view(30, SLOTS)
    decoder = GreedyDecoder(model)
    hidden = decoder.hidden(latents)
    assert torch.equal(decoder.tokens(hidden.flatten(0, 1)).view(30, SLOTS), expected)
    lazy = LazyPatches(decoder, latents)
    assert lazy.tokens([4, 9], 0) == expected[[4, 9], 0].tolist()
    assert lazy.tokens(list(range(30)), 2) == expected[:, 2].tolist()
    assert lazy.patch(7) == tuple(expected[7].tolist())


def test_slots_are_kept_with_the_weights(tmp_path: Path) -> None:
    for slots in (1, SLOTS):
        directory = tmp_path / str(slots)
        directory.mkdir()
        save_autoencoder(autoencoder(slots), directory)
        config = json.loads((directory / "config.json").read_text())
        # The authors' class would take no notice of them.
        assert config.get("latent_slots", 1) == slots and ("latent_slots" in config) == (slots > 1)
        assert load_autoencoder(directory).config.latent_slots == slots
    with pytest.raises(CheckpointError, match=r"model.latent_slots 4, which the authors'"):
        export_checkpoint(tmp_path / str(SLOTS), tmp_path / "released")
    config["latent_slots"] = 3
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="latent_slots: 3 with patch_size 4"):
        load_autoencoder(directory)


def test_what_a_recipe_cannot_ask_for() -> None:
    calm, chained = recipe_file("calm"), "model.head.kind=chain"
    with pytest.raises(RecipeError, match=r"model.latent_size: 66 cannot be cut into 4 slots"):
        load_recipe(calm, [chained, "model.latent_size=66"])
    with pytest.raises(RecipeError, match=r"model.head.num_samples: found 1"):
        load_recipe(calm, [chained, "model.head.num_samples=1"])
    with pytest.raises(RecipeError, match=r"model.latent_slots: 3; use 1, or one slot per token"):
        load_recipe(recipe_file("autoencoder"), ["model.latent_slots=3"])
    with pytest.raises(RecipeError, match=r"model.latent_size: 66 is not a multiple .*; use 68"):
        load_recipe(recipe_file("autoencoder"), ["model.latent_slots=4", "model.latent_size=66"])
    with pytest.raises(RecipeError, match=r"model.latent_slots: 4 in the recipe, 1 in the autoenc"):
        config = {"patch_size": 4, "latent_size": 64, "vocab_size": 512, "hidden_size": 8,
                  "intermediate_size": 8, "num_encoder_layers": 2}  # fmt: skip
        load_recipe(calm, ["model.latent_slots=4"]).with_autoencoder(config)
