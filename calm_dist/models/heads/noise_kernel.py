"""Uniform noise of a head in one launch, by Triton's counter-based generator (Philox)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_WARPS = 1
# The smallest block of columns; the generator gives four numbers at a time.
_SMALLEST_GROUP = 4
# As of the energy kernel: the fewest that pass all tests of randomness, and a margin.
_ROUNDS = tl.constexpr(7)


def uniform_noise(
    keys: torch.Tensor, num_samples: int, size: int, dtype: torch.dtype
) -> torch.Tensor:
    """Uniform noise in [-0.5, 0.5).

    Args:
        keys: int64 [S], one of each position; equal keys give equal noise.

    Returns:
        [num_samples, S, size], rounded to ``dtype``; in bf16 the largest numbers become 0.5.
    """
    noise = torch.empty(num_samples, len(keys), size, dtype=dtype, device=keys.device)
    if len(keys):
        _uniform_kernel[(len(keys),)](
            noise,
            keys,
            num_samples,
            size,
            ROWS=triton.next_power_of_2(num_samples),
            GROUP=max(_SMALLEST_GROUP, triton.next_power_of_2(size) // 4),
            num_warps=_WARPS,
        )
    return noise


@triton.jit
def _uniform_kernel(  # type: ignore[no-untyped-def]
    noise,  # [N, S, size]
    keys,  # [S]
    num_samples,
    size,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    per_sample = tl.num_programs(0).to(tl.int64) * size
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, GROUP)[None, :]
    key = tl.load(keys + position)
    a, b, c, d = tl.randint4x(key, rows * GROUP + columns, n_rounds=_ROUNDS)
    at = noise + rows.to(tl.int64) * per_sample + position * size + columns
    is_row = rows < num_samples
    _store(at, a, is_row & (columns < size))
    _store(at + GROUP, b, is_row & (columns + GROUP < size))
    _store(at + 2 * GROUP, c, is_row & (columns + 2 * GROUP < size))
    _store(at + 3 * GROUP, d, is_row & (columns + 3 * GROUP < size))


@triton.jit
def _store(at, bits, mask):  # type: ignore[no-untyped-def]
    """Store the upper 24 bits as a fraction: all that fp32 holds exactly."""
    # The generator's numbers are unsigned.
    uniform = (bits.to(tl.int32, bitcast=True) >> 8).to(tl.float32) * 5.960464477539063e-08
    tl.store(at, uniform.to(at.dtype.element_ty), mask=mask)
