"""One optimizer step over backbone (Megatron) and head (DeepSpeed), with one gradient norm."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from calm_dist.compat.megatron import replace_inner_optimizer, single_optimizers
from calm_dist.optimizers.make import make_optimizer
from calm_dist.optimizers.spec import ADAMW
from calm_dist.parallel.topology import Topology
from calm_dist.parallel.zero_head import ZeroHead
from calm_dist.recipe import LanguageModelRecipe
from calm_dist.training.engine import StepResult
from calm_dist.training.schedule import learning_rate


def build_backbone_optimizer(
    recipe: LanguageModelRecipe, chunks: list[DistributedDataParallel], dtype: torch.dtype
) -> MegatronOptimizer:
    """Megatron's optimizer for the backbone, plain or distributed, without its own clipping: AdamW,
    or the recipe's optimizer inside Megatron's wrapper."""
    training = recipe.training
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            adam_beta1=training.adam_beta1,
            adam_beta2=training.adam_beta2,
            adam_eps=training.adam_eps,
            clip_grad=0.0,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            log_num_zeros_in_grad=False,
            use_distributed_optimizer=recipe.parallel.distributed_optimizer,
            overlap_param_gather=recipe.parallel.overlap_param_gather,
        ),
        chunks,
        use_gloo_process_groups=recipe.parallel.distributed_optimizer,
    )
    for group in optimizer.param_groups:
        # Only Megatron's own scheduler would apply the multiplier that exempts norms and biases.
        group["weight_decay"] = training.weight_decay * group.get("wd_mult", 1.0)
        # For torch's AdamW: one pass over the memory instead of one per operation.
        group["fused"] = True
    spec = training.optimizer_spec
    if spec is not ADAMW:
        for single in single_optimizers(optimizer):
            replace_inner_optimizer(single, lambda groups: make_optimizer(spec, groups, training))
    return optimizer


class JointOptimizer:
    """Clips backbone and head by their joint gradient norm and steps both, or skips both."""

    def __init__(
        self,
        recipe: LanguageModelRecipe,
        backbone: MegatronOptimizer,
        head: ZeroHead | None,
        topology: Topology,
    ) -> None:
        self._training = recipe.training
        self._backbone, self._head = backbone, head
        self._device = topology.device

    def step(
        self, step: int, loss: torch.Tensor, stop: bool = False, data_failed: bool = False
    ) -> StepResult:
        """Apply the gradients of training step ``step``.

        If loss or norm is not finite on any rank, every rank skips the step.

        Args:
            loss: this rank's contribution to the mean loss, a scalar.
            stop: whether this rank was asked to stop; the result tells all ranks.
            data_failed: whether this rank could not read its next batch; the result tells all
                ranks.
        """
        rate = learning_rate(self._training, step)
        self._backbone.prepare_grads()
        total_loss, norm, stop, data_failed = self._reduce(loss, stop, data_failed)
        skipped = not (math.isfinite(total_loss) and math.isfinite(norm))
        if skipped:
            if self._head is not None:
                self._head.discard_gradients()
        else:
            self._clip(norm)
            for group in self._backbone.param_groups:
                group["lr"] = rate
            self._backbone.step_with_ready_grads()
            if self._head is not None:
                self._head.step(rate)
        return StepResult(total_loss, norm, rate, skipped, stop, data_failed)

    def _reduce(
        self, loss: torch.Tensor, stop: bool, data_failed: bool
    ) -> tuple[float, float, bool, bool]:
        """Loss, joint gradient norm, whether to stop, whether data failed; equal on all ranks."""
        backbone_squared = self._backbone_squared_norm()
        sums = torch.zeros(4, dtype=torch.float64, device=self._device)
        sums[0] = loss
        if self._head is not None:
            sums[1] = self._head.squared_gradient_norm()
        # An assignment would copy from the host.
        sums[2:3].fill_(float(stop))
        sums[3:4].fill_(float(data_failed))
        dist.all_reduce(sums)
        # One wait of the host for the device.
        total_loss, head_squared, stopping, failing, squared = torch.cat(
            [sums, backbone_squared]
        ).tolist()
        return total_loss, math.sqrt(squared + head_squared), stopping > 0, failing > 0

    def _backbone_squared_norm(self) -> torch.Tensor:
        """Squared norm of the backbone's gradient, [1] in fp64, equal on all its replicas.

        Megatron's own, without Apex and Transformer Engine, waits for the device once for every
        parameter.
        """
        squared = torch.zeros(1, dtype=torch.float64, device=self._device)
        for single in single_optimizers(self._backbone):
            gradients = single.get_main_grads_for_grad_norm()
            own = torch.zeros_like(squared)
            if gradients:
                own += torch.stack(torch._foreach_norm(gradients)).double().square().sum()
            dist.all_reduce(own, group=single.get_grad_stats_parallel_group())
            squared += own
        return squared

    def _clip(self, norm: float) -> None:
        limit = self._training.clip_grad_norm
        # torch.nn.utils.clip_grad_norm_ and Megatron both add this to the norm.
        factor = limit / (norm + 1e-6)
        if factor >= 1.0:
            return
        for optimizer in single_optimizers(self._backbone):
            # Megatron's own function makes new tensors without Apex and Transformer Engine.
            gradients = [p.grad for p in optimizer.get_parameters() if p.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, factor)
        if self._head is not None:
            self._head.scale_gradients(factor)
