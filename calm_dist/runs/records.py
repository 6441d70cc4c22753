"""Read run directories, finished or not: recipe, metrics.jsonl and environment.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from calm_dist.costs.flops import Counts, count
from calm_dist.errors import RecipeError, UserError, listed
from calm_dist.files import read_bounded
from calm_dist.recipe import Recipe, load_recipe
from calm_dist.runs.directory import LARGEST_ENVIRONMENT
from calm_dist.runs.metrics_file import is_count, num_blocks, parse_line, read_lines, usable

Record = Mapping[str, Any]

CPU = "cpu"


@dataclass(frozen=True)
class RecordedRun:
    """A run directory as read from disk."""

    path: Path
    recipe: Recipe
    training: list[Record] = field(default_factory=list)
    """Records with a loss, by step; for a step repeated after a resume, only the last record."""
    evaluations: list[Record] = field(default_factory=list)
    """The ``eval`` parts with their ``step``, by step; per step and `conditions` only the one with
    the most blocks, or the last of several such."""
    environment: Record = field(default_factory=dict)
    """environment.json of the last start."""
    damage: tuple[str, ...] = ()
    """Descriptions of the parts of its files that could not be read."""
    label: str | None = None
    """A unique name among runs of the same name."""

    @property
    def name(self) -> str:
        return self.label or self.recipe.run.display_name

    @property
    def kind(self) -> str:
        """``model.kind``; ``tokens`` for a CALM whose head predicts tokens, the control."""
        model = self.recipe.model
        return "tokens" if model.kind == "calm" and not model.has_latents else model.kind

    @property
    def last_evaluation(self) -> Record:
        """The evaluation of the last evaluated step; empty if there is none."""
        return self.evaluations[-1] if self.evaluations else {}

    @property
    def comparable_evaluations(self) -> list[Record]:
        """The evaluations on the same data and with the same protocol as the last one."""
        wanted = conditions(self.last_evaluation)
        return [
            e for e in self.evaluations if conditions(e) == wanted and e.get("brierlm") is not None
        ]

    @property
    def tokens_seen(self) -> int | None:
        """Measured training tokens; None if nothing was recorded."""
        trained = [r["tokens"] for r in self.training if r.get("tokens") is not None]
        evaluated = [e["tokens_seen"] for e in self.evaluations if e.get("tokens_seen") is not None]
        return max([*trained, *evaluated], default=None)

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the training records."""
        rates = [r["tokens_per_second"] for r in self.training if r.get("tokens_per_second")]
        return median(rates) if rates else None

    def tokens_at(self, record: Record) -> int:
        """Tokens seen up to and including a training record."""
        tokens = record.get("tokens")
        return record["step"] * self.recipe.tokens_per_step if tokens is None else tokens

    @property
    def ranks(self) -> int | None:
        """Processes of the last start, one per device; None if unknown."""
        return self.environment.get("world_size")

    @property
    def device(self) -> str | None:
        """The GPU's name, ``cpu``, or None if unknown."""
        if "gpu" in self.environment:
            return self.environment["gpu"] or CPU
        version = str(self.environment.get("libraries", {}).get("torch"))
        return CPU if version.endswith("+cpu") else None

    @property
    def training_seconds(self) -> float | None:
        """Duration of all steps; a logged step also stands for those since the previous record."""
        seconds, before = 0.0, 0
        for record in self.training:
            if record.get("step_seconds") is None:
                return None
            seconds += (record["step"] - before) * record["step_seconds"]
            before = record["step"]
        return seconds if self.training else None

    def counts(self, tokens: int | None = None) -> Counts:
        """Parameters and FLOPs over ``tokens`` (default: those seen, 0 if unknown)."""
        return count(self.recipe, tokens=(self.tokens_seen or 0) if tokens is None else tokens)


def conditions(evaluation: Record) -> tuple[str, ...]:
    """The data, block size and n-grams, which two BrierLM must share to be comparable."""
    protocol = evaluation.get("protocol") or {}
    names = ("block_size", "patch_size", "alignment")
    values = (evaluation.get("data_fingerprint"), *(protocol.get(name) for name in names))
    return tuple(map(str, values))


def read_run(path: str | Path) -> RecordedRun:
    """Read a run directory. Metrics may be missing or damaged; the recipe may not.

    Raises:
        UserError: the directory or its recipe.yaml is missing or damaged.
    """
    path = Path(path)
    if not (path / "recipe.yaml").is_file():
        raise UserError(f"{path}: has no recipe.yaml; give a run directory of tools/train.py")
    records, lost = _usable_records(path)
    environment, fault = _read_environment(path / "environment.json")
    damage = [fault] if fault else []
    if lost:
        damage.append(f"Damaged lines in metrics.jsonl: {lost}; the damaged parts are left out.")
    training = {record["step"]: record for record in records if "loss" in record}
    evaluations: dict[Any, Record] = {}
    for record in records:
        if "eval" in record:
            key = (record["step"], conditions(record["eval"]))
            # An evaluation of a few blocks does not replace a complete one.
            if key in evaluations and num_blocks(record["eval"]) < num_blocks(evaluations[key]):
                continue
            # Removed first, so that the last evaluation of a step is the last in order.
            evaluations.pop(key, None)
            evaluations[key] = {**record["eval"], "step": record["step"]}
    recipe = load_recipe(path / "recipe.yaml")
    try:
        count(recipe, tokens=0)
    except RecipeError as error:
        raise UserError(f"{path / 'recipe.yaml'}: {error}") from error
    return RecordedRun(
        path,
        recipe,
        [training[step] for step in sorted(training)],
        sorted(evaluations.values(), key=lambda evaluation: evaluation["step"]),
        environment,
        tuple(damage),
    )


def _read_environment(path: Path) -> tuple[Record, str | None]:
    """The valid entries of an environment.json, and a description of the damaged ones or None."""
    if not path.exists():
        return {}, None
    try:
        environment = json.loads(read_bounded(path, LARGEST_ENVIRONMENT))
    except (ValueError, RecursionError):
        environment = None
    if not isinstance(environment, dict):
        return {}, "environment.json is damaged."
    kept = {name: value for name, value in environment.items() if _is_environment(name, value)}
    wrong = listed(name for name in environment if name not in kept)
    return kept, f"environment.json: the value of {wrong} is damaged." if wrong else None


def _is_environment(name: str, value: Any) -> bool:
    if name == "world_size":
        return is_count(value) and value > 0
    if name == "gpu":
        return value is None or isinstance(value, str)
    return isinstance(value, dict) if name == "libraries" else True


def _usable_records(path: Path) -> tuple[list[Record], int]:
    """The usable parts of the records of a metrics.jsonl, and the number of damaged lines."""
    records: list[Record] = []
    damaged = 0
    for line in read_lines(path):
        if (found := parse_line(line)) is None:
            damaged += 1
            continue
        record = usable(found)
        damaged += record.keys() != found.keys() or record.get("eval") != found.get("eval")
        records.append(record)
    return records, damaged


def first_of_kind(entries: Sequence[dict[str, Any]], kind: str) -> dict[str, Any] | None:
    """The first entry of report.json's ``models`` of that kind."""
    return next((entry for entry in entries if entry["kind"] == kind), None)
