"""Training steps on this device against those of a CPU, and bf16 against fp32.

All numbers that a step draws are drawn on the host here, so that every device trains on the same.
The losses of a CPU are in ``recorded.json``, made by ``python -m calm_dist.gpu_check.parity``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from calm_dist.benchmark.random_steps import RandomSteps, random_batch
from calm_dist.cli.console import write_json
from calm_dist.gpu_check.worker import Check
from calm_dist.inference.load import single_process_topology
from calm_dist.models.heads.base import Draw, NoiseSource
from calm_dist.parallel.noise import KeyedNoise
from calm_dist.parallel.pipeline import Batch, LatentForwardStep
from calm_dist.parallel.topology import Topology
from calm_dist.recipe import LanguageModelRecipe

RECORDED = Path(__file__).with_name("recorded.json")
STEPS = 20
# Relative differences of losses: of rounding, which 20 steps let grow (2e-7 between two versions of
# torch on CPUs), and of bf16 (5e-4 there).
TOLERANCE, TOLERANCE_BF16 = 1e-5, 3e-3
KINDS = ("calm", "transformer")


def measure(check: Check) -> None:
    """Losses of both models in fp32 against those recorded, and in bf16 against fp32."""
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    check.add(recorded_with=recorded["torch"], tolerances=[TOLERANCE, TOLERANCE_BF16])
    for kind in KINDS:
        fp32 = losses(kind, "fp32", check.device)
        bf16 = losses(kind, "bf16", check.device)
        to_cpu = largest_difference(fp32, recorded["losses"][kind])
        to_fp32 = largest_difference(bf16, fp32)
        check.row(
            "models",
            name=kind,
            fp32=fp32,
            bf16=bf16,
            fp32_to_cpu=to_cpu,
            bf16_to_fp32=to_fp32,
            is_right=to_cpu <= TOLERANCE and to_fp32 <= TOLERANCE_BF16,
        )


def record() -> dict[str, Any]:
    """The losses of this machine's CPU, as `RECORDED` holds them."""
    cpu = torch.device("cpu")
    return {"torch": torch.__version__, "losses": {k: losses(k, "fp32", cpu) for k in KINDS}}


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    """Relative to the loss of the same step."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def losses(kind: str, precision: str, device: torch.device) -> list[float]:
    """Losses of the first `STEPS` steps, each on a batch of its own."""
    recipe = parity_recipe(kind, precision)
    topology = single_process_topology(recipe, device)
    steps = RandomSteps(recipe, topology)
    if kind == "calm":
        forward_step = HostNoiseStep(recipe, topology, steps.parts.head, None)
        steps.parts = replace(steps.parts, forward_step=forward_step)
    found = []
    for number in range(STEPS):
        steps.batch = random_batch(recipe, topology, seed=number)
        steps.step(number)
        assert steps.result is not None
        found.append(steps.result.loss)
    steps.close()
    return found


def parity_recipe(kind: str, precision: str) -> LanguageModelRecipe:
    """A small model with the parts of the paper's: heads of 64, an energy head."""
    model: dict[str, Any] = {
        "kind": kind,
        "vocab_size": 1000,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    if kind == "calm":
        head = {"num_mlp_layers": 2, "num_samples": 4, "posterior_samples": 16}
        model |= {"patch_size": 4, "latent_size": 32, "head": head}
    return LanguageModelRecipe.from_dict(
        {
            "run": {"dir": "runs/parity"},
            "model": model,
            "data": {"path": "latents/train", "block_size": 256},
            # Both devices have it, and take the same numbers.
            "training": {
                "steps": STEPS,
                "micro_batch_size": 2,
                "global_batch_size": 4,
                "learning_rate": 1e-3,
                "warmup_steps": 0,
                **({"energy_kernel": "torch"} if kind == "calm" else {}),
            },
            "precision": precision,
        }
    )


class HostNoise(KeyedNoise):
    """Noise that is drawn on the host and moved to a device."""

    def __init__(
        self, seed: int, step: int, index: list[int], start: int, stop: int, device: torch.device
    ) -> None:
        super().__init__(seed, step, index, start, stop, torch.device("cpu"))
        self._target = device

    def chunks(
        self, kind: str, draw: Draw
    ) -> Iterator[tuple[int, int, Callable[[], torch.Tensor]]]:
        for first, end, noise in super().chunks(kind, draw):
            yield first, end, partial(self._moved, noise)

    def _moved(self, noise: Callable[[], torch.Tensor]) -> torch.Tensor:
        return noise().to(self._target)


class HostNoiseStep(LatentForwardStep):
    """The forward step of a CALM with `HostNoise`."""

    _topology: Topology

    def _noise_source(self, batch: Batch) -> NoiseSource:
        key = (self._seed, self._step, batch["index"].tolist(), self._start, self._stop)
        return HostNoise(*key, self._topology.device)


if __name__ == "__main__":
    write_json(record(), RECORDED)
