"""Rehearsals of the models that the check trains: what their steps should need and launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from calm_dist.costs.clusters import PRESETS
from calm_dist.gpu_check.model import PROFILED, cluster_of, variant_recipe
from calm_dist.gpu_check.parts import VARIANTS
from calm_dist.gpu_check.worker import Check, why_not
from calm_dist.rehearsal.rehearse import rehearse
from calm_dist.rehearsal.stand_in import cuda_of_torch

# Of machines without a GPU, and of GPUs that the planner does not know.
_DEFAULT = PRESETS["h100-sxm"]


def rehearse_variants(check: Check) -> None:
    """Rehearse each variant on the kind of GPU that is there."""
    cuda_of_torch()
    has_gpu = check.device.type == "cuda" and torch.cuda.is_available()
    gpu = (cluster_of(check.device) if has_gpu else None) or _DEFAULT
    check.add(gpu=gpu.name)
    for variant in VARIANTS:
        try:
            (rank,) = rehearse(variant_recipe(variant, check.small), gpu, [0])["ranks"]
        # A rehearsal that fails is one row.
        except Exception as error:
            check.row("variants", name=variant.name, why_not=why_not(error))
            continue
        if "failed" in rank:
            check.row("variants", name=variant.name, why_not=rank["failed"]["error"])
            continue
        check.row(
            "variants",
            name=variant.name,
            peak_bytes=rank["peak"],
            planned_bytes=rank["planned_peak"],
            # Of a step of as many micro-batches as are profiled.
            kernels=_of_profiled(rank, _kernels),
            waits=_of_profiled(rank, _waits),
            all_waits=[{"where": row["where"], "what": row["what"], "count": row["count"]}
                   for row in rank["step"]["waits"]],
        )  # fmt: skip


def _of_profiled(rank: dict[str, Any], count: Callable[[dict[str, Any]], float]) -> float:
    """A count of a whole step, without the micro-batches that the profile leaves out."""
    left_out = max(0, rank["micro_batches"] - PROFILED)
    return round(count(rank["step"]) - left_out * count(rank["each"]))


def _kernels(counts: dict[str, Any]) -> float:
    return sum(row.get("forward", 0) + row.get("backward", 0) for row in counts["kernels"])


def _waits(counts: dict[str, Any]) -> float:
    return sum(row["count"] for row in counts["waits"])
