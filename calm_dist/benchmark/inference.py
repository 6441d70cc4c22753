"""Generation with two or more models in turns: speed, time to first token, memory, FLOPs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from calm_dist.benchmark.pairs import with_random_weights
from calm_dist.benchmark.timing import environment
from calm_dist.costs import flops
from calm_dist.errors import UserError
from calm_dist.inference.contexts import Contexts, window_steps
from calm_dist.inference.loading import (
    LoadedModel,
    load_model,
    single_process_recipe,
    single_process_topology,
)
from calm_dist.inference.methods import Sampler
from calm_dist.inference.patches import patch_sampler
from calm_dist.inference.sampling import DEFAULT_MAX_DRAWS, DEFAULT_POOL_SIZE
from calm_dist.inference.softmax import softmax_sampler
from calm_dist.models.autoencoder import config_of
from calm_dist.models.backbone import transformer_config
from calm_dist.recipe import CalmModel, LanguageModelRecipe, load_recipe
from calm_dist.training.build import build_backbone, build_head

BATCHES = (1, 2, 4, 8, 16, 32, 64)


def open_model(path: str, device: torch.device) -> LoadedModel:
    """A trained model, or for a recipe's file one of its shape with random weights, fp32.

    Raises:
        UserError: the recipe is an autoencoder's, or leaves its sizes to a store.
    """
    if not path.endswith((".yaml", ".yml")):
        return load_model(path, device=str(device))
    given = load_recipe(path)
    if not isinstance(given, LanguageModelRecipe) or given.model.vocab_size is None:
        raise UserError(f"{path}: give the recipe of a language model with model.vocab_size")
    recipe = single_process_recipe(given)
    topology = single_process_topology(recipe, device)
    backbone = build_backbone(recipe, transformer_config(recipe, torch.float32), topology, None)
    head, autoencoder = None, None
    if isinstance(recipe.model, CalmModel):
        head = build_head(recipe.model, 0).to(device).eval().requires_grad_(False)
        # Otherwise all latents and logits are zero, and the arg-max takes several times as long.
        for layer in head.layers_from_zero(recipe.model.init):
            nn.init.normal_(layer.weight, std=0.02)
        if recipe.model.has_latents:
            autoencoder = with_random_weights(config_of(recipe.model))
            autoencoder = autoencoder.to(device).eval().requires_grad_(False)
    return LoadedModel(
        recipe=recipe,
        checkpoint=Path(path),
        step=0,
        tokens_seen=0,
        tokenizer_sha256=None,
        device=device,
        backbone=backbone.eval().requires_grad_(False),
        _head=head,
        autoencoder=autoencoder,
        autoencoder_sha256=None,
    )


def measure_inference(
    models: Sequence[LoadedModel],
    *,
    batches: Sequence[int] = BATCHES,
    contexts: Sequence[int] | None = None,
    temperature: float = 1.0,
    tokens: int = 16,
    repeats: int = 3,
) -> dict[str, Any]:
    """Generate from random prompts, the models in turns, so that a slow minute hits all alike.

    Args:
        batches: numbers of texts.
        contexts: tokens of a prompt; None: half of the shortest block.
        temperature: as in generation; 1/n uses pools for a CALM.
        tokens: new tokens of a text that are timed, after the first step.
        repeats: number of runs; the median counts.

    Returns:
        A JSON-able dict; ``rows`` has one for each model, context and batch: tokens_per_second (all
        texts together, after the first step), first_token_seconds, cache_bytes_per_text (keys and
        values of the context and the new tokens), flops_per_token (after that context, with a
        cache).

    Raises:
        UserError: a context is longer than a model reads.
    """
    longest = min(window_steps(model) * model.recipe.model.patch_size for model in models)
    contexts = [max(1, longest // 2)] if contexts is None else contexts
    if max(contexts) + tokens > longest:
        raise UserError(
            f"--contexts {max(contexts)}: with {tokens} new tokens more than the {longest} that "
            "the models read; give shorter ones"
        )
    rows = []
    for context in contexts:
        for batch in batches:
            timed: list[list[tuple[float, float]]] = [[] for _ in models]
            for number in range(repeats + 1):
                for model, times in zip(models, timed, strict=True):
                    measured = _generate(model, context, batch, temperature, tokens)
                    if number > 0:  # the first run warms up
                        times.append(measured)
            rows += [
                _row(model, context, batch, tokens, times)
                for model, times in zip(models, timed, strict=True)
            ]
    return {**environment(models[0].device), "temperature": temperature, "rows": rows}


@torch.no_grad()
def _generate(
    model: LoadedModel, context: int, batch: int, temperature: float, tokens: int
) -> tuple[float, float]:
    """Seconds until the first step is sampled, and of a step after it."""
    size, vocab_size = model.recipe.model.patch_size, model.recipe.model.vocab_size
    assert vocab_size is not None
    steps = -(-tokens // size)
    filled = -(-context // size) * size
    prompts = np.random.default_rng(0).integers(vocab_size, size=(batch, filled)).tolist()
    rngs = [np.random.default_rng(seed) for seed in range(batch)]
    sampler: Sampler
    if model.has_probabilities:
        sampler = softmax_sampler(model, temperature, "auto", DEFAULT_MAX_DRAWS)
    else:
        sampler = patch_sampler(model, temperature, "auto", DEFAULT_POOL_SIZE, DEFAULT_MAX_DRAWS)
    started = time.perf_counter()
    growing = Contexts(model, prompts, steps + 1)
    # The sampler returns tokens to the host, so that the device has finished.
    made = sampler(growing.start(), rngs)
    first = time.perf_counter()
    for _ in range(steps):
        made = sampler(growing.extend(list(range(batch)), made), rngs)
    return first - started, (time.perf_counter() - first) / steps


def _row(
    model: LoadedModel,
    context: int,
    batch: int,
    tokens: int,
    times: list[tuple[float, float]],
) -> dict[str, Any]:
    size = model.recipe.model.patch_size
    first, step = (statistics.median(values) for values in zip(*times, strict=True))
    data = model.recipe.data.model_copy(update={"block_size": -(-context // size) * size})
    held = model.recipe.model_copy(update={"data": data})
    return {
        "model": str(model.checkpoint),
        "kind": model.kind,
        "patch_size": size,
        "context": context,
        "batch": batch,
        "tokens_per_second": batch * size / step,
        "first_token_seconds": first,
        "cache_bytes_per_text": _cache_bytes(model, -(-(context + tokens) // size)),
        "flops_per_token": flops.count(held, tokens=0).inference_flops_per_token,
    }


def _cache_bytes(model: LoadedModel, steps: int) -> int:
    """Bytes of keys and values of one text of so many steps, in all layers."""
    cache = model.new_cache(1, 1)
    parts = [part for pair in cache.key_value_memory_dict.values() for part in pair]
    return sum(part[0, 0].numel() * part.element_size() for part in parts) * steps


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown; ratios are to the last model at the same context and batch."""
    rows = result["rows"]
    last = {(row["context"], row["batch"]): row for row in rows}
    lines = [
        "| model | context | batch | tokens/s | ratio | first token | memory/text | FLOPs/token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        other = last[row["context"], row["batch"]]["tokens_per_second"]
        lines.append(
            f"| {row['model']} | {row['context']} | {row['batch']} "
            f"| {row['tokens_per_second']:,.1f} | {row['tokens_per_second'] / other:.2f}x "
            f"| {row['first_token_seconds']:.3f} s "
            f"| {row['cache_bytes_per_text'] / 2**20:,.2f} MiB | {row['flops_per_token']:.3g} |"
        )
    return "\n".join(lines)


def plot(result: dict[str, Any], file: str) -> None:
    """Draw tokens per second against the batch size for each model and context."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key in dict.fromkeys((row["model"], row["context"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if (row["model"], row["context"]) == key]
        axes.plot(
            [row["batch"] for row in rows],
            [row["tokens_per_second"] for row in rows],
            marker="o",
            label=f"{Path(key[0]).name}, context {key[1]}",
        )
    axes.set(xscale="log", yscale="log", xlabel="texts in a batch", ylabel="tokens per second")
    axes.legend()
    figure.savefig(file)
