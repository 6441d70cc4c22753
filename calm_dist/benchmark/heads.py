"""Cost of a latent sample with each generative head."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F

from calm_dist.benchmark.timing import environment, median_seconds
from calm_dist.costs import flops
from calm_dist.errors import RecipeError
from calm_dist.heads import all_specs
from calm_dist.inference.loading import single_process_recipe, single_process_topology
from calm_dist.models.backbone import transformer_config
from calm_dist.models.heads import latent_head
from calm_dist.models.heads.tokens import TokensHead
from calm_dist.models.patch_tokens import PatchTokens
from calm_dist.parallel.noise import KeyedNoise
from calm_dist.recipe import CalmModel, LanguageModelRecipe, Recipe
from calm_dist.training.build import build_head, energy_kernel

MORE_STEPS = {"flow": (2, 4)}
"""Sampling steps beside a head's own default: the paper's for flow."""

SIZES = ("num_mlp_layers", "noise_size", "num_samples", "posterior_samples", "beta")
"""Fields of a head that all kinds accept; the others belong to one kind."""

TRAIN_FLOPS = 3
"""Cost of forward and backward pass, in forward passes."""

_log = logging.getLogger(__name__)


def measure_heads(
    recipe: Recipe, *, positions: int, samples: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    """Time sampling and training of every head at the size of a CALM recipe.

    A head that the recipe could not have, such as a chain that does not divide its latents, is left
    out with a warning.

    Args:
        recipe: the recipe of a CALM.
        positions: S, number of hidden states that are sampled from and trained on at once.
        samples: N, samples for each; training uses the recipe's number.
        repeats: number of runs; the median counts.

    Returns:
        A JSON-able dict; ``heads`` has a row for each head, with FLOPs and milliseconds per latent
        sample and, for training, per position.

    Raises:
        RecipeError: the recipe is not that of a CALM, or leaves its latent size to a store.
    """
    if recipe.model.kind != "calm" or recipe.model.latent_size is None:
        raise RecipeError(
            f"model.kind: {recipe.model.kind}, model.latent_size: "
            f"{getattr(recipe.model, 'latent_size', None)}; give the recipe of a CALM with both"
        )
    # Heads that predict tokens, which come last, need it.
    flops.known_size(recipe.model, "vocab_size")
    specs = sorted(all_specs().items(), key=lambda item: item[1].predicts == "tokens")
    rows = []
    for kind, spec in specs:
        try:
            own = _with_head(recipe, kind)
        except RecipeError as error:
            _log.warning("%s head: left out: %s", kind, error)
            continue
        if spec.predicts == "tokens":
            rows.append(_measure_tokens(own, positions, samples, repeats, device))
            continue
        for steps in (*MORE_STEPS.get(kind, ()), None):
            own = _with_head(recipe, kind, steps)
            rows.append(_measure(own, positions, samples, repeats, device))
    sizes = {"positions": positions, "samples": samples, "repeats": repeats}
    return {**environment(device), **sizes, "recipe": recipe.run.display_name, "heads": rows}


def _with_head(recipe: Recipe, kind: str, steps: int | None = None) -> Recipe:
    """The recipe with a head of this kind: its own, or one of the same sizes.

    Raises:
        RecipeError: the recipe cannot have such a head.
    """
    values = recipe.to_dict()
    head = values["model"]["head"]
    if kind != head["kind"]:
        head = {name: head[name] for name in SIZES}
    values["model"]["head"] = head | {"kind": kind, "sampling_steps": steps}
    return Recipe.from_dict(values)


def _measure(
    recipe: Recipe, positions: int, samples: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    model = recipe.model
    assert isinstance(model, CalmModel) and model.latent_size is not None
    head = latent_head(build_head(model, seed=0)).to(device)
    if model.head.spec.scores_energy:
        # As a training on this device scores.
        head.use_kernel(energy_kernel("auto", device))
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(positions, model.hidden_size, generator=generator, device=device)
    mean, log_std = torch.randn(2, positions, model.latent_size, generator=generator, device=device)
    noise = head.draw_noise(generator, samples, positions)
    weight = torch.full((positions,), 1 / positions, device=device)

    @torch.no_grad()
    def sample() -> None:
        head.sample(hidden, noise)

    def train() -> None:
        source = KeyedNoise(0, 0, [0], 0, positions, device)
        head.zero_grad()
        head(hidden.requires_grad_(), mean, log_std, source, weight).backward()

    evaluations = model.head.evaluations_per_sample
    return {
        "kind": model.head.kind,
        "sampling_steps": model.head.steps_per_sample,
        "network_runs": evaluations * model.head_spec.runs_per_evaluation,
        "parameters": flops.head_parameters(model),
        "flops_per_sample": flops.head_flops(
            model, 1, share_condition=True, evaluations=evaluations
        ),
        "ms_per_sample": 1e3 * median_seconds(sample, repeats, device) / (positions * samples),
        "train_flops_per_position": TRAIN_FLOPS
        * flops.head_flops(model, model.head.num_samples, share_condition=True),
        "train_ms_per_position": 1e3 * median_seconds(train, repeats, device) / positions,
    }


def _measure_tokens(
    recipe: Recipe, positions: int, samples: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    """The discrete head with its output layer; a sample is a patch, drawn token by token."""
    tokens_recipe = single_process_recipe(LanguageModelRecipe.from_dict(recipe.to_dict()))
    model = tokens_recipe.model
    assert isinstance(model, CalmModel) and model.vocab_size is not None
    topology = single_process_topology(tokens_recipe, device)
    config = transformer_config(tokens_recipe, torch.float32)
    tables = PatchTokens(
        config, model.vocab_size, topology.groups, independent=model.head.independent
    ).to(device)
    head = build_head(model, seed=0).to(device)
    assert isinstance(head, TokensHead)
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(positions, model.hidden_size, generator=generator, device=device)
    shape = (positions, model.patch_size)
    targets = torch.randint(model.vocab_size, shape, generator=generator, device=device)

    @torch.no_grad()
    def sample() -> None:
        same = hidden.repeat(samples, 1)
        patch = torch.empty(len(same), 0, dtype=torch.long, device=device)
        for place in range(model.patch_size):
            embedded = tables.embed(patch)
            state = head.state(same, embedded, place)
            chances = tables.logits(state[:, None])[:, 0].softmax(-1)
            patch = torch.cat([patch, torch.multinomial(chances, 1, generator=generator)], dim=1)

    def train() -> None:
        head.zero_grad()
        tables.zero_grad()
        states = head(hidden.requires_grad_(), tables.embed(targets[:, :-1]))
        F.cross_entropy(tables.logits(states).flatten(0, 1), targets.flatten()).backward()

    parts = {part.name: part for part in flops.count(tokens_recipe, tokens=0).parts}
    # An independent head has no embedding.
    own = [parts[name] for name in ("head", "patch_embedding", "output_layer") if name in parts]
    patch_flops = model.patch_size * sum(part.forward_flops_per_token_ours for part in own)
    return {
        "kind": "tokens",
        "sampling_steps": 1,
        "network_runs": model.head_spec.runs_per_evaluation,
        "parameters": sum(part.parameters for part in own),
        "flops_per_sample": patch_flops,
        "ms_per_sample": 1e3 * median_seconds(sample, repeats, device) / (positions * samples),
        "train_flops_per_position": TRAIN_FLOPS * patch_flops,
        "train_ms_per_position": 1e3 * median_seconds(train, repeats, device) / positions,
    }


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        "| head | steps | network runs | parameters | MFLOPs a sample | ms a sample "
        "| training: MFLOPs a position | ms a position |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["heads"]:
        lines.append(
            f"| {row['kind']} | {row['sampling_steps']} | {row['network_runs']} "
            f"| {row['parameters'] / 1e6:.1f}M | {row['flops_per_sample'] / 1e6:,.1f} "
            f"| {row['ms_per_sample']:.3g} | {row['train_flops_per_position'] / 1e6:,.0f} "
            f"| {row['train_ms_per_position']:.3g} |"
        )
    return "\n".join(lines)
