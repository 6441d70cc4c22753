"""AdamW."""

from __future__ import annotations

from typing import Any

import torch


def adamw(groups: list[dict[str, Any]], training: Any) -> torch.optim.AdamW:
    """Torch's fused AdamW with the ``adam_*`` fields of a recipe's ``training`` section."""
    return torch.optim.AdamW(
        groups,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_eps,
        fused=True,
    )
