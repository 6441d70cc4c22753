"""Trained models in one process: loading, generation, sampling, decoding.

``calm_dist.inference.load(directory)`` loads a model with its tokenizer.
"""

import importlib
from typing import Any

from calm_dist.compat.megatron_import import import_megatron

# Before the first module of Megatron-core that one of this package imports.
import_megatron()


def __getattr__(name: str) -> Any:
    """`load`, which is a module that can be called, on first use."""
    if name == "load":
        return importlib.import_module("calm_dist.inference.load")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
