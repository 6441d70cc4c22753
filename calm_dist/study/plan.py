"""A plan of trainings: a YAML file whose entries become single runs.

    vocabulary: 259            # if absent, a tokenizer must be given
    block_size: 256
    evaluation: {split: valid, blocks: 128, samples: 8}
    texts: {prompts: [The sea], temperatures: ['1', 1/2]}    # if absent, none
    runs:
      - name: ae
        recipe: autoencoder.yaml
        overrides: {training.steps: 500}
      - name: calm
        recipe: calm.yaml
        autoencoder: ae
        flops: 1e12
        grid: {training.learning_rate: [1e-3, 2e-3]}
        seeds: [0, 1]

An entry with a grid stands for every combination of its values, with every seed: here for four
runs, ``calm-learning_rate=0.001-s0`` and so on.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from calm_dist.errors import RecipeError
from calm_dist.files import read_bounded
from calm_dist.recipe import LARGEST_FILE
from calm_dist.recipe.checks import describe_validation_errors
from calm_dist.recipe.yaml_text import parse_yaml
from calm_dist.schema import Positive, PositiveFloat, Section, Seed, Text

Values = Annotated[tuple[Any, ...], Field(strict=False, min_length=1)]


class Scoring(Section):
    """How the runs of a plan are scored."""

    split: Literal["valid", "test"] = "valid"
    """``valid`` for everything that is chosen by its score; ``test`` for what is reported."""
    blocks: Positive = 128
    """Evenly spaced blocks of the split."""
    samples: Positive = 8
    """Draws for each position."""


class Texts(Section):
    """What every language model of a plan is asked to write, with seed 0."""

    prompts: Annotated[tuple[Text, ...], Field(strict=False, min_length=1)]
    """Beginnings of the texts."""
    temperatures: Annotated[tuple[Text, ...], Field(strict=False, min_length=1)] = (
        "1",
        "1/2",
        "1/3",
    )
    """As for tools/generate.py."""
    tokens: Positive = 64
    """New tokens of each text."""


class Entry(Section):
    """One or several runs of a plan."""

    name: Text
    """Name of the runs, and of their directories and results."""
    recipe: Text
    """A recipe file, relative to the plan's directory."""
    flops: PositiveFloat | None = None
    """Training FLOPs as this package executes them, which determine the number of steps; if absent,
    the recipe's own steps."""
    autoencoder: Text | None = None
    """Full name of the run whose autoencoder a CALM uses."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Dotted fields of the recipe and their values."""
    grid: dict[str, Values] = Field(default_factory=dict)
    """Dotted fields, each with the values to try."""
    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1)] = (0,)
    """Values of ``run.seed`` and of ``data.seed``, the seed of the blocks' order."""
    all_checkpoints: bool = False
    """Score every checkpoint, not only the last."""


class Plan(Section):
    """A whole plan."""

    vocabulary: Annotated[int, Field(ge=259)] | None = None
    """Entries of a BPE that is trained on the corpus; if absent, a tokenizer must be given."""
    block_size: Positive
    """Tokens of a block."""
    evaluation: Scoring = Scoring()
    texts: Texts | None = None
    runs: Annotated[tuple[Entry, ...], Field(strict=False, min_length=1)]


@dataclass(frozen=True)
class PlannedRun:
    """One training of a plan."""

    name: str
    recipe: Path
    overrides: tuple[str, ...]
    """Command-line overrides, without those that the study adds."""
    flops: float | None
    autoencoder: str | None
    all_checkpoints: bool


_SEEDS = ("run.seed", "data.seed")


def read_plan(path: str | Path) -> tuple[Plan, list[PlannedRun]]:
    """A plan and its runs, autoencoders before the CALMs that use them.

    Raises:
        RecipeError: the plan is invalid; the message lists all problems.
    """
    path = Path(path)
    try:
        text = read_bounded(path, LARGEST_FILE, RecipeError).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"is not UTF-8 text ({error})"
        raise RecipeError(f"{path}: {reason}; give the file of a plan") from error
    values = parse_yaml(text, source=str(path))
    try:
        plan = Plan.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{path}: {describe_validation_errors(error, Plan)}") from error
    for entry in plan.runs:
        if given := [name for name in _SEEDS if name in entry.overrides or name in entry.grid]:
            raise RecipeError(f"{path}: {entry.name}: {given[0]}: is set by seeds; use seeds")
    runs = [run for entry in plan.runs for run in _runs_of(entry, path.parent)]
    _check(runs, path)
    used = {run.autoencoder for run in runs}
    return plan, sorted(runs, key=lambda run: run.name not in used)


def _runs_of(entry: Entry, directory: Path) -> Iterator[PlannedRun]:
    for values in itertools.product(*entry.grid.values()):
        chosen = dict(zip(entry.grid, values, strict=True))
        tried = [f"{field.rpartition('.')[2]}={value}" for field, value in chosen.items()]
        for seed in entry.seeds:
            parts = [entry.name, *tried, *([f"s{seed}"] if len(entry.seeds) > 1 else [])]
            fields = {**entry.overrides, **chosen, **dict.fromkeys(_SEEDS, seed)}
            yield PlannedRun(
                "-".join(parts),
                directory / entry.recipe,
                tuple(f"{field}={_text(value)}" for field, value in fields.items()),
                entry.flops,
                entry.autoencoder,
                entry.all_checkpoints,
            )


def _text(value: Any) -> str:
    """A value in the form of a command-line override."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def is_run_name(name: str) -> bool:
    """Whether it can name a directory."""
    return "/" not in name and "\0" not in name and not name.startswith(".") and name != ""


def _check(runs: list[PlannedRun], path: Path) -> None:
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"{path}: runs: {name} occurs twice; give each run its own name")
        if not is_run_name(name):
            raise RecipeError(f"{path}: runs: {name} cannot name a directory; choose another")
    for run in runs:
        if run.autoencoder is not None and run.autoencoder not in names:
            raise RecipeError(
                f"{path}: {run.name}: autoencoder {run.autoencoder} is not a run of this plan; use "
                f"one of {', '.join(names[:10])}"
            )
        if not run.recipe.is_file():
            raise RecipeError(f"{path}: {run.name}: {run.recipe}: no such recipe")
