"""What a ZeRO optimizer keeps of each parameter group, as whole tensors and as a rank's part.

ZeRO-1 and 2 cut the concatenation of a group's parameters into equal parts; ZeRO-3 cuts every
parameter. Both pad the end. (deepspeed 0.19.8)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class ConcatenatedGroup:
    """A parameter group of ZeRO-1 or 2.

    ``partition`` is this rank's flat part of the fp32 weights, ``moments`` its Adam state.
    """

    def __init__(self, zero: Any, number: int, group: dist.ProcessGroup) -> None:
        self.parameters: list[nn.Parameter] = zero.round_robin_bit16_groups[number]
        self.partition: torch.Tensor = zero.single_partition_of_fp32_groups[number]
        self.moments: dict[str, Any] = zero.optimizer.state.setdefault(self.partition, {})
        self._group = group

    def gather(self, local: torch.Tensor) -> list[torch.Tensor]:
        """Whole tensors of all parameters, from every rank's part; a collective."""
        flat, wholes = _all_gather(local, self._group).flatten(), []
        for p in self.parameters:
            wholes.append(flat[: p.numel()].view(p.shape))
            flat = flat[p.numel() :]
        return wholes

    def weights(self) -> list[torch.Tensor]:
        """Whole fp32 weights; a collective where the model's own are rounded ones."""
        if all(p.dtype == torch.float32 for p in self.parameters):
            return [p.detach() for p in self.parameters]
        return self.gather(self.partition)

    def cut(self, wholes: list[torch.Tensor]) -> torch.Tensor:
        """This rank's part of whole tensors."""
        flat = torch.cat([whole.flatten() for whole in wholes])
        return _part(flat, self.partition.numel(), self._group)

    def set_weights(self, wholes: list[torch.Tensor]) -> None:
        """Take over fp32 weights, for the optimizer and for the model."""
        self.partition.copy_(self.cut(wholes))
        for p, whole in zip(self.parameters, wholes, strict=True):
            p.copy_(whole)


class PartitionedGroup:
    """A parameter group of ZeRO-3; members as of `ConcatenatedGroup`."""

    def __init__(self, zero: Any, number: int, group: dist.ProcessGroup) -> None:
        self.parameters: list[Any] = zero.fp16_groups[number]
        self.partition: torch.Tensor = zero.fp32_partitioned_groups_flat[number]
        self.moments: dict[str, Any] = zero.optimizer.state.setdefault(self.partition, {})
        self._model_partition: torch.Tensor = zero.fp16_partitioned_groups_flat[number]
        self._group = group

    def gather(self, local: torch.Tensor) -> list[torch.Tensor]:
        """Whole tensors of all parameters, from every rank's part; a collective."""
        parts, wholes = _all_gather(local, self._group), []
        for p in self.parameters:
            length = p.partition_numel()
            whole = parts[:, :length].flatten()[: p.ds_numel]
            wholes.append(whole.view(p.ds_shape))
            parts = parts[:, length:]
        return wholes

    def weights(self) -> list[torch.Tensor]:
        """Whole fp32 weights; a collective."""
        return self.gather(self.partition)

    def cut(self, wholes: list[torch.Tensor]) -> torch.Tensor:
        """This rank's part of whole tensors."""
        pairs = zip(self.parameters, wholes, strict=True)
        return torch.cat([_part(w.flatten(), p.partition_numel(), self._group) for p, w in pairs])

    def set_weights(self, wholes: list[torch.Tensor]) -> None:
        """Take over fp32 weights, for the optimizer and for this rank's part of the model."""
        # Copying keeps the views through which DeepSpeed sees the parts of single parameters.
        self.partition.data.copy_(self.cut(wholes))
        self._model_partition.data.copy_(self.partition.data)


def parameter_groups(
    zero: Any, stage: int, group: dist.ProcessGroup
) -> Iterator[ConcatenatedGroup | PartitionedGroup]:
    """All parameter groups of a ZeRO optimizer whose ranks are ``group``."""
    kind = PartitionedGroup if stage == 3 else ConcatenatedGroup
    count = len(zero.fp16_groups if stage == 3 else zero.single_partition_of_fp32_groups)
    for number in range(count):
        yield kind(zero, number, group)


def _all_gather(local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[n] on each rank -> [ranks, n] on all."""
    local = local.detach().contiguous()
    gathered = local.new_empty(dist.get_world_size(group) * local.numel())
    dist.all_gather_into_tensor(gathered, local, group=group)
    return gathered.view(-1, local.numel())


def _part(flat: torch.Tensor, length: int, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's ``length`` elements of a flat tensor; zeros beyond its end."""
    start = dist.get_rank(group) * length
    part = flat[start : start + length]
    return nn.functional.pad(part, (0, length - part.numel()))
