"""The state of a ZeRO optimizer's parameter groups, as whole tensors and as a rank's part.

ZeRO-1 and 2 cut the concatenation of a group's parameters into equal parts; ZeRO-3 cuts every
parameter. Both pad the end. (DeepSpeed 0.19.8)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn


class Copy(NamedTuple):
    """A whole tensor, and the number of this copy among those on different ranks; one copy is
    always 0."""

    whole: torch.Tensor
    replica: int


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
        """Whole fp32 weights; a collective unless the model's own weights are fp32."""
        return self._own_weights() or self.gather(self.partition)

    def copies(self, local: torch.Tensor) -> list[Copy | None]:
        """Whole tensors of some parameters, each on the rank that already has most of it.

        A collective, but only parameters that span two parts are sent.
        """
        rank, length = dist.get_rank(self._group), local.numel()
        flat, found, waiting, begin = local.detach(), [], [], 0
        for p in self.parameters:
            end = begin + p.numel()
            holders = range(begin // length, (end - 1) // length + 1)
            pieces = {r: (max(begin, r * length), min(end, (r + 1) * length)) for r in holders}
            owner = max(holders, key=lambda r, pieces=pieces: pieces[r][1] - pieces[r][0])  # type: ignore[misc]
            whole: torch.Tensor | None = None
            if owner == rank:
                first, last = pieces[rank]
                whole = flat[first - rank * length : last - rank * length]
                if len(holders) > 1:
                    mine, whole = whole, flat.new_empty(p.numel())
                    whole[first - begin : last - begin] = mine
                    for r in set(holders) - {rank}:
                        place = whole[pieces[r][0] - begin : pieces[r][1] - begin]
                        waiting.append(self._exchange(dist.irecv, place, r))
            elif rank in pieces:
                first, last = pieces[rank]
                piece = flat[first - rank * length : last - rank * length].contiguous()
                waiting.append(self._exchange(dist.isend, piece, owner))
            found.append(None if whole is None else Copy(whole.view(p.shape), 0))
            begin = end
        for work in dist.batch_isend_irecv(waiting) if waiting else ():
            work.wait()
        return found

    def weight_copies(self) -> list[Copy | None]:
        """`copies` of the fp32 weights; on every rank if the model's own weights are fp32."""
        if own := self._own_weights():
            replica = dist.get_rank(self._group)
            return [Copy(weight, replica) for weight in own]
        return self.copies(self.partition)

    def _own_weights(self) -> list[torch.Tensor]:
        """The model's own weights if they are fp32, else an empty list."""
        if any(p.dtype != torch.float32 for p in self.parameters):
            return []
        return [p.detach() for p in self.parameters]

    def _exchange(self, how: Any, tensor: torch.Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(how, tensor, dist.get_global_rank(self._group, peer), self._group)

    def cut(self, wholes: list[torch.Tensor]) -> torch.Tensor:
        """This rank's part of whole tensors."""
        flat = torch.cat([whole.flatten() for whole in wholes])
        return _part(flat, self.partition.numel(), self._group)

    def set_weights(self, wholes: list[torch.Tensor]) -> None:
        """Set the fp32 weights in the optimizer and in the model."""
        self.partition.copy_(self.cut(wholes))
        for p, whole in zip(self.parameters, wholes, strict=True):
            p.copy_(whole)


class PartitionedGroup:
    """A parameter group of ZeRO-3; members as in `ConcatenatedGroup`."""

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

    def copies(self, local: torch.Tensor) -> list[Copy | None]:
        """Whole tensors of all parameters, on every rank; a collective."""
        replica = dist.get_rank(self._group)
        return [Copy(whole, replica) for whole in self.gather(local)]

    def weight_copies(self) -> list[Copy | None]:
        """`copies` of the fp32 weights."""
        return self.copies(self.partition)

    def cut(self, wholes: list[torch.Tensor]) -> torch.Tensor:
        """This rank's part of whole tensors."""
        pairs = zip(self.parameters, wholes, strict=True)
        return torch.cat([_part(w.flatten(), p.partition_numel(), self._group) for p, w in pairs])

    def set_weights(self, wholes: list[torch.Tensor]) -> None:
        """Set the fp32 weights in the optimizer and in this rank's part of the model."""
        # Copy in place, to keep the views through which DeepSpeed accesses single parameters.
        self.partition.data.copy_(self.cut(wholes))
        self._model_partition.data.copy_(self.partition.data)


ParameterGroup = ConcatenatedGroup | PartitionedGroup


def parameter_groups(zero: Any, stage: int, group: dist.ProcessGroup) -> Iterator[ParameterGroup]:
    """All parameter groups of a ZeRO optimizer whose ranks are ``group``."""
    kind = PartitionedGroup if stage == 3 else ConcatenatedGroup
    count = len(zero.fp16_groups if stage == 3 else zero.single_partition_of_fp32_groups)
    for number in range(count):
        yield kind(zero, number, group)


def _all_gather(local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[n] on each rank -> [ranks, n] on every rank."""
    local = local.detach().contiguous()
    gathered = local.new_empty(dist.get_world_size(group) * local.numel())
    dist.all_gather_into_tensor(gathered, local, group=group)
    return gathered.view(-1, local.numel())


def _part(flat: torch.Tensor, length: int, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's ``length`` elements of a flat tensor; zeros beyond its end."""
    start = dist.get_rank(group) * length
    part = flat[start : start + length]
    return nn.functional.pad(part, (0, length - part.numel()))
