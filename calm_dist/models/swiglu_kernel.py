"""SwiGLU in one launch forward and one backward, instead of ten, and without its intermediate
results in memory.

Takes the place of Megatron-core's form that torch.compile fuses (`compat.megatron.use_swiglu`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_COLUMNS_AT_ONCE, _WARPS = 1024, 4


def swiglu(both: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up.

    Computed in fp32 and rounded once, where torch's operations in bf16 round silu(gate) as well.
    For the backward pass only ``both`` is kept.

    Args:
        both: [..., 2 * size], gate and up.

    Returns:
        [..., size].
    """
    return _SwiGLU.apply(both.contiguous())


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(both)
        size = both.shape[-1] // 2
        result = both.new_empty(*both.shape[:-1], size)
        if result.numel():
            _forward_kernel[_grid(result)](
                both, result, size, COLUMNS=_COLUMNS_AT_ONCE, num_warps=_WARPS
            )
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (both,) = ctx.saved_tensors
        gradient = gradient.contiguous()
        result = torch.empty_like(both)
        if gradient.numel():
            _backward_kernel[_grid(gradient)](
                both, gradient, result, gradient.shape[-1], COLUMNS=_COLUMNS_AT_ONCE,
                num_warps=_WARPS,
            )  # fmt: skip
        return result


def _grid(tensor: torch.Tensor) -> tuple[int, int]:
    """One program per row and block of columns."""
    size = tensor.shape[-1]
    return tensor.numel() // size, triton.cdiv(size, _COLUMNS_AT_ONCE)


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    both,  # [rows, 2 * size]
    result,  # [rows, size]
    size,
    COLUMNS: tl.constexpr,
):
    # 64 bits: rows times 2 * size may pass 2^31.
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_inside = columns < size
    at = both + row * 2 * size + columns
    gate = tl.load(at, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(at + size, mask=is_inside, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(result + row * size + columns, value.to(result.dtype.element_ty), mask=is_inside)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    both,  # [rows, 2 * size]
    gradient,  # [rows, size], of the result
    result,  # [rows, 2 * size]
    size,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_inside = columns < size
    place = row * 2 * size + columns
    gate = tl.load(both + place, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(both + place + size, mask=is_inside, other=0.0).to(tl.float32)
    upstream = tl.load(gradient + row * size + columns, mask=is_inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    of_gate = upstream * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    of_up = upstream * gate * sigmoid
    element = result.dtype.element_ty
    tl.store(result + place, of_gate.to(element), mask=is_inside)
    tl.store(result + place + size, of_up.to(element), mask=is_inside)
