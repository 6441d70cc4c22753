"""State of the body's AdamW in a checkpoint: the same for Megatron's plain and its distributed
optimizer, and for every layout.

Megatron's own `load_state_dict` of the distributed optimizer (0.16.1) works with fused Adam only:
with torch's it fails on an empty state, and then lets all parameters share one step count. What
is stored here are the moments and the master weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import nn

_MOMENTS = ("exp_avg", "exp_avg_sq")
_MASTER = "fp32_param"


def optimizer_state(
    optimizer: MegatronOptimizer, model_state: Mapping[str, Any], is_loading: bool = False
) -> dict[str, Any]:
    """Sharded tensors of the body optimizer's state. How many updates it made, it does not say.

    Args:
        model_state: the body's sharded tensors, around its parameters themselves.
        is_loading: the tensors are only places to load into.

    A collective of the replicas. With the distributed optimizer the first replica holds all
    tensors, on the CPU; to load, every replica does.
    """
    sharded = {
        id(tensor.data): tensor
        for tensor in model_state.values()
        if isinstance(tensor, ShardedTensor | ShardedTensorFactory)
    }
    state: dict[str, Any] = {}
    for number, single in enumerate(_parts(optimizer)):
        _fill(single)
        if isinstance(single, DistributedOptimizer):
            _finish_gather(single)
            tensors = _gathered(single, is_loading)
        else:
            tensors = _local(single)
        for index, parameter, kind, tensor in tensors:
            state[f"{number}.{index}.{kind}"] = make_sharded_optimizer_tensor(
                sharded[id(parameter)], tensor, prefix=f"optimizer.state.{kind}"
            )
    return state


@torch.no_grad()
def load_optimizer_state(
    optimizer: MegatronOptimizer, loaded: Mapping[str, Any], step: int
) -> None:
    """Take over what was read into the tensors of `optimizer_state`, after ``step`` updates."""
    for number, single in enumerate(_parts(optimizer)):
        _fill(single)
        for index, parameter in enumerate(_parameters(single)):
            kinds = (kind for kind in (*_MOMENTS, _MASTER) if f"{number}.{index}.{kind}" in loaded)
            for kind in kinds:
                target = _target(single, parameter, kind)
                if target is not None:
                    whole = loaded[f"{number}.{index}.{kind}"]
                    target.copy_(_own_part(single, parameter, whole))
        if _counts_by_parameter(single):
            for master, moments in single.optimizer.state.items():
                # One tensor each: a shared one would be counted up once per parameter.
                moments["step"] = torch.tensor(float(step), device=master.device)
        else:
            for group in single.optimizer.param_groups:
                group["step"] = step


@torch.no_grad()
def set_master_weights(
    optimizer: MegatronOptimizer, weights: Mapping[nn.Parameter, torch.Tensor]
) -> None:
    """Set the fp32 copies that a bf16 body's optimizer updates; an fp32 body has none."""
    for single in _parts(optimizer):
        for parameter in _parameters(single):
            if parameter.dtype == torch.float32:
                continue
            master = _target(single, parameter, _MASTER)
            if master is not None:
                master.copy_(_own_part(single, parameter, weights[parameter]))


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _parameters(single: Any) -> list[nn.Parameter]:
    """The model's parameters that an optimizer updates, in an order of its own."""
    if isinstance(single, DistributedOptimizer):
        return [p for buffer in single.buffers for p in buffer.param_index_map]
    if isinstance(single, Float16OptimizerWithFloat16Params):
        groups = [*single.float16_groups, *single.fp32_from_fp32_groups]
        return [p for group in groups for p in group]
    return single.get_parameters()


def _master(single: Any, parameter: nn.Parameter) -> torch.Tensor | None:
    """What the optimizer updates for a parameter: itself, its fp32 copy, or this replica's part of
    either; None where another replica has it."""
    if not isinstance(single, DistributedOptimizer):
        return getattr(parameter, "main_param", parameter)
    if parameter not in single.model_param_group_index_map:
        return None
    group, place = single.model_param_group_index_map[parameter]
    return single.optimizer.param_groups[group]["params"][place]


def _target(single: Any, parameter: nn.Parameter, kind: str) -> torch.Tensor | None:
    master = _master(single, parameter)
    if master is None or kind == _MASTER:
        return master
    return single.optimizer.state[master][kind]


def _own_part(single: Any, parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
    """The part of a tensor as large as a parameter that belongs to this replica."""
    if not isinstance(single, DistributedOptimizer):
        return whole
    part = single._get_model_param_range_map(parameter)["param"]
    return whole.flatten()[part.start : part.end]


def _fill(single: Any) -> None:
    """Begin the state as Adam would in its first step."""
    for master in single.get_parameters():
        moments = single.optimizer.state[master]
        for kind in _MOMENTS:
            if kind not in moments:
                moments[kind] = torch.zeros_like(master, requires_grad=False)
        if _counts_by_parameter(single):
            moments.setdefault("step", torch.tensor(0.0, device=master.device))


def _counts_by_parameter(single: Any) -> bool:
    """Whether this is torch's Adam; the fused ones count updates in the parameter groups."""
    return isinstance(single.optimizer, torch.optim.Adam | torch.optim.AdamW)


def _local(single: Any) -> Iterator[tuple[int, nn.Parameter, str, torch.Tensor]]:
    """(number, parameter, kind, tensor) of a plain optimizer, whose replicas are all alike."""
    for index, parameter in enumerate(_parameters(single)):
        for kind in _kinds(parameter):
            tensor = _target(single, parameter, kind)
            assert tensor is not None
            yield index, parameter, kind, tensor


def _gathered(
    single: DistributedOptimizer, is_loading: bool
) -> Iterator[tuple[int, nn.Parameter, str, torch.Tensor]]:
    """As `_local`, of a distributed optimizer; nothing on the replicas that do not save."""
    # By gloo and through the CPU, so that no GPU holds the whole state.
    state = single.get_parameter_state_dp_zero(
        use_gloo_comm=True, empty_data=is_loading, return_on_all_ranks=is_loading
    )
    if state is None:
        return
    index = 0
    for number, buffer in enumerate(single.buffers):
        (tensors,) = state[number].values()
        # The buffer's places count the padding behind each bucket, which is gathered without it.
        # Megatron's own fully reshardable format overlooks that, and shifts what lies behind.
        padding = [0]
        for bucket in buffer.buckets:
            padding.append(padding[-1] + bucket.grad_data.numel() - bucket.numel_unpadded)
        for parameter, (start, end, bucket_number) in buffer.param_index_map.items():
            place = slice(start - padding[bucket_number], end - padding[bucket_number])
            for kind in _kinds(parameter):
                flat = tensors["param" if kind == _MASTER else kind][place]
                yield index, parameter, kind, flat.view(parameter.shape)
            index += 1


def _kinds(parameter: nn.Parameter) -> tuple[str, ...]:
    # An fp32 body's weights are its master weights.
    return _MOMENTS if parameter.dtype == torch.float32 else (*_MOMENTS, _MASTER)


def _finish_gather(single: DistributedOptimizer) -> None:
    """Weights that would be gathered in the next forward pass are gathered now."""
    if single.ddp_config.overlap_param_gather:
        for chunk in single.model_chunks:
            chunk.start_param_sync(force_sync=True)
