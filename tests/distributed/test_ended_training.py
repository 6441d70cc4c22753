"""What a finished training leaves in its process."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from launches import ALONE, Tiny, language_recipe, recipe

from calm_dist.parallel.launch import World
from calm_dist.training.resolve import resolve


@pytest.mark.parametrize("frozen", [False, True], ids=["nothing_frozen", "frozen_before"])
def test_memory_is_given_back(tiny: Tiny, tmp_path: Path, frozen: bool) -> None:
    """While it runs, a training excludes its objects from garbage collection; what the program
    itself has excluded stays excluded."""
    from calm_dist.inference.load import single_process_topology
    from calm_dist.training.language_model import Trainer

    World(0, 1, 0, 1, "", 0, "test").export()
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    overrides = tiny(run_dir, "calm", **ALONE, training__steps=1, parallel__device="cpu")
    given = resolve(language_recipe(recipe("calm"), overrides))
    trainer = Trainer(given, single_process_topology(given, torch.device("cpu")))
    gc.unfreeze()
    if frozen:
        gc.freeze()
    trainer.run()
    assert trainer.parts.head is not None
    trainer.parts.head.close()
    held = weakref.ref(trainer), weakref.ref(trainer.parts.chunks[0]), weakref.ref(trainer.parts)
    del trainer
    gc.collect()
    try:
        assert (gc.get_freeze_count() > 0) == frozen
        assert frozen or [part() for part in held] == [None] * 3
    finally:
        gc.unfreeze()
