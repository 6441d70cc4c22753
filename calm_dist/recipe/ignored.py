"""Fields that an earlier version accepted and ignored, in the recipes that runs wrote.

They are refused in recipes that a user writes. A run that was trained with one can still be read
and continued, since its checkpoints cannot be changed.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from calm_dist.errors import shown

RECIPE_FILE = "recipe.yaml"
"""Name of the recipe in a run directory and in a checkpoint."""

_log = logging.getLogger(__name__)

# Field that names a kind, the kinds that ignored a field, and that field.
_IGNORED = (
    ("model.head.kind", ("energy", "diffusion", "flow", "tokens"), "model.head.width"),
    ("model.kind", ("autoencoder",), "parallel.recompute"),
    ("model.kind", ("autoencoder",), "parallel.stage_layers"),
)


def leave_out_ignored(values: dict[str, Any], source: str) -> None:
    """Remove what the run that wrote these values ignored, with a warning.

    Args:
        values: as read from YAML, not checked yet.
        source: name of the file, for the warning.
    """
    for kind, kinds, field in _IGNORED:
        section, _, name = field.rpartition(".")
        fields = _at(values, section)
        if not isinstance(fields, dict) or not fields.get(name) or _at(values, kind) not in kinds:
            continue
        _warn(f"{source}: {field}: {shown(fields.pop(name))} is left out; the run did not use it")


def _at(values: Any, dotted: str) -> Any:
    """The value of a field; None if there is none."""
    for name in dotted.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values


@cache
def _warn(message: str) -> None:
    """Once in a process, which reads its recipe several times."""
    _log.warning(message)
