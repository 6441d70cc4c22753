"""Process groups of a run: Megatron's and the head's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from calm_dist.compat.megatron import process_groups
from calm_dist.parallel.launch import patience
from calm_dist.recipe import Recipe

# Model-parallel peers are consecutive ranks: the streaming reader's replication needs that.
RANK_ORDER = "tp-cp-ep-pp-dp"


@dataclass(frozen=True)
class Topology:
    """The position of this rank in the tensor, context, pipeline and data dimensions.

    ``head_group`` holds every rank of the last pipeline stage: the head is token-wise, so the
    tensor- and context-parallel ranks of that stage are further data parallelism for it.
    """

    rank: int
    world_size: int
    device: torch.device
    groups: ProcessGroupCollection
    head_ranks: tuple[int, ...]
    head_group: dist.ProcessGroup
    self_group: dist.ProcessGroup

    @property
    def tp_rank(self) -> int:
        return self.groups.tp.rank()

    @property
    def tp_size(self) -> int:
        return self.groups.tp.size()

    @property
    def cp_rank(self) -> int:
        return self.groups.cp.rank()

    @property
    def cp_size(self) -> int:
        return self.groups.cp.size()

    @property
    def pp_rank(self) -> int:
        return self.groups.pp.rank()

    @property
    def pp_size(self) -> int:
        return self.groups.pp.size()

    @property
    def dp_size(self) -> int:
        """Replicas with separate blocks; context-parallel ranks share theirs."""
        return self.groups.dp.size()

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the end of the backbone, and the head."""
        return self.pp_rank == self.pp_size - 1


def build_topology(recipe: Recipe, device: torch.device) -> Topology:
    """Create all process groups; every rank of an initialised world must call this once."""
    parallel = recipe.parallel
    # Longer than the watchdog's limit, because the watchdog's message says more.
    seconds = patience(recipe.health.timeout_seconds) + 30.0 + recipe.data.patience_seconds
    timeout = timedelta(seconds=seconds)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_size,
        context_parallel_size=parallel.context_parallel_size,
        # There are no experts. With their default size, Megatron refuses this order together with
        # context parallelism and stages, because experts would have more replicas than attention.
        expert_tensor_parallel_size=parallel.tensor_parallel_size * parallel.context_parallel_size,
        order=RANK_ORDER,
        # On GPUs, too, through which the distributed optimizer's state is gathered on CPUs.
        create_gloo_process_groups=recipe.parallel.distributed_optimizer,
        distributed_timeout_minutes=math.ceil(timeout / timedelta(minutes=1)),
    )
    # Megatron draws initial weights from this tracker before `models.initialize` sets them.
    tensor_parallel.model_parallel_cuda_manual_seed(recipe.run.seed)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    per_replica = parallel.model_parallel_size
    per_stage = per_replica // parallel.pipeline_parallel_size
    head_ranks = [r for r in range(world_size) if r % per_replica >= per_replica - per_stage]
    return Topology(
        rank,
        world_size,
        device,
        groups,
        tuple(head_ranks),
        head_group=dist.new_group(head_ranks, timeout),
        # new_group is a collective of the whole world, also for groups of one.
        self_group=[dist.new_group([r], timeout) for r in range(world_size)][rank],
    )


def destroy_topology(topology: Topology | None = None) -> None:
    """Destroy Megatron's groups and the head's groups of ``topology``, so that another recipe can
    be built in the same world. Gloo keeps threads for every remaining group."""
    groups = process_groups()
    if topology is not None:
        groups += [topology.head_group, topology.self_group]
    for group in groups:
        dist.destroy_process_group(group)
    # Last, because it destroys those of its groups that still exist.
    parallel_state.destroy_model_parallel()
