"""The kernels of noise, rotary positions and SwiGLU; without a GPU in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="needs triton, as bash tools/run_tests.sh installs it")

from megatron.core.models.common.embeddings import rope_utils  # noqa: E402

from calm_dist.models.heads.noise_kernel import uniform_noise  # noqa: E402
from calm_dist.models.rotary_kernel import rotate  # noqa: E402
from calm_dist.models.swiglu_kernel import swiglu  # noqa: E402

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")


def test_noise_is_uniform_and_independent() -> None:
    """Kolmogorov-Smirnov on all numbers and on each column; correlations between columns and
    between samples of one position."""
    from scipy import stats

    keys = torch.arange(400, device=DEVICE)
    noise = uniform_noise(keys, 5, 33, torch.float32).cpu()
    assert noise.shape == (5, 400, 33)
    assert noise.min() >= -0.5 and noise.max() < 0.5
    uniform = stats.uniform(-0.5, 1)
    assert stats.kstest(noise.flatten(), uniform.cdf).pvalue > 1e-4
    assert min(stats.kstest(noise[..., c].flatten(), uniform.cdf).pvalue for c in range(33)) > 1e-5
    for table in (noise.flatten(0, 1), noise.transpose(1, 2).flatten(1).T):
        correlations = table.T.corrcoef() - torch.eye(table.shape[1])
        assert correlations.abs().max() < 5.5 / len(table) ** 0.5


def test_noise_depends_on_its_key_alone() -> None:
    keys = 2**55 + torch.arange(12, device=DEVICE)
    whole = uniform_noise(keys, 8, 64, torch.float32)
    assert torch.equal(uniform_noise(keys[7:9], 8, 64, torch.float32), whole[:, 7:9])
    # The interpreter rounds to bf16 towards zero.
    rounded = uniform_noise(keys, 8, 64, torch.bfloat16).float()
    assert (rounded - whole).abs().max() <= 2**-9 * (1 if HAS_GPU else 2)
    assert not torch.isin(uniform_noise(keys + 100, 8, 64, torch.float32), whole).all()
    assert uniform_noise(keys[:0], 8, 64, torch.float32).shape == (8, 0, 64)
    assert uniform_noise(keys[:1], 1, 1, torch.float32).shape == (1, 1, 1)


@pytest.mark.parametrize(
    ("steps", "batch", "heads", "size", "texts"),
    [(5, 2, 3, 16, 1), (1, 1, 1, 2, 1), (7, 2, 5, 12, 2), (4, 1, 16, 64, 1)],
)
def test_a_rotation_is_that_of_megatron(
    steps: int, batch: int, heads: int, size: int, texts: int
) -> None:
    """Values and gradients, of a part of a larger tensor; in bf16 within its rounding."""
    torch.manual_seed(0)
    angles = 50 * torch.rand(steps, texts, 1, size // 2, device=DEVICE)
    angles = torch.cat([angles, angles], -1)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-6)):
        mixed = torch.randn(steps, batch, heads, 3 * size, device=DEVICE, dtype=dtype)
        states = mixed[..., size : 2 * size].requires_grad_()
        upstream = torch.randn_like(mixed[..., :size])
        found = []
        for rotated in (
            rotate(states, angles),
            rope_utils._apply_rotary_pos_emb_bshd(states, angles, rotary_interleaved=False),
        ):
            found.append([rotated, *torch.autograd.grad(rotated, states, upstream)])
        for ours, expected in zip(*found, strict=True):
            assert (ours - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("shape", [(3, 2, 2 * 24), (1, 2), (2, 2 * 1025), (0, 8)])
def test_swiglu_is_that_of_torch(shape: tuple[int, ...]) -> None:
    """Values and gradients against fp64; in bf16 within its rounding."""
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7)):
        both = (3 * torch.randn(shape, device=DEVICE)).to(dtype).requires_grad_()
        exact = both.detach().double().requires_grad_()
        gate, up = exact.chunk(2, -1)
        upstream = torch.randn_like(gate)
        found = []
        for result, given in ((swiglu(both), both), (torch.nn.functional.silu(gate) * up, exact)):
            found.append(
                (result, *torch.autograd.grad(result, given, upstream.to(dtype).to(given)))
            )
        for ours, expected in zip(*found, strict=True):
            assert (ours.shape, ours.dtype) == (expected.shape, dtype)
            largest = expected.abs().max() if expected.numel() else 0.0
            assert ((ours.double() - expected).abs() <= tolerance * largest).all()
