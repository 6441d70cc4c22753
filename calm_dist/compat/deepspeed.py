"""What is used of DeepSpeed 0.19.8 that it does not document: its import, and ZeRO's attributes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import torch


def import_deepspeed() -> Any:
    """DeepSpeed without a C++ build at run time and without its banners.

    On CPU it would compile `deepspeed_shm_comm` for over a minute; only its inference kernels use
    that.
    """
    on_cpu = not torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if on_cpu else "cuda")
    # Set before the import: the module logs while it is loaded.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.ops

    deepspeed.utils.logger.setLevel(logging.WARNING)
    if on_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def forget_groups() -> None:
    """DeepSpeed remembers the last engine's ``mpu``, and so its process groups."""
    import_deepspeed().utils.groups.mpu = None


def averaged_gradients(zero: Any) -> Iterator[torch.Tensor]:
    """This rank's parts of the averaged gradient, of a ZeRO optimizer of any stage."""
    for gradients in zero.averaged_gradients.values():
        for gradient in gradients or ():
            if gradient is not None:
                yield gradient


def discard_gradients(zero: Any, stage: int) -> None:
    """Forget the gradient of a step that is not taken, as ZeRO does on an overflow."""
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


def partition_parameters(zero: Any) -> None:
    """ZeRO-3: every rank keeps its part of the parameters alone."""
    zero._partition_all_parameters()


def gather_persistent_parameters(zero: Any) -> None:
    """ZeRO-3: the small parameters are whole on every rank again, as they are between steps."""
    zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
