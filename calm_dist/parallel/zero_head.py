"""The generative head as one DeepSpeed ZeRO engine on the last pipeline stage.

The engine lives inside Megatron's schedule: its forward is part of the last stage's loss, its
backward runs in the schedule's own `backward`. It sees the TP·CP·DP ranks of the last stage as
plain data parallelism, each with its shard of the sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from calm_dist.compat.deepspeed import (
    averaged_gradients,
    discard_gradients,
    forget_groups,
    gather_persistent_parameters,
    import_deepspeed,
    partition_parameters,
    skip_norm,
)
from calm_dist.compat.zero_groups import Copy, ParameterGroup, parameter_groups
from calm_dist.costs.chunks import ZERO_BUCKET_ELEMENTS
from calm_dist.models.heads.base import NoiseSource
from calm_dist.optimizers.make import decay_groups, make_optimizer
from calm_dist.parallel.local_gradients import LocalGradients
from calm_dist.parallel.topology import Topology
from calm_dist.recipe import LanguageModelRecipe


class HeadGroups:
    """The head's process groups as DeepSpeed's ``mpu``: pure data parallelism."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._topology.head_group

    def get_data_parallel_world_size(self) -> int:
        return len(self._topology.head_ranks)

    def get_data_parallel_rank(self) -> int:
        return self._topology.head_ranks.index(self._topology.rank)

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(self._topology.head_ranks)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._topology.self_group

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_pipeline_model_parallel_world_size = get_model_parallel_world_size
    get_pipeline_model_parallel_rank = get_model_parallel_rank

    def get_tensor_model_parallel_src_rank(self) -> int:
        return self._topology.rank


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.scale, None


class ZeroHead:
    """A head module in a ZeRO engine; in stage 3 its matrices are also partitioned."""

    def __init__(self, head: nn.Module, recipe: LanguageModelRecipe, topology: Topology) -> None:
        deepspeed = import_deepspeed()
        self._stage = recipe.parallel.zero_stage
        self._group = topology.head_group
        self._tp_size = topology.tp_size
        self._device = topology.device
        training = recipe.training
        spec = training.optimizer_spec
        self._state_names = ("fp32", *spec.moments)
        optimizer = make_optimizer(spec, decay_groups(head.parameters(), training), training)
        self._engine, *_ = deepspeed.initialize(
            model=head,
            optimizer=optimizer,
            config=_engine_config(recipe, head),
            mpu=HeadGroups(topology),
            dist_init_required=False,
        )
        if self._stage == 3:
            skip_norm(self._zero)
        # ZeRO-3 frees the weights after each micro-batch's pass, so it reduces gradients then, too.
        self._sums = LocalGradients(self.module) if self._stage < 3 else None

    def close(self) -> None:
        """Destroy the engine; otherwise its hooks would keep it and the process groups alive."""
        if self._sums is not None:
            self._sums.close()
        self._engine.destroy()
        forget_groups()

    @property
    def module(self) -> nn.Module:
        """The head itself."""
        return self._engine.module

    def loss(
        self,
        hidden: torch.Tensor,
        mean: torch.Tensor,
        log_std: torch.Tensor,
        noise: NoiseSource,
        weight: torch.Tensor,
        last_micro_batch: bool,
    ) -> torch.Tensor:
        """This rank's share of the loss: the weighted sum over its positions.

        Shapes as in `models.heads.base.GenerativeHead.forward`. DeepSpeed averages the head's
        gradient over TP·CP·DP ranks, but the loss is a *sum* over the TP shards and a mean over
        CP·DP (Megatron averages the backbone's gradient over those; its schedule multiplies the
        loss by CP). So the loss is scaled by TP, and the gradient into the backbone back by 1/TP.
        """
        hidden = _ScaleGradient.apply(hidden, 1.0 / self._tp_size)
        value = self._forward(last_micro_batch, hidden, mean, log_std, noise, weight)
        # The schedule scales the loss in place; it must not touch the engine's own tensor.
        return _ScaleGradient.apply(value, float(self._tp_size)).clone()

    def states(
        self, hidden: torch.Tensor, previous: torch.Tensor | None, last_micro_batch: bool
    ) -> torch.Tensor:
        """States [S, K, d] of a `models.heads.tokens.TokensHead`, for its `forward`'s arguments.

        Gradients are scaled as in `loss`: the loss computed from the states is a sum, to which this
        rank's positions contribute a part.
        """
        hidden = _ScaleGradient.apply(hidden, 1.0 / self._tp_size)
        if previous is not None:
            previous = _ScaleGradient.apply(previous, 1.0 / self._tp_size)
        states = self._forward(last_micro_batch, hidden, previous)
        return _ScaleGradient.apply(states, float(self._tp_size))

    def _forward(self, last_micro_batch: bool, *inputs: Any) -> Any:
        """The head's output; its gradient is reduced after the last micro-batch."""
        if self._sums is not None and not last_micro_batch:
            return self._sums.run(*inputs)
        if self._sums is not None:
            self._sums.before_last()
        self._engine.set_gradient_accumulation_boundary(last_micro_batch)
        return self._engine(*inputs)

    def squared_gradient_norm(self) -> torch.Tensor:
        """Squared norm of this rank's partition of the averaged gradient; fp64 scalar."""
        if self._sums is not None:
            self._sums.check_complete()
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for gradient in averaged_gradients(self._zero):
            total += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
        return total

    def scale_gradients(self, factor: float) -> None:
        """Multiply the averaged gradient before `step`."""
        for gradient in averaged_gradients(self._zero):
            gradient.mul_(factor)

    def step(self, learning_rate: float) -> None:
        """Update this rank's partition and gather the new weights."""
        for group in self._zero.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()

    def discard_gradients(self) -> None:
        """Discard the gradient of a skipped step, as the ZeRO optimizer does after an overflow."""
        discard_gradients(self._zero, self._stage)

    def export_state(self) -> dict[str, torch.Tensor]:
        """fp32 weights and moments as ``<state>.<parameter>``, complete and independent of layout.

        A collective of the head's ranks; every rank gets everything. The weights of an fp32 head
        are the module's own tensors, not copies.
        """
        return {
            f"{kind}.{name}": whole
            for kind, group, names in self._kinds()
            for name, whole in zip(
                names,
                group.weights() if kind == "fp32" else group.gather(self._local(group, kind)),
                strict=True,
            )
        }

    def state_to_save(self) -> dict[str, Copy]:
        """As `export_state`, but each rank returns only the tensors that it has at little or no
        cost.

        A collective of the head's ranks; the copies of all ranks together are the complete state.
        """
        return {
            f"{kind}.{name}": copy
            for kind, group, names in self._kinds()
            for name, copy in zip(
                names,
                group.weight_copies() if kind == "fp32" else group.copies(self._local(group, kind)),
                strict=True,
            )
            if copy is not None
        }

    def _kinds(self) -> Iterator[tuple[str, ParameterGroup, list[str]]]:
        """Each kind of state of each parameter group, with the names of its parameters."""
        names = {id(p): name for name, p in self.module.named_parameters()}
        for group in parameter_groups(self._zero, self._stage, self._group):
            for kind in self._state_names:
                yield kind, group, [names[id(p)] for p in group.parameters]

    @staticmethod
    def _local(group: ParameterGroup, kind: str) -> torch.Tensor:
        """This rank's part of the optimizer's moments; zeros before the first step."""
        local = group.moments.get(kind)
        return torch.zeros_like(group.partition) if local is None else local

    @torch.no_grad()
    def import_state(self, state: dict[str, torch.Tensor], step: int) -> None:
        """Load the result of `export_state`, on any number of ranks and in any ZeRO stage.

        A collective of the head's ranks; ``step`` is the number of updates.
        """
        names = {id(p): name for name, p in self.module.named_parameters()}
        zero = self._zero
        if self._stage == 3:
            partition_parameters(zero)
        for group in parameter_groups(zero, self._stage, self._group):
            for kind in self._state_names:
                wholes = [
                    state[f"{kind}.{names[id(p)]}"].to(group.partition.device)
                    for p in group.parameters
                ]
                if kind == "fp32":
                    group.set_weights(wholes)
                else:
                    group.moments[kind] = group.cut(wholes)
            group.moments["step"] = torch.tensor(float(step), device=group.partition.device)
        if self._stage == 3:
            # Complete on every rank between steps, as after `step`.
            gather_persistent_parameters(zero)

    @property
    def _zero(self) -> Any:
        """DeepSpeed's ZeRO optimizer, which wraps ours."""
        return self._engine.optimizer


def _engine_config(recipe: LanguageModelRecipe, head: nn.Module) -> dict[str, Any]:
    """DeepSpeed's configuration; we or Megatron do accumulation, averaging and clipping."""
    sizes = [p.numel() for p in head.parameters()]
    vectors = [p.numel() for p in head.parameters() if p.dim() <= 1]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        # Megatron divides by the number of micro-batches.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        # It waits for the device at every forward pass.
        "timers": {"throughput": {"enabled": False}},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": recipe.parallel.zero_stage,
            "overlap_comm": False,
            # A buffer of this size is allocated, however small the head is.
            "reduce_bucket_size": min(sum(sizes), ZERO_BUCKET_ELEMENTS),
            # ZeRO-3: norms and biases stay unpartitioned; fetching them would cost more than it
            # saves.
            "stage3_param_persistence_threshold": max(vectors),
            # Otherwise ZeRO-3 replaces torch.nn.functional.linear in the whole process, which
            # changes the rounding of bf16 gradients.
            "memory_efficient_linear": False,
        },
    }
    if recipe.parallel.zero_stage < 3:
        # The norm is `JointOptimizer`'s, which skips steps as well.
        config["zero_optimization"]["compute_grad_norm"] = False
    if recipe.precision == "bf16":
        # `JointOptimizer` has checked the gradient; a second check would wait for the device.
        config["bf16"] = {"enabled": True, "check_grad_overflow": False}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
