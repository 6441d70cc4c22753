"""Weights and optimizer state of backbone and head in one Megatron distributed checkpoint.

Tensors are stored by global name and position, so a checkpoint loads on any TP/PP/DP/ZeRO layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from calm_dist.errors import CheckpointError, listed
from calm_dist.parallel.topology import Topology
from calm_dist.parallel.zero_head import ZeroHead
from calm_dist.runs.checkpoints import TENSORS
from calm_dist.training.checkpoint import tensor_files
from calm_dist.training.checkpoint.optimizer_state import (
    load_optimizer_state,
    optimizer_state,
    set_master_weights,
)

_HEAD = "head."
_FP32 = "fp32."


def training_state(
    chunks: list[Any],
    optimizer: MegatronOptimizer,
    head: ZeroHead | None,
    moments: Sequence[str],
) -> dict[str, Any]:
    """All tensors that a run needs to continue, sharded; a collective of the head's ranks."""
    state = _backbone_state(chunks)
    state["optimizer"] = optimizer_state(optimizer, state, moments)
    if head is not None:
        state |= {
            name: tensor
            for key, copy in head.state_to_save().items()
            for name, tensor in _head_state({key: copy.whole}, copy.replica).items()
        }
    return state


def tensors_in_memory(chunks: list[Any], state: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors of a `training_state`, and those of the backbone's gradients."""
    for entry in (*state.values(), *state["optimizer"].values()):
        if isinstance(entry, ShardedTensor | ShardedTensorFactory):
            yield entry.data
    for chunk in chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            yield buffer.grad_data


def save_weights(directory: Path, backbone: nn.Module, head: nn.Module | None) -> None:
    """Write only the weights, of a whole backbone and unwrapped head, in a single process."""
    target = directory / TENSORS
    target.mkdir()
    tensor_files.write_now(_weight_state(backbone, head), target)


def load(
    directory: Path,
    chunks: list[Any],
    optimizer: MegatronOptimizer,
    head: ZeroHead | None,
    topology: Topology,
    moments: Sequence[str],
    updates: int,
) -> None:
    """Read a `training_state`, on this or another layout; a collective of the world.

    Args:
        moments: names of the optimizer's moments, see `optimizers.OptimizerSpec`.
        updates: number of updates that the optimizers have made.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    state = _backbone_state(chunks)
    state["optimizer"] = optimizer_state(
        optimizer, _backbone_state(chunks), moments, is_loading=True
    )
    if head is not None:
        state |= _head_state(head.export_state(), topology.head_ranks.index(topology.rank))
    loaded = tensor_files.read(state, directory / TENSORS)
    _load_backbone(chunks, loaded)
    load_optimizer_state(optimizer, loaded.get("optimizer", {}), moments, updates)
    if head is not None:
        head.import_state(_strip(loaded), updates)


def load_weights(directory: Path, backbone: Any, head: nn.Module | None) -> None:
    """Read only the weights, into a backbone of one stage and an unwrapped head that every rank
    holds; a collective of the world.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    loaded = tensor_files.read(_weight_state(backbone, head), directory / TENSORS)
    _load_backbone([backbone], loaded)
    if head is not None:
        head.load_state_dict({n.removeprefix(_FP32): t for n, t in _strip(loaded).items()})


@torch.no_grad()
def start_from_weights(
    directory: Path,
    chunks: list[Any],
    optimizer: MegatronOptimizer,
    head: ZeroHead | None,
    topology: Topology,
) -> None:
    """Load weights written by `save_weights`, on any layout; a collective of the world.

    The optimizers stay fresh. A bf16 backbone's fp32 master weights are those of the checkpoint,
    not rounded to bf16.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    state = _backbone_state(chunks)
    for tensor in state.values():
        # Read in fp32, whatever the precision of the run.
        if isinstance(tensor, ShardedTensor | ShardedTensorFactory):
            tensor.data = tensor.data.float()
        if isinstance(tensor, ShardedTensor):
            tensor.dtype = torch.float32
    fresh: dict[str, torch.Tensor] = {}
    if head is not None:
        fresh = head.export_state()
        weights = {name: tensor for name, tensor in fresh.items() if name.startswith(_FP32)}
        state |= _head_state(weights, topology.head_ranks.index(topology.rank))
    loaded = tensor_files.read(state, directory / TENSORS)
    _load_backbone(chunks, loaded)
    set_master_weights(
        optimizer,
        {
            parameter: loaded[f"{number}/{name}"]
            for number, chunk in enumerate(chunks)
            for name, parameter in _unwrap(chunk).named_parameters()
        },
    )
    if head is not None:
        head.import_state(fresh | _strip(loaded), 0)


@torch.no_grad()
def take_weights(
    directory: Path,
    chunks: list[Any],
    optimizer: MegatronOptimizer,
    head: ZeroHead | None,
    topology: Topology,
) -> list[str]:
    """Load the weights alone of any checkpoint, on any layout; a collective of the world.

    The backbone must fit. A head that does not fit, in all of its weights, keeps its initial ones.
    The optimizers stay fresh.

    Returns:
        what did not fit of the head, on every rank; empty if it was loaded.

    Raises:
        CheckpointError: the backbone does not fit; the message lists its weights that do not.
    """
    held = tensor_files.shapes(directory / TENSORS)
    problems: tuple[list[str], list[str]] = (_misfits(_backbone_state(chunks), held), [])
    if head is not None:
        weights = {n: t for n, t in head.export_state().items() if n.startswith(_FP32)}
        state = _head_state(weights, 0)
        others = {n for n in held if n.startswith(_HEAD + _FP32)} - state.keys()
        problems = (problems[0], _misfits(state, held) + [f"{n} is not here" for n in others])
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, problems)
    of_backbone, of_head = (sorted({text for one in found for text in one[n]}) for n in (0, 1))
    if of_backbone:
        raise CheckpointError(f"its backbone does not fit the recipe's: {listed(of_backbone, 5)}")
    start_from_weights(directory, chunks, optimizer, None if of_head else head, topology)
    return of_head


def _misfits(state: dict[str, Any], held: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The tensors of a sharded state that a checkpoint has not, or has in another shape."""
    found = []
    for entry in state.values():
        parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        for part in parts if isinstance(parts, list) else [parts]:
            if isinstance(part, ShardedTensor):
                here, there = tuple(part.global_shape), held.get(part.key)
                if there is None:
                    found.append(f"{part.key} {list(here)} is not there")
                elif here != there:
                    found.append(f"{part.key} {list(there)} there, {list(here)} here")
    return found


def _weight_state(backbone: nn.Module, head: nn.Module | None) -> dict[str, Any]:
    """Sharded tensors of a whole backbone and an unwrapped head."""
    state = _backbone_state([backbone])
    if head is not None:
        weights = {f"{_FP32}{name}": p.detach().float() for name, p in head.named_parameters()}
        state |= _head_state(weights, dist.get_rank())
    return state


def _backbone_state(chunks: list[Any]) -> dict[str, Any]:
    """Sharded tensors of this rank's chunks; chunk numbers are local, tensor keys are global."""
    return {
        f"{number}/{name}": tensor
        for number, chunk in enumerate(chunks)
        for name, tensor in _unwrap(chunk).sharded_state_dict().items()
    }


def _load_backbone(chunks: list[Any], loaded: dict[str, Any]) -> None:
    for number, chunk in enumerate(chunks):
        prefix = f"{number}/"
        weights = {n.removeprefix(prefix): t for n, t in loaded.items() if n.startswith(prefix)}
        _unwrap(chunk).load_state_dict(weights)


def _head_state(tensors: dict[str, torch.Tensor], replica: int) -> dict[str, ShardedTensor]:
    return {
        f"{_HEAD}{name}": ShardedTensor.from_rank_offsets(
            f"{_HEAD}{name}", tensor, replica_id=(0, 0, replica)
        )
        for name, tensor in tensors.items()
    }


def _strip(loaded: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {n.removeprefix(_HEAD): t for n, t in loaded.items() if n.startswith(_HEAD)}


def _unwrap(chunk: Any) -> Any:
    """The module inside Megatron's DDP and mixed-precision wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
