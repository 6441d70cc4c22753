"""BrierLM on Megatron's backbone: the authors' numbers, and branches against plain sequences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import VOCAB, tiny_model
from torch import Tensor

from calm_dist.evaluation.brier import NGRAM
from calm_dist.evaluation.brier_tree import _branch_outputs, cache_size, scores_from_patches
from calm_dist.inference.generate import decode_latents
from calm_dist.interop.huggingface import load_calm

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("patch_size", [2, 4])
def test_the_released_estimator(patch_size: int) -> None:
    """Two draws, the released code's noise, and its start range, which leaves out the last."""
    directory = GOLDEN / f"calm_k{patch_size}"
    model, io = load_calm(directory), load_file(directory / "io.safetensors")
    targets = io["brier.targets"]
    continued: set[tuple[int, ...]] = set()
    blocks = []
    steps = -(-NGRAM // patch_size)
    positions = targets.shape[1] // patch_size - (steps if steps > 1 else 0)
    for row, tokens in enumerate(io["input_ids"]):
        # Position i of the released code predicts patch i + 1.
        starts = torch.arange(positions) + 1
        target = torch.stack(
            [targets[row, i * patch_size : i * patch_size + NGRAM] for i in range(positions)]
        )

        def draw(hidden: Tensor, starts: Tensor, depth: int, row: int = row) -> Tensor:
            continued.update((int(start) - 1, depth - 1) for start in starts)
            uniform = io["brier.step_noise_uniform01"][starts - 1, depth - 1, :, row, 0]
            latents = model.head.sample(hidden, uniform.transpose(0, 1) - 0.5)
            return decode_latents(model, latents.flatten(0, 1)).view(2, len(starts), -1)

        draws = io["brier.pred"][:, row]
        cache = model.new_cache(1, cache_size(len(tokens) // patch_size, patch_size))
        model.hidden(tokens[None], cache=cache)
        blocks.append(scores_from_patches(model.hidden, cache, draw, draws, starts, target))
    scores = torch.stack(blocks).mean((0, 1))
    torch.testing.assert_close(scores, io["brier.out"].double(), atol=1e-6, rtol=0)
    if patch_size < NGRAM:
        used = {tuple(index) for index in io["brier.step_noise_used"].nonzero().tolist()}
        assert continued == used and used


@pytest.mark.parametrize(("kind", "patch_size"), [("calm", 1), ("calm", 2), ("transformer", 1)])
def test_branches_equal_plain_sequences(kind: str, patch_size: int) -> None:
    model = tiny_model(kind, patch_size=patch_size, block_steps=8)
    run = model.hidden if kind == "calm" else model.logits
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (8, patch_size), generator=generator)
    starts = torch.tensor([3, 3, 7])
    branches = torch.randint(0, VOCAB, (2, 3, patch_size), generator=generator)  # [depth, b, K]
    cache = model.new_cache(1, 8 + 3 * 3)
    block = run(tokens.view(1, -1), torch.arange(8), None, cache)
    torch.testing.assert_close(block, run(tokens.view(1, -1)), atol=2e-6, rtol=2e-6)
    for depth in (1, 2, 1):
        together = _branch_outputs(run, cache, 8, starts, branches[:depth].transpose(0, 1))
        assert len(together) == 3
        for branch, start in enumerate(starts.tolist()):
            plain = torch.cat([tokens[:start], branches[:depth, branch]])
            expected = run(plain.view(1, -1))[0, -1]
            torch.testing.assert_close(together[branch], expected, atol=2e-6, rtol=2e-6)
