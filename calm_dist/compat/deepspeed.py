"""Undocumented parts of DeepSpeed 0.19.8 that this package uses: its import, and ZeRO's
attributes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import torch

from calm_dist.compat.lazy_compile import compiled_when_called


def import_deepspeed() -> Any:
    """Import DeepSpeed without a C++ build at run time, torch's compiler and its banners.

    On CPU it would compile `deepspeed_shm_comm` for over a minute, which only its inference kernels
    use. Its engine imports Muon for every optimizer; Muon's functions are compiled at their first
    call.
    """
    on_cpu = not torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if on_cpu else "cuda")
    # Set before the import, since the module logs while it is loaded.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.ops

    with compiled_when_called():
        import deepspeed.runtime.zero.muon.muon_optimizer

    deepspeed.utils.logger.setLevel(logging.WARNING)
    if on_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def forget_groups() -> None:
    """Clear the last engine's ``mpu``, through which DeepSpeed keeps its process groups."""
    import_deepspeed().utils.groups.mpu = None


def averaged_gradients(zero: Any) -> Iterator[torch.Tensor]:
    """This rank's parts of the averaged gradient, for a ZeRO optimizer of any stage."""
    for gradients in zero.averaged_gradients.values():
        for gradient in gradients or ():
            if gradient is not None:
                yield gradient


def discard_gradients(zero: Any, stage: int) -> None:
    """Discard the gradient of a skipped step, as ZeRO does on an overflow."""
    if stage == 3:
        zero.zero_grad(set_to_none=True)
        zero.averaged_gradients = {}
        return
    zero.micro_step_id = -1
    zero.zero_grad(set_to_none=True)
    zero._release_preflattened_grad_buffers()
    for number in zero.averaged_gradients:
        zero.averaged_gradients[number] = None
        zero.all_grad_tensors[number] = None


def skip_norm(zero: Any) -> None:
    """ZeRO-3: skip the gradient norm in `step`. Nothing reads it without DeepSpeed's clipping, and
    the host waits for the device to get it. Stages 1 and 2 have the option ``compute_grad_norm``.
    """
    zero._get_norm_groups = lambda: [torch.zeros(())]


def partition_parameters(zero: Any) -> None:
    """ZeRO-3: partition the parameters, so that every rank keeps only its part."""
    zero._partition_all_parameters()


def gather_persistent_parameters(zero: Any) -> None:
    """ZeRO-3: gather the small parameters, which are whole on every rank between steps."""
    zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
