"""The autoencoder's training and encoding; evaluation and generation of small models."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch

from calm_dist.benchmark import pairs, scoring_pairs
from calm_dist.benchmark.compare import Pair
from calm_dist.benchmark.timing import median_seconds, seconds
from calm_dist.costs import flops
from calm_dist.gpu_check.model import ROOT
from calm_dist.gpu_check.parity import parity_recipe
from calm_dist.gpu_check.worker import Check, why_not
from calm_dist.inference.load import single_process_topology
from calm_dist.recipe import AutoencoderRecipe, load_recipe
from calm_dist.rehearsal.trainers import RehearsedAutoencoder

REPEATS = 5
_SMALL = ("model.vocab_size=2000", "data.block_size=64", "training.micro_batch_size=2")


def measure_autoencoder(check: Check) -> None:
    """Steps of its recipe as one of eight GPUs takes them, and encoding; both also on the CPU."""
    overrides = _SMALL if check.small else ()
    recipe = load_recipe(str(ROOT / "recipes/autoencoder.yaml"), overrides)
    assert isinstance(recipe, AutoencoderRecipe)
    device, size = check.device, recipe.training.micro_batch_size
    # The trainer adds up numbers of all ranks.
    single_process_topology(parity_recipe("calm", "fp32"), device)
    trainer = RehearsedAutoencoder(recipe, device)
    number = 2 if check.small else recipe.training.global_batch_size // recipe.world_size // size
    trainer.take_step(number)
    times = [seconds(lambda: trainer.take_step(number), device)
             for _ in range(1 if check.small else REPEATS)]  # fmt: skip
    tokens = number * size * recipe.num_patches * recipe.model.patch_size
    rate = tokens / statistics.median(times)
    peak = None
    if device.type == "cuda":
        peak = flops.peak_flops(torch.cuda.get_device_name(device), recipe.precision)
    per_token = flops.count(recipe, tokens=0).train_flops_per_token_ours
    check.add(
        step_seconds=statistics.median(times),
        tokens_per_second=rate,
        mfu=rate * per_token / peak if peak else None,
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )
    _encode(check, recipe)


def _encode(check: Check, recipe: AutoencoderRecipe) -> None:
    words, length = (
        flops.known_size(recipe.model, "vocab_size"),
        recipe.num_patches * recipe.model.patch_size,
    )
    model = pairs.random_autoencoder(words).eval().requires_grad_(False)
    tokens = pairs.zipf_tokens(words, 32 * length, seed=0).view(32, length)
    on_host = model.encode(tokens[:1, :64])
    model.to(check.device)
    on_device = model.encode(tokens[:1, :64].to(check.device))
    differences = [float((a.cpu() - b).abs().max() / b.abs().max())
                   for a, b in zip(on_device, on_host, strict=True)]  # fmt: skip
    tokens = tokens.to(check.device)
    taken = median_seconds(lambda: model.encode(tokens), 3, check.device)
    check.add(
        encoding_tokens_per_second=tokens.numel() / taken,
        encoding_largest_difference_to_cpu=max(differences),
    )


def measure_models(check: Check) -> None:
    """Brier scores of a block and generation of eight texts by small models, of hidden size 256, as
    `tools/benchmark.py brier` and ``sampling`` run them."""
    for pair in _pairs(check.device):
        try:
            taken = median_seconds(pair.ours, 1 if check.small else 3, check.device)
        except RuntimeError as error:
            check.row("rates", name=pair.name, why_not=why_not(error))
            continue
        check.row("rates", name=pair.name, unit=pair.unit, seconds=taken, rate=pair.work / taken)


def _pairs(device: torch.device) -> Iterator[Pair]:
    yield from scoring_pairs.brier_pairs(device)
    yield from scoring_pairs.sampling_pairs(device)
