"""How our backbone's parameters correspond to the released tensors.

The rules are linear selections, so they convert weights and gradients in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from calm_dist.errors import CheckpointError, listed
from calm_dist.recipe import CalmModel
from calm_dist.recipe.checks import padded_vocab_size

Shapes = dict[str, tuple[int, ...]]

AUTOENCODER = "ae_model."
# The output matrix of the autoencoder's decoder is its token embedding.
TIED_OUTPUT = ("encoder.embed_tokens.weight", "decoder.lm_head_weight")


@dataclass(frozen=True)
class Rule:
    """One of our parameters, and the released ones that it is joined from and split into."""

    ours: str
    released: Mapping[str, tuple[int, ...]]
    join: Callable[[list[torch.Tensor]], torch.Tensor]
    split: Callable[[torch.Tensor], Sequence[torch.Tensor]]


def backbone_rules(model: CalmModel) -> Iterator[Rule]:
    """The rules of all parameters of a whole backbone."""
    assert model.vocab_size is not None
    width, patch = model.hidden_size, model.patch_size
    yield _vocabulary_rule(model.vocab_size, width)
    for ours, released, shape in (
        ("compress_in.weight", "0.weight", (2 * width, patch * width)),
        ("compress_in.bias", "0.bias", (2 * width,)),
        ("compress_out.weight", "2.weight", (width, 2 * width)),
        ("compress_out.bias", "2.bias", (width,)),
        ("norm.weight", "3.weight", (width,)),
        ("norm.bias", "3.bias", (width,)),
    ):
        yield _same(f"embedding.{ours}", f"embed_proj.{released}", shape)
    for layer in range(model.num_hidden_layers):
        yield from _layer_rules(model, f"decoder.layers.{layer}.", f"transformer.layers.{layer}.")
    yield _same("decoder.final_layernorm.weight", "transformer.norm.weight", (width,))


def released_shapes(model: CalmModel) -> Shapes:
    """Names and shapes of the backbone's released tensors."""
    return {name: shape for rule in backbone_rules(model) for name, shape in rule.released.items()}


def rules_for(model: CalmModel, parameters: Iterable[str]) -> list[Rule]:
    """The rules of a whole backbone with these parameters, each of which must have a rule.

    Raises:
        CheckpointError: a parameter has no rule, and so no place in the released layout.
    """
    rules = list(backbone_rules(model))
    covered = {rule.ours for rule in rules}
    if without := [name for name in parameters if name not in covered]:
        raise CheckpointError(
            f"{listed(without, 2)}: the authors' released layout has no place for these weights, "
            "which would be lost; only models without them can be imported and exported"
        )
    return rules


def to_released(model: CalmModel, backbone: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a whole backbone (weights or gradients) under their released names.

    Raises:
        CheckpointError: see `rules_for`.
    """
    return {
        name: part
        for rule in rules_for(model, backbone)
        for name, part in zip(rule.released, rule.split(backbone[rule.ours]), strict=True)
    }


def _layer_rules(model: CalmModel, ours: str, released: str) -> Iterator[Rule]:
    width, inner = model.hidden_size, model.intermediate_size
    yield _attention_rule(model, f"{ours}self_attention.linear_qkv.weight", f"{released}self_attn.")
    # Megatron's first projection is [gate; up].
    gated = {f"{released}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
    yield Rule(f"{ours}mlp.linear_fc1.weight", gated, torch.cat, partial(torch.chunk, chunks=2))
    for name, theirs, shape in (
        ("self_attention.linear_proj.weight", "self_attn.o_proj.weight", (width, width)),
        ("mlp.linear_fc2.weight", "mlp.down_proj.weight", (width, inner)),
        ("input_layernorm.weight", "input_layernorm.weight", (width,)),
        ("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", (width,)),
    ):
        yield _same(ours + name, released + theirs, shape)


def _same(ours: str, released: str, shape: tuple[int, ...]) -> Rule:
    return Rule(ours, {released: shape}, lambda parts: parts[0], lambda whole: [whole])


def _vocabulary_rule(vocab_size: int, width: int) -> Rule:
    """Our embedding table has extra rows of zeros that pad it to equal shards."""
    padding = padded_vocab_size(vocab_size) - vocab_size
    return Rule(
        "embedding.embed_tokens.weight",
        {"transformer.embed_tokens.weight": (vocab_size, width)},
        lambda parts: F.pad(parts[0], (0, 0, 0, padding)),
        lambda whole: [whole[:vocab_size]],
    )


def _attention_rule(model: CalmModel, ours: str, released: str) -> Rule:
    """Megatron stores the queries of a group of heads together with their key and value head.

    The rows of each group are its queries, its key, its value. Both layouts rotate halves of a
    head.
    """
    groups, size = model.key_value_heads, model.hidden_size // model.num_attention_heads
    queries = model.num_attention_heads // groups
    rows = (queries * size, size, size)

    def join(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)

    def split(whole: torch.Tensor) -> list[torch.Tensor]:
        parts = whole.unflatten(0, (groups, -1)).split(rows, dim=1)
        return [part.flatten(0, 1) for part in parts]

    names = zip("qkv", rows, strict=True)
    shapes = {
        f"{released}{name}_proj.weight": (groups * count, model.hidden_size)
        for name, count in names
    }
    return Rule(ours, shapes, join, split)
