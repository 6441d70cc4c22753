"""What a finished training leaves in its process."""

from __future__ import annotations

import gc
import multiprocessing
import weakref
from pathlib import Path

import pytest
import torch
from launches import ALONE, Tiny, language_recipe, recipe

from calm_dist.parallel.launch import World
from calm_dist.training.resolve import resolve


def test_readers_end_while_the_trainer_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    from calm_dist.inference.load import single_process_topology
    from calm_dist.training.language_model import Trainer

    World(0, 1, 0, 1, "", 0, "test").export()
    more = {"training__steps": 1, "parallel__device": "cpu", "data__num_workers": 2}
    (tmp_path / "run").mkdir()
    overrides = tiny(tmp_path / "run", "transformer", **ALONE, **more)
    given = resolve(language_recipe(recipe("transformer"), overrides))
    trainer = Trainer(given, single_process_topology(given, torch.device("cpu")))
    readers: list[set[int | None]] = []
    finish_saving = trainer.finish_saving

    def see_readers() -> None:
        readers.append({process.pid for process in multiprocessing.active_children()})
        finish_saving()

    trainer.finish_saving = see_readers  # type: ignore[method-assign]
    before = {process.pid for process in multiprocessing.active_children()}
    trainer.run()
    # They end after the checkpoint, whose writer may be a process of its own.
    assert len(readers[0] - before) >= 2
    assert {process.pid for process in multiprocessing.active_children()} <= before


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
        # Python 3.12 itself freezes some hundred in each collection.
        assert (gc.get_freeze_count() > 10_000) == frozen
        assert frozen or [part() for part in held] == [None] * 3
    finally:
        gc.unfreeze()
