"""What is used of Megatron-core 0.16.1 behind its public names."""

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
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import nn


def process_groups() -> list[dist.ProcessGroup]:
    """All groups that Megatron has made.

    Its list starts with None, which would mean the world itself; what stands for a group of other
    ranks is no group either.
    """
    known = parallel_state._global_process_group_list or ()
    return [group for group in known if isinstance(group, dist.ProcessGroup)]


def single_optimizers(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers that one may stand for."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def replace_inner_optimizer(
    single: Any, make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
) -> None:
    """Have an optimizer of Megatron's update by another one of torch's interface; before the first
    step, when it has no state yet.

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
    """Whether the number of updates is in the parameter groups, as the fused Adam of Apex and of
    Transformer Engine keep it, and not beside the moments of each parameter."""
    return type(single.optimizer).__name__ == "FusedAdam"


def updated_parameters(single: Any) -> list[nn.Parameter]:
    """The model's parameters that an optimizer updates, in an order of its own."""
    if isinstance(single, DistributedOptimizer):
        return [p for buffer in single.buffers for p in buffer.param_index_map]
    if isinstance(single, Float16OptimizerWithFloat16Params):
        groups = [*single.float16_groups, *single.fp32_from_fp32_groups]
        return [p for group in groups for p in group]
    return single.get_parameters()


def master_weight(single: Any, parameter: nn.Parameter) -> torch.Tensor | None:
    """What the optimizer updates for a parameter: itself, its fp32 copy, or this replica's part of
    either; None where another replica has it."""
    if not isinstance(single, DistributedOptimizer):
        return getattr(parameter, "main_param", parameter)
    if parameter not in single.model_param_group_index_map:
        return None
    group, place = single.model_param_group_index_map[parameter]
    return single.optimizer.param_groups[group]["params"][place]


def own_part(single: Any, parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
    """The part of a tensor as large as a parameter that belongs to this replica."""
    if not isinstance(single, DistributedOptimizer):
        return whole
    part = single._get_model_param_range_map(parameter)["param"]
    return whole.flatten()[part.start : part.end]


class SaveStrategy(torch_strategy.TorchDistSaveShardedStrategy):
    """Megatron's strategy of saving, whose requests a subclass changes before they run."""

    @abstractmethod
    def change(self, request: AsyncRequest, writer: Any, metadata: Any, ranks: Any) -> AsyncRequest:
        """The request to run.

        Args:
            request: Megatron's own.
            writer: the `AsyncFileWriter` of this plan.
            metadata: the description of all tensors, on rank 0.
            ranks: torch's wrapper of the group that saves.
        """

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Sequence[Any]) -> AsyncRequest:
        _, metadata, ranks = planned
        request = super()._get_save_and_finalize_callbacks(writer, planned)
        return self.change(request, writer, metadata, ranks)


def use_file_writer(writer: type[AsyncFileWriter]) -> None:
    """Have the strategy make its writers of this class: it knows them by a name of its module."""
    torch_strategy.FileSystemWriterAsync = writer


def use_results_queue(results: Any) -> None:
    """Have writers report to this queue. Megatron would start a manager process for its own, which
    imports the entry script again (seconds) and outlives a killed rank."""
    filesystem_async._results_queue = results
