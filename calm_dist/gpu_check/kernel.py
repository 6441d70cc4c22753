"""The energy kernel on a GPU: against the formula, and its time against its instructions."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import torch

from calm_dist.benchmark.timing import median_seconds
from calm_dist.costs.clusters import Rates
from calm_dist.gpu_check.facts import max_clock
from calm_dist.gpu_check.parts import ENERGY_INSTRUCTIONS
from calm_dist.gpu_check.worker import Check, NotRunError
from calm_dist.losses.energy import energy_score, energy_score_reference

# Of the largest number of a tensor; the draws' products are of three tf32 parts.
TOLERANCE = 1e-5
# Of a multiprocessor; each issues one instruction a clock at most.
SCHEDULERS = 4
CASES = [  # N, M, positions, l
    (8, 100, 1, 128), (8, 100, 2, 128), (8, 100, 67, 128), (2, 1, 1, 7), (17, 33, 5, 40),
    (64, 20, 3, 256),
]  # fmt: skip
TIMED = (8, 65_536, 128, 100)
REPEATS = 10


def measure(check: Check) -> None:
    """Compare with the formula, with whole shards of positions cut in two, then time."""
    if importlib.util.find_spec("triton") is None:
        raise NotRunError("triton is not installed; it comes with torch's CUDA builds")
    for case in CASES[:5] if check.small else CASES:
        for beta in (1.0,) if check.small else (0.5, 1.0, 1.5):
            difference = formula_difference(*case, beta, check.device)
            check.row("formula", case=list(case), beta=beta, largest_difference=difference)
    worst = max(row["largest_difference"] for row in check.values["formula"])
    check.add(tolerance=TOLERANCE, is_right=worst <= TOLERANCE)
    _check_cut(check)
    _check_draws(check)
    _time(check)


def inputs(
    samples: int, positions: int, size: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Head samples [N, S, l], and the posterior's mean and log_std [S, l]."""
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=device)
    x = normal(samples, positions, size, dtype=dtype)
    return x, normal(positions, size), normal(positions, size).mul_(0.3).sub_(1)


def formula_difference(
    samples: int, draws: int, positions: int, size: int, beta: float, device: torch.device
) -> float:
    """Largest difference to the formula in scores and gradients, relative to the largest value."""
    from calm_dist.losses.energy_kernel import fused_energy_score

    x, mean, log_std = inputs(samples, positions, size, device, torch.float32)
    noise = torch.randn(draws, positions, size, device=device)
    found = []
    for score_of in (fused_energy_score, energy_score_reference):
        leaf = x.clone().requires_grad_()
        score = score_of(leaf, mean, log_std, noise=noise, beta=beta)
        found.append([score.detach(), *torch.autograd.grad(score.sum(), leaf)])
    return max(
        float((ours - expected).abs().max() / expected.abs().max())
        for ours, expected in zip(*found, strict=True)
    )


def _check_cut(check: Check) -> None:
    """A tensor of more than 2^31 elements: its last positions alone have the same scores."""
    from calm_dist.losses.energy_kernel import fused_energy_score

    samples, _, size, draws = TIMED
    positions = 12 if check.small else 2**31 // (samples * size) + 3
    if check.device.type == "cuda" and torch.cuda.mem_get_info(check.device)[0] < 2e10:
        check.add(cut={"why_not": "less than 20 GB are free"})
        return
    draws = 4 if check.small else draws
    x, mean, log_std = inputs(samples, positions, size, check.device, torch.bfloat16)
    keys = torch.arange(positions, device=check.device)
    whole = fused_energy_score(x, mean, log_std, keys, num_draws=draws)
    last = slice(positions - 5, positions)
    part = fused_energy_score(x[:, last], mean[last], log_std[last], keys[last], num_draws=draws)
    equal = bool((whole[last] == part).all())
    check.add(cut={"positions": positions, "elements": x.numel(), "equal": equal})


def _check_draws(check: Check) -> None:
    """The mean score over positions against that of torch's draws, in standard errors."""
    from calm_dist.losses.energy_kernel import fused_energy_score

    positions = 24 if check.small else 20_000
    x, mean, log_std = inputs(4, positions, 32, check.device, torch.float32)
    ours = fused_energy_score(x, mean, log_std, torch.arange(positions, device=check.device),
                              num_draws=20)  # fmt: skip
    theirs = energy_score(x, mean, log_std, num_draws=20, seed=1)
    difference = ours - theirs
    error = difference.std() / positions**0.5
    check.add(draws={"positions": positions, "standard_errors": float(difference.mean() / error)})


def _time(check: Check) -> None:
    samples, positions, size, draws = TIMED
    device = check.device
    if check.small:
        positions, draws = 8, 8
    x, mean, log_std = inputs(samples, positions, size, device, torch.bfloat16)
    keys = torch.arange(positions, device=device)
    leaf = x.requires_grad_()
    from calm_dist.losses.energy_kernel import fused_energy_score

    repeats = 1 if check.small else REPEATS
    kernel = median_seconds(
        lambda: fused_energy_score(leaf, mean, log_std, keys, num_draws=draws), repeats, device
    )
    times: dict[str, Any] = {"positions": positions, "kernel": kernel}
    times["predicted"] = predicted_seconds(positions, device)
    check.add(times=times)
    # Its gradient is made in the forward pass, too; chunk by chunk, so that an eighth will do.
    part = slice(0, positions // 8)
    some = leaf[:, part].detach().requires_grad_()
    times["torch"] = 8 * median_seconds(
        lambda: energy_score(some, mean[part], log_std[part], num_draws=draws, seed=0), 1, device
    )
    check.add(times=times)


def predicted_seconds(positions: int, device: torch.device) -> float | None:
    """Time of that many positions by the kernel's instructions, None where that is unknown."""
    clock = max_clock(device)
    if device.type != "cuda" or clock is None:
        return None
    properties = torch.cuda.get_device_properties(device)
    if properties.major not in ENERGY_INSTRUCTIONS:
        return None
    rate = properties.multi_processor_count * SCHEDULERS * Rates().issue_fraction * clock
    return positions * ENERGY_INSTRUCTIONS[properties.major] / rate
