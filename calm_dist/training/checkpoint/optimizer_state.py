"""State of the backbone's optimizer in a checkpoint: the same for Megatron's plain and distributed
optimizers, and for every layout.

Megatron's own `load_state_dict` of the distributed optimizer (0.16.1) works only with fused Adam:
with torch's, it fails on an empty state, and otherwise makes all parameters share one step count.
This module stores the moments and the master weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import nn

from calm_dist.compat.megatron import (
    counts_in_groups,
    master_weight,
    own_part,
    single_optimizers,
    updated_parameters,
)

_MASTER = "fp32_param"


def optimizer_state(
    optimizer: MegatronOptimizer,
    model_state: Mapping[str, Any],
    moments: Sequence[str],
    is_loading: bool = False,
) -> dict[str, Any]:
    """Sharded tensors of the backbone optimizer's state, without its number of updates.

    A collective of the replicas. With the distributed optimizer, the first replica gets all
    tensors, on the CPU; for loading, every replica does.

    Args:
        model_state: the backbone's sharded tensors, which must wrap the parameters themselves.
        moments: names of the optimizer's moments, see `optimizers.OptimizerSpec`.
        is_loading: the tensors are only buffers to load into.
    """
    sharded = {
        id(tensor.data): tensor
        for tensor in model_state.values()
        if isinstance(tensor, ShardedTensor | ShardedTensorFactory)
    }
    state: dict[str, Any] = {}
    for number, single in enumerate(single_optimizers(optimizer)):
        _fill(single, moments)
        if isinstance(single, DistributedOptimizer):
            _finish_gather(single)
            tensors = _gathered(single, moments, is_loading)
        else:
            tensors = _local(single, moments)
        for index, parameter, kind, tensor in tensors:
            state[f"{number}.{index}.{kind}"] = make_sharded_optimizer_tensor(
                sharded[id(parameter)], tensor, prefix=f"optimizer.state.{kind}"
            )
    return state


@torch.no_grad()
def load_optimizer_state(
    optimizer: MegatronOptimizer, loaded: Mapping[str, Any], moments: Sequence[str], step: int
) -> None:
    """Load the optimizer from tensors read into an `optimizer_state`, after ``step`` updates."""
    for number, single in enumerate(single_optimizers(optimizer)):
        _fill(single, moments)
        for index, parameter in enumerate(updated_parameters(single)):
            kinds = (kind for kind in (*moments, _MASTER) if f"{number}.{index}.{kind}" in loaded)
            for kind in kinds:
                target = _target(single, parameter, kind)
                if target is not None:
                    whole = loaded[f"{number}.{index}.{kind}"]
                    target.copy_(own_part(single, parameter, whole))
        if not counts_in_groups(single):
            for master, state in single.optimizer.state.items():
                # One tensor each: a shared one would be incremented once per parameter.
                state["step"] = torch.tensor(float(step), device=master.device)
        else:
            for group in single.optimizer.param_groups:
                group["step"] = step


@torch.no_grad()
def set_master_weights(
    optimizer: MegatronOptimizer, weights: Mapping[nn.Parameter, torch.Tensor]
) -> None:
    """Set the fp32 copies that a bf16 backbone's optimizer updates; an fp32 backbone has none."""
    for single in single_optimizers(optimizer):
        for parameter in updated_parameters(single):
            if parameter.dtype == torch.float32:
                continue
            master = _target(single, parameter, _MASTER)
            if master is not None:
                master.copy_(own_part(single, parameter, weights[parameter]))


def _target(single: Any, parameter: nn.Parameter, kind: str) -> torch.Tensor | None:
    master = master_weight(single, parameter)
    if master is None or kind == _MASTER:
        return master
    return single.optimizer.state[master][kind]


def _fill(single: Any, moments: Sequence[str]) -> None:
    """Initialize the state as the optimizer would in its first step."""
    for master in single.get_parameters():
        state = single.optimizer.state[master]
        for kind in moments:
            if kind not in state:
                state[kind] = torch.zeros_like(master, requires_grad=False)
        if not counts_in_groups(single):
            state.setdefault("step", torch.tensor(0.0, device=master.device))


def _local(
    single: Any, moments: Sequence[str]
) -> Iterator[tuple[int, nn.Parameter, str, torch.Tensor]]:
    """(number, parameter, kind, tensor) of a plain optimizer, which is the same on all replicas."""
    for index, parameter in enumerate(updated_parameters(single)):
        for kind in _kinds(parameter, moments):
            tensor = _target(single, parameter, kind)
            assert tensor is not None
            yield index, parameter, kind, tensor


def _gathered(
    single: DistributedOptimizer, moments: Sequence[str], is_loading: bool
) -> Iterator[tuple[int, nn.Parameter, str, torch.Tensor]]:
    """As `_local`, for a distributed optimizer; nothing on the replicas that do not save."""
    # With gloo and on the CPU, so that no GPU holds the whole state.
    state = single.get_parameter_state_dp_zero(
        use_gloo_comm=True, empty_data=is_loading, return_on_all_ranks=is_loading
    )
    if state is None:
        return
    index = 0
    for number, buffer in enumerate(single.buffers):
        (tensors,) = state[number].values()
        # The buffer's offsets include the padding after each bucket, but the gathered tensors do
        # not. Megatron's own fully reshardable format overlooks that and shifts later parameters.
        padding = [0]
        for bucket in buffer.buckets:
            padding.append(padding[-1] + bucket.grad_data.numel() - bucket.numel_unpadded)
        for parameter, (start, end, bucket_number) in buffer.param_index_map.items():
            place = slice(start - padding[bucket_number], end - padding[bucket_number])
            for kind in _kinds(parameter, moments):
                flat = tensors["param" if kind == _MASTER else kind][place]
                yield index, parameter, kind, flat.view(parameter.shape)
            index += 1


def _kinds(parameter: nn.Parameter, moments: Sequence[str]) -> tuple[str, ...]:
    # An fp32 backbone's weights are its master weights.
    return (*moments,) if parameter.dtype == torch.float32 else (*moments, _MASTER)


def _finish_gather(single: DistributedOptimizer) -> None:
    """Gather the weights that would be gathered in the next forward pass."""
    if single.ddp_config.overlap_param_gather:
        for chunk in single.model_chunks:
            chunk.start_param_sync(force_sync=True)
