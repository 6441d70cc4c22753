"""The parts of a check, in the order of their importance. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

CALM, TRANSFORMER = "recipes/calm_m.yaml", "recipes/transformer_m.yaml"

# Warp instructions of the energy kernel for a position of CALM-M (N = 8, l = 128, 100 draws, bf16,
# with gradient), by compute capability; compiled ahead of time, tests/gpu/test_compiled_kernel.py.
ENERGY_INSTRUCTIONS = {8: 38_400, 9: 37_700, 10: 37_000}


@dataclass(frozen=True)
class CheckPart:
    """One part of a check, which runs in a process of its own."""

    name: str
    """Also the stem of its result's file."""
    title: str
    seconds: int
    """Most time that it may take."""
    function: str
    """``module.function`` of this package; called with a `worker.Check` and ``arguments``."""
    arguments: dict[str, Any] = field(default_factory=dict)
    in_background: bool = False
    """Whether it runs beside those that follow, since it needs no GPU."""


@dataclass(frozen=True)
class Variant:
    """A recipe as it is trained on one GPU."""

    name: str
    title: str
    recipe: str
    micro_batch_size: int
    micro_batches: int
    overrides: tuple[str, ...] = ()


# As many blocks as a GPU of the recipe's eight takes in a step; of the Transformer's, a quarter.
VARIANTS = (
    Variant("calm_m", "CALM-M, the recipe", CALM, 8, 4),
    Variant("calm_m_16", "CALM-M, micro-batches of 16", CALM, 16, 2),
    Variant("calm_m_1", "CALM-M, micro-batches of 1", CALM, 1, 32),
    Variant(
        "calm_m_torch",
        "CALM-M, micro-batches of 1, the energy score by torch",
        CALM,
        1,
        32,
        ("training.energy_kernel=torch",),
    ),
    Variant("transformer_m", "Transformer-M, the recipe", TRANSFORMER, 8, 4),
)


def _of_variant(variant: Variant) -> CheckPart:
    return CheckPart(
        variant.name, variant.title, 75, "model.measure_variant", {"variant": variant.name}
    )


PARTS = (
    CheckPart("facts", "the machine and its limits", 60, "facts.measure"),
    CheckPart("kernel", "the energy kernel", 90, "kernel.measure"),
    *map(_of_variant, VARIANTS[:2]),
    CheckPart("parity", "20 steps against those of a CPU", 90, "parity.measure"),
    # Nothing else checks this: not last, where the time may be over.
    CheckPart("recovery", "a killed run resumes", 120, "recovery.measure"),
    CheckPart("attention", "attention kernels", 60, "attention.measure"),
    *map(_of_variant, VARIANTS[2:]),
    # Not beside the steps that are timed: their launches need the host.
    CheckPart("rehearsal", "rehearsals of the models", 400, "rehearsed.rehearse_variants",
         in_background=True),
    CheckPart("autoencoder", "the autoencoder", 60, "inference.measure_autoencoder"),
    CheckPart("inference", "evaluation and generation", 60, "inference.measure_models"),
)  # fmt: skip


def variant_named(name: str) -> Variant:
    return next(variant for variant in VARIANTS if variant.name == name)
