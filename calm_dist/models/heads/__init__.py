"""The generative heads: one interface (`base`), chosen by ``model.head.kind``."""

from __future__ import annotations

from calm_dist.models.heads.base import GenerativeHead
from calm_dist.models.heads.diffusion import DiffusionHead
from calm_dist.models.heads.energy import EnergyHead
from calm_dist.models.heads.flow import FlowHead

HEADS: dict[str, type[EnergyHead] | type[FlowHead] | type[DiffusionHead]] = {
    "energy": EnergyHead,
    "flow": FlowHead,
    "diffusion": DiffusionHead,
}

__all__ = ["HEADS", "DiffusionHead", "EnergyHead", "FlowHead", "GenerativeHead"]
