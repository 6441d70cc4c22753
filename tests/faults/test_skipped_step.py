"""A step whose loss is not finite changes nothing, and the next one works as if it had not been."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from launches import ALONE, language_recipe, recipe

from calm_dist.errors import TrainingDivergedError
from calm_dist.parallel.launch import World
from calm_dist.parallel.topology import Topology
from calm_dist.recipe import LanguageModelRecipe
from calm_dist.runs.run_progress import RunProgress
from calm_dist.training.resolve import resolve


@pytest.fixture(params=[1, 2])
def given(
    request: pytest.FixtureRequest, tmp_path: Path, tiny: Callable[..., list[str]]
) -> LanguageModelRecipe:
    """A one-process run with ZeRO-1 or ZeRO-2."""
    overrides = tiny(tmp_path, "calm", parallel__zero_stage=request.param, **ALONE)
    return resolve(language_recipe(recipe("calm"), overrides))


@pytest.fixture
def topology(given: LanguageModelRecipe) -> Iterator[Topology]:
    from calm_dist.inference.load import single_process_topology

    World(0, 1, 0, 1, "", 0, "test").export()
    yield single_process_topology(given, torch.device("cpu"))


def weights(trainer: object) -> list[torch.Tensor]:
    parts = trainer.parts  # type: ignore[attr-defined]
    modules = [*parts.chunks, parts.head.module]
    return [p.detach().clone() for module in modules for p in module.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_poisoned_batch_is_skipped(given: LanguageModelRecipe, topology: Topology) -> None:
    from calm_dist.training.language_model import Trainer

    poisoned, clean = Trainer(given, topology), Trainer(given, topology)
    for trainer in (poisoned, clean):
        trainer._batches.read()
        assert not trainer.train_step(trainer._batches.take()).skipped
    before = weights(poisoned)
    bad = poisoned._batches.take()
    bad["mean"][0, 5, 0] = float("nan")
    poisoned.progress.step = 1
    result = poisoned.train_step(bad)
    assert result.skipped
    assert same(weights(poisoned), before)

    clean._batches.take()
    clean._batches.read()
    for trainer in (poisoned, clean):
        trainer.progress.step = 2
        assert not trainer.train_step(trainer._batches.take()).skipped
    assert not same(weights(poisoned), before)
    assert same(weights(poisoned), weights(clean))


def test_run_gives_up_after_too_many_skips() -> None:
    progress = RunProgress(step=7, adam_steps=7)
    for skipped in (True, False, True):
        progress.count(skipped, max_skipped=1)
    assert (progress.step, progress.adam_steps, progress.skipped_in_a_row) == (10, 8, 1)
    with pytest.raises(TrainingDivergedError, match="max_skipped_steps=1"):
        progress.count(True, max_skipped=1)
