"""The energy score as one Triton kernel: draws, distances and gradient of a position in registers.

Written for GPUs; tested in Triton's interpreter (``TRITON_INTERPRET=1``, on CPUs). It has not been
timed on a GPU yet, and so is used only if ``training.energy_kernel`` selects it.

The draws come from Triton's counter-based generator (Philox) with a key for each position, so they
do not depend on how the positions are split.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

# Matrix products need at least this many rows and columns.
_SMALLEST_TILE = 16
_DRAWS_AT_ONCE = 16


def fused_energy_score(
    samples: torch.Tensor,
    mean: torch.Tensor,
    log_std: torch.Tensor,
    keys: torch.Tensor | None = None,
    *,
    num_draws: int = 100,
    noise: torch.Tensor | None = None,
    beta: float = 1.0,
) -> torch.Tensor:
    """`losses.energy.energy_score` without its checks; see there for the other arguments. The
    posterior gets no gradient.

    Args:
        keys: int64 [S], one for the ``num_draws`` draws of each position; equal keys give equal
            draws.
        noise: [M, S, l], the draws, instead of ``keys``.

    Returns:
        Scores [S] in fp32.

    Raises:
        ValueError: both or neither of ``keys`` and ``noise`` are given.
    """
    if (keys is None) == (noise is None):
        raise ValueError("give either keys of the draws or noise")
    return _FusedEnergyScore.apply(samples, mean, log_std, noise, beta, num_draws, keys)


class _FusedEnergyScore(torch.autograd.Function):
    """The gradient is computed in the forward pass, while the draws exist."""

    @staticmethod
    def forward(
        ctx: Any,
        samples: torch.Tensor,
        mean: torch.Tensor,
        log_std: torch.Tensor,
        noise: torch.Tensor | None,
        beta: float,
        num_draws: int,
        keys: torch.Tensor | None,
    ) -> torch.Tensor:
        num_samples, positions, size = samples.shape
        samples, mean, log_std = samples.contiguous(), mean.contiguous(), log_std.contiguous()
        score = torch.empty(positions, dtype=torch.float32, device=samples.device)
        gradient = torch.empty_like(samples) if ctx.needs_input_grad[0] else score
        if positions:
            _energy_kernel[(positions,)](
                samples,
                mean,
                log_std,
                score if noise is None else noise.contiguous(),
                score,
                gradient,
                score if keys is None else keys,
                positions,
                num_samples,
                num_draws if noise is None else noise.shape[0],
                size,
                BETA=beta,
                IS_DRAWN=noise is None,
                NEEDS_GRADIENT=ctx.needs_input_grad[0],
                ROWS=max(_SMALLEST_TILE, triton.next_power_of_2(num_samples)),
                DRAWS=_DRAWS_AT_ONCE,
                COLUMNS=max(_SMALLEST_TILE, triton.next_power_of_2(size)),
            )
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(gradient)
        return score

    @staticmethod
    def backward(ctx: Any, grad_score: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        scaled = gradient * grad_score[:, None].to(gradient.dtype)
        return scaled, None, None, None, None, None, None


@triton.jit
def _power_and_weight(squared, BETA: tl.constexpr):  # type: ignore[no-untyped-def]
    """‖v‖^β and β ‖v‖^(β-2) of squared norms; both zero at zero."""
    is_positive = squared > 0
    positive = tl.where(is_positive, squared, 1.0)
    power = tl.sqrt(positive) if BETA == 1.0 else tl.exp2(tl.log2(positive) * (BETA / 2))
    return tl.where(is_positive, power, 0.0), tl.where(is_positive, BETA * power / positive, 0.0)


@triton.jit
def _energy_kernel(  # type: ignore[no-untyped-def]
    samples,  # [N, S, l]
    mean,  # [S, l]
    log_std,  # [S, l]
    noise,  # [M, S, l] unless IS_DRAWN
    score,  # [S]
    gradient,  # [N, S, l] if NEEDS_GRADIENT
    keys,  # [S] if IS_DRAWN
    positions,
    num_samples,
    num_draws,
    size,
    BETA: tl.constexpr,
    IS_DRAWN: tl.constexpr,
    NEEDS_GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    DRAWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # 64 bits: N·S·l exceeds 2^31 at the sizes of the paper's largest models.
    position = tl.program_id(0).to(tl.int64)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    in_columns = columns < size
    here = position * size + columns
    per_sample = positions.to(tl.int64) * size
    centre = tl.load(mean + here, mask=in_columns, other=0.0).to(tl.float32)
    scale = tl.exp(tl.load(log_std + here, mask=in_columns, other=0.0).to(tl.float32))
    inside = (rows[:, None] < num_samples) & in_columns[None, :]
    places = rows[:, None].to(tl.int64) * per_sample + here[None, :]
    # Centred on the mean, like everything below.
    x = tl.load(samples + places, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(inside, x - centre[None, :], 0.0)

    between = 0.0
    push = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(num_samples):
        one = tl.load(samples + k * per_sample + here, mask=in_columns, other=0.0).to(tl.float32)
        difference = tl.where(inside, x - (one - centre)[None, :], 0.0)
        power, weight = _power_and_weight(tl.sum(difference * difference, axis=1), BETA)
        between += tl.sum(power)
        push += weight[:, None] * difference

    to_draws = 0.0
    pull = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, num_draws, DRAWS):
        draws = start + tl.arange(0, DRAWS)
        if IS_DRAWN:
            # A counter gives four numbers and has only 32 bits, so each position has its own key.
            key = tl.load(keys + position)
            counters = draws[:, None] * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)[None, :]
            a, b, c, d = tl.randn4x(key, counters)
            eps = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (DRAWS, COLUMNS))
        else:
            at = draws[:, None].to(tl.int64) * per_sample + here[None, :]
            known = (draws[:, None] < num_draws) & in_columns[None, :]
            eps = tl.load(noise + at, mask=known, other=0.0).to(tl.float32)
        z = tl.where(in_columns[None, :], eps * scale[None, :], 0.0)
        squared = tl.zeros((ROWS, DRAWS), tl.float32)
        for n in range(num_samples):
            one = tl.load(samples + n * per_sample + here, mask=in_columns, other=0.0)
            away = tl.where(in_columns, one.to(tl.float32) - centre, 0.0)[None, :] - z
            distances = tl.sum(away * away, axis=1)
            squared = tl.where(rows[:, None] == n, distances[None, :], squared)
        squared = tl.where(draws[None, :] < num_draws, squared, 0.0)
        power, weight = _power_and_weight(squared, BETA)
        to_draws += tl.sum(power)
        if NEEDS_GRADIENT:
            pull += x * tl.sum(weight, axis=1)[:, None]
            pull -= tl.dot(weight, z, input_precision="ieee")

    pairs = num_samples * (num_samples - 1)
    tl.store(score + position, between / pairs - 2 * to_draws / (num_samples * num_draws))
    if NEEDS_GRADIENT:
        # The gradient of a pair acts on both samples.
        total = 2 * (push / pairs - pull / (num_samples * num_draws))
        tl.store(gradient + places, total.to(gradient.dtype.element_ty), mask=inside)
