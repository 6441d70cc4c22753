"""Begin a training with the weights of a released language model, on any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from calm_dist.errors import CheckpointError
from calm_dist.models.initialize import global_name, local_part
from calm_dist.parallel.topology import Topology
from calm_dist.parallel.zero_head import ZeroHead
from calm_dist.recipe import CalmModel, LanguageModelRecipe
from calm_dist.released.calm import ReleasedCalm, read_calm
from calm_dist.released.config import released_head
from calm_dist.training.checkpoint.optimizer_state import set_master_weights

_FP32 = "fp32."


@torch.no_grad()
def take_released_weights(
    directory: Path,
    recipe: LanguageModelRecipe,
    chunks: list[Any],
    optimizer: MegatronOptimizer,
    head: ZeroHead | None,
    topology: Topology,
) -> list[str]:
    """Each rank reads the tensors that it holds a part of; the optimizers stay fresh.

    Returns:
        what did not fit of the head, which then keeps its initial weights; on every rank.

    Raises:
        CheckpointError: the directory is damaged, or its backbone does not fit; on every rank.
    """
    model = recipe.model
    if not isinstance(model, CalmModel):
        raise CheckpointError("is a CALM in the released layout, but model.kind is transformer")
    released = read_calm(directory)
    masters: dict[nn.Parameter, torch.Tensor] = {}
    mine = {
        global_name(name, backbone): parameter
        for backbone in map(_unwrap, chunks)
        for name, parameter in backbone.named_parameters()
    }
    for name, full in released.backbone(model):
        if (parameter := mine.pop(name, None)) is not None:
            part = local_part(parameter, full.float(), topology.groups).to(parameter.device)
            parameter.copy_(part)
            masters[parameter] = part
    if mine:
        raise CheckpointError(f"has no weights for {', '.join(sorted(mine)[:5])}")
    set_master_weights(optimizer, masters)
    misfits = [] if head is None else _take_head(released, model, head)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, misfits)
    return sorted({text for one in found for text in one})


def _take_head(released: ReleasedCalm, model: CalmModel, head: ZeroHead) -> list[str]:
    fresh = head.export_state()
    own = {n.removeprefix(_FP32): t for n, t in fresh.items() if n.startswith(_FP32)}
    prefix = _head_prefix(model)
    if prefix is None:
        return [f"the released layout has no {model.head.kind} head"]
    misfits = released.misfits({prefix + name: tuple(t.shape) for name, t in own.items()})
    if misfits:
        return misfits
    found = released.head(prefix, own)
    head.import_state(fresh | {_FP32 + name: t.float() for name, t in found.items()}, 0)
    return []


def _head_prefix(model: CalmModel) -> str | None:
    try:
        return released_head(model.head).prefixes[0]
    except CheckpointError:
        return None


def _unwrap(chunk: Any) -> Any:
    """The module inside Megatron's DDP and mixed-precision wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
