"""Private parts of Megatron-core 0.16.1 that this package uses."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import (
    FileSystemWriterAsync as AsyncFileWriter,
)
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.transformer import mlp
from torch import nn


def process_groups() -> list[dist.ProcessGroup]:
    """All process groups that Megatron has made.

    Its list starts with None, which stands for the world, and has placeholders for groups of other
    ranks; both are excluded.
    """
    known = parallel_state._global_process_group_list or ()
    return [group for group in known if isinstance(group, dist.ProcessGroup)]


def single_optimizers(optimizer: MegatronOptimizer) -> list[Any]:
    """The parts of a chained optimizer, or the optimizer itself."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def use_rotation(fused: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """Rotate queries and keys on GPUs by ``fused``, where ``apply_rope_fusion`` calls Transformer
    Engine; to be called before a configuration is made.

    Args:
        fused: (states [steps, B, heads, size], angles [steps, 1 or B, 1, size]) -> rotated states.
    """

    def rotate(states: torch.Tensor, angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
        if states.device.type == "cuda" and not interleaved:
            return fused(states, angles)
        return rope_utils._apply_rotary_pos_emb_bshd(states, angles, rotary_interleaved=interleaved)

    rope_utils.fused_apply_rotary_pos_emb = rotate


def use_swiglu(fused: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Compute SwiGLU on GPUs by ``fused``, where ``bias_activation_fusion`` calls a function that
    torch.compile fuses.

    Args:
        fused: [..., 2 * size], gate and up -> [..., size].
    """

    def swiglu(both: torch.Tensor, bias: Any, *stored: Any) -> torch.Tensor:
        if both.device.type == "cuda" and bias is None and not any(stored):
            return fused(both)
        return bias_swiglu_impl(both, bias, *stored)

    mlp.bias_swiglu_impl = swiglu


def replace_inner_optimizer(
    single: Any, make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
) -> None:
    """Replace the torch optimizer inside one of Megatron's; only before the first step, when it has
    no state yet.

    Args:
        make: called with the parameter groups, without the settings of Megatron's Adam.
    """
    inner = single.optimizer
    settings = inner.defaults.keys() - {"lr", "weight_decay"}
    groups = [
        {name: value for name, value in group.items() if name not in settings}
        for group in inner.param_groups
    ]
    single.optimizer = make(groups)


def counts_in_groups(single: Any) -> bool:
    """Whether the number of updates is stored in the parameter groups, as in the fused Adam of Apex
    and of Transformer Engine, instead of with the moments of each parameter."""
    return type(single.optimizer).__name__ == "FusedAdam"


def updated_parameters(single: Any) -> list[nn.Parameter]:
    """The model's parameters that an optimizer updates, in the optimizer's order."""
    if isinstance(single, DistributedOptimizer):
        return [p for buffer in single.buffers for p in buffer.param_index_map]
    if isinstance(single, Float16OptimizerWithFloat16Params):
        groups = [*single.float16_groups, *single.fp32_from_fp32_groups]
        return [p for group in groups for p in group]
    return single.get_parameters()


def master_weight(single: Any, parameter: nn.Parameter) -> torch.Tensor | None:
    """The tensor that the optimizer updates for a parameter: the parameter, its fp32 copy, or this
    replica's part of either; None if other replicas hold all of it."""
    if not isinstance(single, DistributedOptimizer):
        return getattr(parameter, "main_param", parameter)
    if parameter not in single.model_param_group_index_map:
        return None
    group, place = single.model_param_group_index_map[parameter]
    return single.optimizer.param_groups[group]["params"][place]


def own_part(single: Any, parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
    """This replica's part of ``whole``, a tensor of the parameter's size."""
    if not isinstance(single, DistributedOptimizer):
        return whole
    part = single._get_model_param_range_map(parameter)["param"]
    return whole.flatten()[part.start : part.end]


class SaveStrategy(torch_strategy.TorchDistSaveShardedStrategy):
    """Megatron's save strategy; a subclass can change its requests before they run."""

    @abstractmethod
    def change(self, request: AsyncRequest, writer: Any, metadata: Any, ranks: Any) -> AsyncRequest:
        """The request to run.

        Args:
            request: Megatron's request.
            writer: the `AsyncFileWriter` of this plan.
            metadata: the description of all tensors, on rank 0.
            ranks: torch's wrapper of the process group that saves.
        """

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Sequence[Any]) -> AsyncRequest:
        _, metadata, ranks = planned
        request = super()._get_save_and_finalize_callbacks(writer, planned)
        return self.change(request, writer, metadata, ranks)


def use_file_writer(writer: type[AsyncFileWriter]) -> None:
    """Make the save strategy use this writer class, by replacing the name in its module."""
    torch_strategy.FileSystemWriterAsync = writer


def use_results_queue(results: Any) -> None:
    """Make writers report to this queue. For its own queue Megatron would start a manager process,
    which imports the entry script again (seconds) and outlives a killed rank."""
    filesystem_async._results_queue = results
