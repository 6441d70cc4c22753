"""The kernels of torch's scaled-dot-product attention, and flash-attn, at the recipes' sizes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from calm_dist.benchmark.timing import median_seconds
from calm_dist.gpu_check.worker import Check, why_not
from calm_dist.models.attention_kernel import installed_flash_attention

# Heads, and their dimension: CALM-M; CALM-XL; a head that cuDNN's attention refuses.
HEADS = [(16, 64), (20, 128), (16, 160)]
KERNELS: dict[str, SDPBackend | None] = {
    "chosen by torch": None,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "FlashAttention": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
REPEATS = 10


def measure(check: Check) -> None:
    """Time each kernel, forward and backward, causal, in bf16."""
    batch, steps = (1, 64) if check.small else (8, 2048)
    for heads, size in HEADS:
        shape = (steps, batch, heads, size)
        query, key, value = (
            # As Megatron-core makes them, [steps, B, heads, size].
            torch.randn(shape, device=check.device, dtype=torch.bfloat16).requires_grad_()
            for _ in range(3)
        )
        # Two products of [steps, steps, size] for each head, five backward, half of them masked.
        work = 7 * steps**2 * size * heads * batch
        for name, backend in KERNELS.items():
            _row(check, name, size, work, _sdpa(query, key, value, backend))
        if installed_flash_attention().version is None or check.device.type == "cpu":
            check.row("kernels", name="flash-attn", head_dim=size, why_not="not installed")
        else:
            _row(check, "flash-attn", size, work, _flash(query, key, value))


def _sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, backend: SDPBackend | None
) -> Callable[[], None]:
    def both() -> None:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        with nullcontext() if backend is None else sdpa_kernel(backend):
            output = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(output, (query, key, value), output.detach())

    return both


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Callable[[], None]:
    from flash_attn import flash_attn_func

    def both() -> None:
        output = flash_attn_func(*(x.transpose(0, 1) for x in (query, key, value)), causal=True)
        torch.autograd.grad(output, (query, key, value), output.detach())

    return both


def _row(check: Check, name: str, size: int, work: float, both: Callable[[], None]) -> None:
    values: dict[str, Any] = {"name": name, "head_dim": size}
    try:
        seconds = median_seconds(both, 1 if check.small else REPEATS, check.device)
        values |= {"seconds": seconds, "tflops": work / seconds / 1e12}
        if name == "chosen by torch" and check.device.type == "cuda":
            values["kernel"] = _longest_kernel(both)
    except (RuntimeError, ImportError) as error:
        values["why_not"] = why_not(error)
    check.row("kernels", **values)


def _longest_kernel(call: Callable[[], None]) -> str | None:
    """Name of the kernel that takes most of the time."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    rows = list(profiler.key_averages())
    return max(rows, key=lambda row: row.device_time_total).key if rows else None
