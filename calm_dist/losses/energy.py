"""The energy score of head samples against a Gaussian posterior.

For N samples x_n and M draws z_m of N(mean, exp(log_std)^2), per position (equation 6 of the paper)

    score = 1/(N(N-1)) Σ_{n≠k} ‖x_n - x_k‖^β - 2/(NM) Σ_{n,m} ‖z_m - x_n‖^β

which is higher for a better head; the loss is its negative mean. `energy_score_reference` is the
formula as written. `energy_score` computes the same numbers with matrix products over chunks of
positions and never allocates a tensor of N·M·positions·l elements. On GPUs distances come from
differences, in one kernel of torch: what the products would need beside them costs more launches,
and a wait of the host.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from calm_dist.costs.chunks import SCORE_POSITIONS
from calm_dist.randomness import key_seed

# A squared distance below this fraction of ‖x‖² + ‖z‖² has lost too many digits to cancellation in
# the matrix product, and is computed again from the difference.
CANCELLATION = 1e-3


NoiseChunks = Iterable[tuple[int, int, Callable[[], torch.Tensor]]]
"""(start, stop, function that draws standard normal noise [M, stop - start, l]); the chunks cover
all positions, and can be drawn in any order."""


def energy_score(
    samples: torch.Tensor,
    mean: torch.Tensor,
    log_std: torch.Tensor,
    noise: torch.Tensor | None = None,
    beta: float = 1.0,
    *,
    num_draws: int = 100,
    seed: int | None = None,
) -> torch.Tensor:
    """Energy score per position, higher is better.

    Args:
        samples: head samples [N, S, l], N >= 2.
        mean, log_std: posterior [S, l].
        noise: standard normal noise of the posterior draws [M, S, l]; None: it is drawn here, chunk
            by chunk, from ``seed`` (or torch's global generator).
        beta: exponent of the distance, 0 < beta < 2.
        num_draws: M if ``noise`` is None.
        seed: seed of the draws if ``noise`` is None.

    Returns:
        Scores [S] in fp32.

    Raises:
        ValueError: fewer than two samples, no draw, a beta outside (0, 2), or shapes that do not
            fit.
    """
    _check(samples, mean, log_std, noise, beta)
    if (num_draws if noise is None else noise.shape[0]) < 1:
        raise ValueError(
            "no draws of the posterior: num_draws, or the noise's M, must be at least 1"
        )
    if mean.requires_grad or log_std.requires_grad:
        # The chunked form has gradients only with respect to the samples.
        if noise is None:
            drawn = _DrawnNoise(mean, num_draws, seed)
            noise = torch.cat([draw() for _, _, draw in drawn], dim=1)
        return energy_score_reference(samples, mean, log_std, noise, beta)
    chunks: NoiseChunks = (
        _GivenNoise(noise) if noise is not None else _DrawnNoise(mean, num_draws, seed)
    )
    return energy_score_chunked(samples, mean, log_std, chunks, beta)


def energy_score_chunked(
    samples: torch.Tensor,
    mean: torch.Tensor,
    log_std: torch.Tensor,
    noise: NoiseChunks,
    beta: float,
) -> torch.Tensor:
    """`energy_score` with the noise of the draws given in chunks; [N, S, l] -> [S]."""
    return _ChunkedEnergyScore.apply(samples, mean, log_std, noise, beta)


def energy_score_reference(
    samples: torch.Tensor,
    mean: torch.Tensor,
    log_std: torch.Tensor,
    noise: torch.Tensor,
    beta: float = 1.0,
) -> torch.Tensor:
    """The formula as written, with every tensor materialised; the reference for tests."""
    num_samples = samples.shape[0]
    samples = samples.float()
    draws = mean.float() + noise.float() * log_std.float().exp()
    to_draws = _power(samples[:, None] - draws[None], beta).mean(dim=(0, 1))
    first, second = torch.triu_indices(num_samples, num_samples, 1, device=samples.device)
    pairs = num_samples * (num_samples - 1) / 2
    between = _power(samples[first] - samples[second], beta).sum(dim=0) / pairs
    return between - 2 * to_draws


def _power(difference: torch.Tensor, beta: float) -> torch.Tensor:
    """‖difference‖^β over the last dimension, with gradient zero (not NaN) at zero."""
    squared = difference.square().sum(-1)
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).pow(beta / 2), 0.0)


class _GivenNoise:
    """A noise tensor [M, S, l] cut into chunks."""

    def __init__(self, noise: torch.Tensor) -> None:
        self.noise = noise

    def __iter__(self) -> Iterator[tuple[int, int, Callable[[], torch.Tensor]]]:
        for start, stop in _chunks(self.noise.shape[1]):
            yield start, stop, partial(self.noise.__getitem__, (slice(None), slice(start, stop)))


class _DrawnNoise:
    """Noise drawn chunk by chunk, each from its own generator; if ``seed`` is None, it is drawn
    from torch's global generator."""

    def __init__(self, like: torch.Tensor, num_draws: int, seed: int | None) -> None:
        self.like, self.num_draws = like, num_draws
        self.seed = int(torch.randint(2**62, ())) if seed is None else seed

    def __iter__(self) -> Iterator[tuple[int, int, Callable[[], torch.Tensor]]]:
        for start, stop in _chunks(len(self.like)):
            yield start, stop, partial(self._draw, start, stop)

    def _draw(self, start: int, stop: int) -> torch.Tensor:
        generator = torch.Generator(self.like.device).manual_seed(key_seed(self.seed, start))
        shape = (stop - start, self.num_draws, self.like.shape[1])
        drawn = torch.randn(shape, generator=generator, device=self.like.device)
        return drawn.transpose(0, 1)


def _chunks(positions: int) -> Iterator[tuple[int, int]]:
    for start in range(0, positions, SCORE_POSITIONS):
        yield start, min(start + SCORE_POSITIONS, positions)


def _for_each(
    work: Callable[[int, int, torch.Tensor], None], noise: NoiseChunks, device: torch.device
) -> None:
    """Call ``work`` on every chunk. On CPUs, as many chunks run at once as torch has threads, one
    thread each: neither drawing numbers nor work on pieces that fit a cache is faster on several
    threads."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads == 1:
        for start, stop, draw in noise:
            work(start, stop, draw())
        return

    inference = torch.is_inference_mode_enabled()

    def draw_and_work(start: int, stop: int, draw: Callable[[], torch.Tensor]) -> None:
        # Modes are per thread.
        with torch.inference_mode(inference), torch.no_grad():
            work(start, stop, draw())

    try:
        with ThreadPoolExecutor(threads, "energy", torch.set_num_threads, (1,)) as pool:
            for done in [pool.submit(draw_and_work, *chunk) for chunk in noise]:
                done.result()
    finally:
        # The number of threads that torch uses is set per thread, and new threads get the number
        # that was set last.
        torch.set_num_threads(threads)


class _ChunkedEnergyScore(torch.autograd.Function):
    """The score of each position depends only on its own samples, so the gradient is computed in
    the forward pass, while the chunk's draws exist, and only scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        samples: torch.Tensor,
        mean: torch.Tensor,
        log_std: torch.Tensor,
        noise: NoiseChunks,
        beta: float,
    ) -> torch.Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        score = torch.empty(samples.shape[1], dtype=torch.float32, device=samples.device)
        gradient = torch.empty_like(samples) if needs_gradient else None
        memory = threading.local()

        def work(start: int, stop: int, draw: torch.Tensor) -> None:
            # Centred on the mean: smaller numbers lose fewer digits in the products below.
            centre = mean[start:stop].float()
            x = samples[:, start:stop].float() - centre  # [N, s, l]
            x = x.transpose(0, 1).contiguous()
            scale = log_std[start:stop, None].float().exp()
            # Reuse one buffer for all chunks: on CPUs, allocating new memory costs more than the
            # computation in it.
            shape = (stop - start, draw.shape[0], draw.shape[2])
            if (draws := getattr(memory, "draws", None)) is None or draws.shape != shape:
                draws = memory.draws = scale.new_empty(shape)
            z = torch.mul(draw.transpose(0, 1), scale, out=draws)  # [s, M, l]
            to_draws, pull = _mean_power(x, z, beta, needs_gradient)
            between, push = _mean_power(x, x, beta, needs_gradient, exclude_diagonal=True)
            score[start:stop] = between - 2 * to_draws
            if gradient is not None:
                assert pull is not None and push is not None
                # The gradient of a pair (n, k) acts on both samples.
                total = 2 * (push - pull)
                gradient[:, start:stop] = total.transpose(0, 1).to(gradient.dtype)

        # fp32 even under autocast: distances are differences of large numbers.
        with torch.autocast(samples.device.type, enabled=False):
            _for_each(work, noise, samples.device)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return score

    @staticmethod
    def backward(ctx: Any, grad_score: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_score[:, None].to(gradient.dtype), None, None, None, None


def _mean_power(
    x: torch.Tensor,
    z: torch.Tensor,
    beta: float,
    needs_gradient: bool,
    exclude_diagonal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mean ‖x_n - z_m‖^β over n and m, and its gradient with respect to x with z held fixed.

    x [s, N, l], z [s, M, l] -> [s], [s, N, l]. ``exclude_diagonal`` leaves out n = m (z is x).
    """
    pairs = x.shape[1] * z.shape[1] - (x.shape[1] if exclude_diagonal else 0)
    squared = _squared_distances_on(x.device)(x, z, exclude_diagonal)  # [s, N, M]
    power = squared.pow(beta / 2)
    value = power.sum(dim=(1, 2)) / pairs
    if not needs_gradient:
        return value, None
    # d‖v‖^β / dv = β ‖v‖^(β-2) v; zero at v = 0, where it is undefined for β <= 1.
    weight = power.mul_(beta / pairs).div_(squared).nan_to_num_(nan=0.0)
    return value, torch.baddbmm(x * weight.sum(-1, keepdim=True), weight, z, alpha=-1)


def _squared_distances_on(
    device: torch.device,
) -> Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor]:
    return _squared_by_differences if device.type == "cuda" else _squared_by_products


def _squared_by_differences(
    x: torch.Tensor, z: torch.Tensor, exclude_diagonal: bool
) -> torch.Tensor:
    """‖x_n - z_m‖², [s, N, M]; nothing depends on the numbers, which the host would wait for. The
    diagonal of x with itself is zero as it is."""
    return torch.cdist(x, z, compute_mode="donot_use_mm_for_euclid_dist").square_()


def _squared_by_products(x: torch.Tensor, z: torch.Tensor, exclude_diagonal: bool) -> torch.Tensor:
    """The same from ‖x‖² + ‖z‖² - 2 x·z, on CPUs several times faster, and for close pairs from
    their differences; ``exclude_diagonal`` makes the diagonal zero (z is x)."""
    x_sizes = torch.linalg.vector_norm(x, dim=-1).square_()
    z_sizes = torch.linalg.vector_norm(z, dim=-1).square_()
    sizes = x_sizes[:, :, None] + z_sizes[:, None, :]
    squared = torch.baddbmm(sizes, x, z.transpose(1, 2), alpha=-2)
    close = squared < CANCELLATION * sizes
    if exclude_diagonal:
        squared.diagonal(dim1=1, dim2=2).zero_()
        close.diagonal(dim1=1, dim2=2).zero_()
    if close.any():
        position, n, m = close.nonzero(as_tuple=True)
        squared[position, n, m] = (x[position, n] - z[position, m]).square().sum(-1)
    return squared


def _check(
    samples: torch.Tensor,
    mean: torch.Tensor,
    log_std: torch.Tensor,
    noise: torch.Tensor | None,
    beta: float,
) -> None:
    if samples.dim() != 3 or samples.shape[0] < 2:
        raise ValueError(f"samples must be [N >= 2, S, l], not {list(samples.shape)}")
    if mean.shape != samples.shape[1:] or log_std.shape != mean.shape:
        raise ValueError(
            f"mean {list(mean.shape)} and log_std {list(log_std.shape)} must both be "
            f"{list(samples.shape[1:])}, since samples are {list(samples.shape)}"
        )
    if noise is not None and (noise.dim() != 3 or noise.shape[1:] != mean.shape):
        raise ValueError(f"noise {list(noise.shape)} must be [M, {mean.shape[0]}, {mean.shape[1]}]")
    if not 0 < beta < 2:
        raise ValueError(f"beta must lie in (0, 2), not {beta}")
