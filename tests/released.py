"""Released directories that a test may change, and what is asked of their readers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from calm_dist.errors import UserError
from calm_dist.interop.huggingface import load_calm
from calm_dist.recipe import CalmModel
from calm_dist.released.calm import released_calm

GOLDEN = Path(__file__).parent / "golden"
BIN, SAFE = "pytorch_model.bin", "model.safetensors"
Tensors = dict[str, torch.Tensor]


def tensors_of(directory: Path) -> Tensors:
    return torch.load(directory / BIN, weights_only=True)


def copy_released(directory: Path) -> Path:
    """Copy a released language model and its autoencoder; returns where the former is."""
    for name in ("calm_k4", "ae_k4"):
        shutil.copytree(GOLDEN / name, directory / name)
    return directory / "calm_k4"


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")


def edit_weights(directory: Path, edit: Callable[[Tensors], object]) -> None:
    weights = tensors_of(directory)
    edit(weights)
    torch.save(weights, directory / BIN)


def assert_is_golden(directory: Path) -> None:
    """The model holds exactly the golden weights."""
    model = load_calm(directory)
    assert isinstance(model.recipe.model, CalmModel)
    released = released_calm(
        model.recipe.model,
        dict(model.backbone.named_parameters()),
        dict(model.head.named_parameters()),
        model.autoencoder,
    )
    expected = tensors_of(GOLDEN / "calm_k4")
    # Of a tied pair, exports hold the one from which the authors' class restores both.
    del expected["ae_model.encoder.embed_tokens.weight"]
    assert released.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(released[name], tensor), name


def refused(directory: Path, *parts: str, load: Callable[[Path], object] = load_calm) -> None:
    """The directory cannot be loaded, and the message has these parts."""
    with pytest.raises(UserError) as caught:
        load(directory)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
