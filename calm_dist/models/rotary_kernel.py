"""Rotary positions of queries or keys in one launch, forward and backward, instead of a dozen.

Takes the place of Transformer Engine's kernel in Megatron-core (`compat.megatron.use_rotation`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_WARPS = 4


def rotate(states: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of components (i, i + size / 2) by their angles.

    Computed in fp32 and rounded once, where Megatron-core's plain form in bf16 rounds angles'
    sines, products and sum.

    Args:
        states: [steps, B, heads, size].
        angles: fp32 [steps, 1 or B, 1, size], whose second half equals the first.

    Returns:
        [steps, B, heads, size], contiguous.
    """
    assert angles.shape[-1] == states.shape[-1]
    return _Rotation.apply(states, angles)


class _Rotation(torch.autograd.Function):
    """The backward pass rotates the gradient the other way."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(angles)
        return _launch(states, angles, 1.0)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (angles,) = ctx.saved_tensors
        return _launch(gradient, angles, -1.0), None


def _launch(states: torch.Tensor, angles: torch.Tensor, sign: float) -> torch.Tensor:
    if states.stride(-1) != 1:
        states = states.contiguous()
    steps, batch, heads, size = states.shape
    rotated = torch.empty(states.shape, dtype=states.dtype, device=states.device)
    if rotated.numel():
        _rotation_kernel[(steps, batch)](
            states,
            angles,
            rotated,
            *states.stride()[:3],
            angles.stride(0),
            0 if angles.shape[1] == 1 else angles.stride(1),
            heads,
            size // 2,
            SIGN=sign,
            ROWS=triton.next_power_of_2(heads),
            HALF=triton.next_power_of_2(size // 2),
            num_warps=_WARPS,
        )
    return rotated


@triton.jit
def _rotation_kernel(  # type: ignore[no-untyped-def]
    states,  # [steps, B, heads, 2 * half], by strides
    angles,  # [steps, 1 or B, 1, 2 * half], by strides
    rotated,  # [steps, B, heads, 2 * half]
    per_step,
    per_text,
    per_head,
    angles_per_step,
    angles_per_text,
    heads,
    half,
    SIGN: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    step, text = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, HALF)[None, :]
    is_column = columns < half
    is_inside = (rows < heads) & is_column
    angle = angles + step * angles_per_step + text * angles_per_text + columns
    angle = tl.load(angle, mask=is_column, other=0.0).to(tl.float32)
    cosine, sine = tl.cos(angle), SIGN * tl.sin(angle)
    at = states + step * per_step + text * per_text + rows * per_head + columns
    first = tl.load(at, mask=is_inside, other=0.0).to(tl.float32)
    second = tl.load(at + half, mask=is_inside, other=0.0).to(tl.float32)
    element = rotated.dtype.element_ty
    to = rotated + (step * tl.num_programs(1) + text) * heads * 2 * half + rows * 2 * half + columns
    tl.store(to, (first * cosine - second * sine).to(element), mask=is_inside)
    tl.store(to + half, (second * cosine + first * sine).to(element), mask=is_inside)
