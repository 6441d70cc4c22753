"""The energy score as one Triton kernel: draws, distances and gradient of a position in registers.

Correct in Triton's interpreter (``TRITON_INTERPRET=1``, on CPUs) and compiled ahead of time for
NVIDIA's 8.0, 9.0 and 10.0 (tests/gpu); not timed on a GPU yet.

The draws come from Triton's counter-based generator (Philox) with a key for each position, so they
do not depend on how the positions are split.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

# Matrix products of tensor cores have at least so many columns, and sum over so many elements.
_SMALLEST_ROWS, _SMALLEST_GROUP = 8, 16
_DRAWS_AT_ONCE = 16
# Three products of tf32 parts: the digits of fp32 at the speed of tensor cores.
_PRECISION = "tf32x3"
_WARPS = 2
# Of Philox: the fewest that pass all tests of randomness (Salmon et al. 2011, table 2); 10 are the
# usual margin of safety.
_ROUNDS = tl.constexpr(7)
# Squared distances below this fraction of ‖x‖² + ‖z‖² are rounding errors: x and z coincide.
_COINCIDING = tl.constexpr(1e-6)


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


def constants(num_samples: int, size: int) -> dict[str, Any]:
    """What the kernel is compiled with for N samples of l components."""
    return {
        "ROWS": max(_SMALLEST_ROWS, triton.next_power_of_2(num_samples)),
        "DRAWS": _DRAWS_AT_ONCE,
        "GROUP": max(_SMALLEST_GROUP, triton.next_power_of_2(size) // 4),
        "PRECISION": _PRECISION,
        "num_warps": _WARPS,
    }


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
                num_samples,
                num_draws if noise is None else noise.shape[0],
                size,
                BETA=beta,
                IS_DRAWN=noise is None,
                NEEDS_GRADIENT=ctx.needs_input_grad[0],
                **constants(num_samples, size),
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
    # NaN counts as positive, so that the loss shows it.
    is_positive = ~(squared <= 0)
    positive = tl.where(is_positive, squared, 1.0)
    if BETA == 1.0:
        weight = tl.rsqrt(positive)
        power = positive * weight
    else:
        power = tl.exp2(tl.log2(positive) * (BETA / 2))
        weight = BETA * power / positive
    return tl.where(is_positive, power, 0.0), tl.where(is_positive, weight, 0.0)


@triton.jit
def _load(pointer, places, mask, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The four groups of columns of one tensor in fp32, zero outside."""
    return (
        tl.load(pointer + places, mask=mask[0], other=0.0).to(tl.float32),
        tl.load(pointer + places + GROUP, mask=mask[1], other=0.0).to(tl.float32),
        tl.load(pointer + places + 2 * GROUP, mask=mask[2], other=0.0).to(tl.float32),
        tl.load(pointer + places + 3 * GROUP, mask=mask[3], other=0.0).to(tl.float32),
    )


@triton.jit
def _minus(a, b, mask):  # type: ignore[no-untyped-def]
    """Differences of the groups, zero outside."""
    return (
        tl.where(mask[0], a[0] - b[0], 0.0),
        tl.where(mask[1], a[1] - b[1], 0.0),
        tl.where(mask[2], a[2] - b[2], 0.0),
        tl.where(mask[3], a[3] - b[3], 0.0),
    )


@triton.jit
def _squared_norms(a):  # type: ignore[no-untyped-def]
    """‖row‖² over the groups."""
    return tl.sum(a[0] * a[0] + a[1] * a[1] + a[2] * a[2] + a[3] * a[3], axis=1)


@triton.jit
def _normal_pair(of_radius, of_angle):  # type: ignore[no-untyped-def]
    """Two independent standard normal numbers of 32 random bits each, by Box and Muller.

    The angle is a number of turns: a polynomial on a quarter turn to both sides (error 2e-7) needs
    no reduction of large arguments, on which sin and cos spend most of their instructions.
    """
    # The generator's numbers are unsigned: angles beyond three quarters of a turn would leave the
    # range of the polynomials.
    of_angle = of_angle.to(tl.int32, bitcast=True)
    # In (0, 1], without the sign bit.
    uniform = ((of_radius & 0x7FFFFFFF).to(tl.float32) + 0.5) * 4.656612873077393e-10
    radius = tl.sqrt(tl.maximum(-1.3862943611198906 * tl.log2(uniform), 0.0))
    # In [-1/2, 1/2) turns, then in [-1/4, 1/4]: half a turn changes both signs.
    turns = of_angle.to(tl.float32) * 2.3283064365386963e-10
    is_far = tl.abs(turns) > 0.25
    turns = tl.where(is_far, turns - tl.where(turns > 0, 0.5, -0.5), turns)
    radius = tl.where(is_far, -radius, radius)
    square = turns * turns
    sine = 39.80992473201534 * square - 76.58786991031394
    sine = (sine * square + 81.60276680207635) * square - 41.34168500868819
    sine = (sine * square + 6.283185295010626) * turns
    cosine = -25.00678499796259 * square + 60.148065447382706
    cosine = (cosine * square - 85.45381063870806) * square + 64.93935261648542
    cosine = (cosine * square - 19.739208606238346) * square + 0.9999999999053991
    return radius * cosine, radius * sine


@triton.jit
def _masks(columns, size, rows, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Masks of the four groups of columns, combined with that of the rows."""
    return (
        rows & (columns < size)[None, :],
        rows & (columns + GROUP < size)[None, :],
        rows & (columns + 2 * GROUP < size)[None, :],
        rows & (columns + 3 * GROUP < size)[None, :],
    )


@triton.jit
def _scale(log_scale, mask):  # type: ignore[no-untyped-def]
    """Standard deviations, zero outside."""
    return (
        tl.where(mask[0], tl.exp(log_scale[0]), 0.0),
        tl.where(mask[1], tl.exp(log_scale[1]), 0.0),
        tl.where(mask[2], tl.exp(log_scale[2]), 0.0),
        tl.where(mask[3], tl.exp(log_scale[3]), 0.0),
    )


@triton.jit
def _add_weighted(total, weight, a):  # type: ignore[no-untyped-def]
    """The groups of ``total + weight * a``."""
    return (
        total[0] + weight * a[0],
        total[1] + weight * a[1],
        total[2] + weight * a[2],
        total[3] + weight * a[3],
    )


@triton.jit
def _between_samples(  # type: ignore[no-untyped-def]
    samples, here, per_sample, num_samples, x, centre, inside, known, BETA: tl.constexpr,
    ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Sum of the powers of all distances between samples, and what each sample is pushed by.

    By differences: the samples of a new head nearly coincide.
    """
    between = 0.0
    zeros = tl.zeros((ROWS, GROUP), tl.float32)
    push = (zeros, zeros, zeros, zeros)
    for k in range(num_samples):
        one = _minus(_load(samples, k * per_sample + here, inside, GROUP), centre, inside)
        away = _minus(x, one, known)
        power, weight = _power_and_weight(_squared_norms(away), BETA)
        between += tl.sum(power)
        push = _add_weighted(push, weight[:, None], away)
    return between, push


@triton.jit
def _drawn(key, draws, columns, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The groups of a tile of draws; the counter has 32 bits, so a position has a key of its
    own."""
    counters = draws[:, None] * GROUP + columns[None, :]
    a, b, c, d = tl.randint4x(key, counters, n_rounds=_ROUNDS)
    first, second = _normal_pair(a, b), _normal_pair(c, d)
    return first[0], first[1], second[0], second[1]


@triton.jit
def _products(z, x, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """z·x for each draw and sample. Draws are the rows: tensor cores take 16 of them, but 8
    columns."""
    product = tl.dot(z[0], tl.trans(x[0]), input_precision=PRECISION)
    product = tl.dot(z[1], tl.trans(x[1]), product, input_precision=PRECISION)
    product = tl.dot(z[2], tl.trans(x[2]), product, input_precision=PRECISION)
    return tl.dot(z[3], tl.trans(x[3]), product, input_precision=PRECISION)


@triton.jit
def _add_pull(pull, z, weight, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """The groups of ``pull + zᵀ weight``."""
    return (
        tl.dot(tl.trans(z[0]), weight, pull[0], input_precision=PRECISION),
        tl.dot(tl.trans(z[1]), weight, pull[1], input_precision=PRECISION),
        tl.dot(tl.trans(z[2]), weight, pull[2], input_precision=PRECISION),
        tl.dot(tl.trans(z[3]), weight, pull[3], input_precision=PRECISION),
    )


@triton.jit
def _store_gradient(  # type: ignore[no-untyped-def]
    at, mask, of_pair, push, of_draw, weights, x, pull, GROUP: tl.constexpr
):
    """Store each group of ``of_pair * push - of_draw * (weights * x - pullᵀ)``."""
    element = at.dtype.element_ty
    total = of_pair * push[0] - of_draw * (weights * x[0] - tl.trans(pull[0]))
    tl.store(at, total.to(element), mask=mask[0])
    total = of_pair * push[1] - of_draw * (weights * x[1] - tl.trans(pull[1]))
    tl.store(at + GROUP, total.to(element), mask=mask[1])
    total = of_pair * push[2] - of_draw * (weights * x[2] - tl.trans(pull[2]))
    tl.store(at + 2 * GROUP, total.to(element), mask=mask[2])
    total = of_pair * push[3] - of_draw * (weights * x[3] - tl.trans(pull[3]))
    tl.store(at + 3 * GROUP, total.to(element), mask=mask[3])


@triton.jit
def _energy_kernel(  # type: ignore[no-untyped-def]
    samples,  # [N, S, l]
    mean,  # [S, l]
    log_std,  # [S, l]
    noise,  # [M, S, l] unless IS_DRAWN
    score,  # [S]
    gradient,  # [N, S, l] if NEEDS_GRADIENT
    keys,  # [S] if IS_DRAWN
    num_samples,
    num_draws,
    size,
    BETA: tl.constexpr,
    IS_DRAWN: tl.constexpr,
    NEEDS_GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    DRAWS: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The columns are four groups, since the generator gives four numbers at a time: each stays in
    # the thread that drew it. 64 bits, since N·S·l passes 2^31 at the sizes of the paper's models.
    position = tl.program_id(0).to(tl.int64)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, GROUP)
    inside = _masks(columns, size, True, GROUP)
    known = _masks(columns, size, (rows < num_samples)[:, None], GROUP)
    here = (position * size + columns)[None, :]
    per_sample = tl.num_programs(0).to(tl.int64) * size
    centre = _load(mean, here, inside, GROUP)
    scale = _scale(_load(log_std, here, inside, GROUP), inside)
    # Centred on the mean, as all that follows: products of small numbers lose few digits.
    places = rows[:, None].to(tl.int64) * per_sample + here
    x = _minus(_load(samples, places, known, GROUP), centre, known)
    between, push = _between_samples(
        samples, here, per_sample, num_samples, x, centre, inside, known, BETA, ROWS, GROUP
    )

    to_draws = 0.0
    norms = _squared_norms(x)
    weights = tl.zeros((ROWS,), tl.float32)
    none = tl.zeros((GROUP, ROWS), tl.float32)
    pull = (none, none, none, none)
    for start in range(0, num_draws, DRAWS):
        draws = start + tl.arange(0, DRAWS)
        is_draw = (draws < num_draws)[:, None]
        if IS_DRAWN:
            eps = _drawn(tl.load(keys + position), draws, columns, GROUP)
        else:
            at = draws[:, None].to(tl.int64) * per_sample + here
            eps = _load(noise, at, _masks(columns, size, is_draw, GROUP), GROUP)
        z = (eps[0] * scale[0], eps[1] * scale[1], eps[2] * scale[2], eps[3] * scale[3])
        sizes = _squared_norms(z)[:, None] + norms[None, :]
        squared = sizes - 2 * _products(z, x, PRECISION)
        is_pair = is_draw & (rows < num_samples)[None, :]
        squared = tl.where(is_pair & ~(squared < sizes * _COINCIDING), squared, 0.0)
        power, weight = _power_and_weight(squared, BETA)
        to_draws += tl.sum(power)
        if NEEDS_GRADIENT:
            weights += tl.sum(weight, axis=0)
            pull = _add_pull(pull, z, weight, PRECISION)

    pairs = num_samples * (num_samples - 1)
    all_draws = num_samples * num_draws
    tl.store(score + position, between / pairs - 2 * to_draws / all_draws)
    if NEEDS_GRADIENT:
        # A pair of samples pulls at both of its ends.
        _store_gradient(
            gradient + places, known, 2.0 / pairs, push, 2.0 / all_draws, weights[:, None], x,
            pull, GROUP,
        )  # fmt: skip
