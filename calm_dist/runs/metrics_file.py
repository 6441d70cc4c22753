"""``metrics.jsonl``: its lines, its records, and checks of their values.

A line may be truncated by a crash, or damaged in any way. A training record has ``loss``; an
evaluation has ``eval`` and no ``loss``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict, TypeGuard, cast

from calm_dist.files import finite, read_bounded

METRICS_FILE = "metrics.jsonl"
LARGEST_METRICS = 1 << 30
"""Most bytes of the file; millions of steps need fewer."""


class Protocol(TypedDict, total=False):
    """Settings of an evaluation; see `evaluation.evaluate.evaluate`."""

    block_size: int
    patch_size: int
    alignment: str
    blocks: int
    positions: int
    samples: int


class EvaluationScores(TypedDict, total=False):
    """Scores of a checkpoint; see `evaluation.evaluate.evaluate` and, for an autoencoder,
    `losses.reconstruction.Reconstruction.summary`."""

    brierlm: float | None
    brierlm_stderr: float | None
    brier: list[float]
    brier_stderr: list[float]
    cross_entropy: float
    perplexity: float
    energy_loss: float
    reconstruction_accuracy: float
    token_accuracy: float
    token_accuracy_mean: float
    token_accuracy_under_noise: dict[str, float]
    collapsed_dims: int
    active_dims: int
    latent_size: int
    kl_per_dim: list[float]
    mean_std: float
    spread: float
    blocks: int
    tokens_seen: int
    data_fingerprint: str
    seed: int
    protocol: Protocol


class Record(TypedDict):
    """A line of the file; numbers that were not finite are None."""

    step: int
    loss: NotRequired[float | None]
    cross_entropy: NotRequired[float | None]
    kl: NotRequired[float | None]
    grad_norm: NotRequired[float | None]
    learning_rate: NotRequired[float | None]
    tokens: NotRequired[int | None]
    tokens_per_second: NotRequired[float | None]
    step_seconds: NotRequired[float | None]
    skipped: NotRequired[int | None]
    eval: NotRequired[EvaluationScores]


def json_line(record: Mapping[str, Any]) -> str:
    """A record as a line of JSON, with null for numbers that are not finite."""
    return json.dumps(finite(record), allow_nan=False) + "\n"


def read_lines(run_dir: str | Path) -> list[bytes]:
    """The lines of a run's metrics.jsonl; empty if there is no such file.

    Raises:
        OSError: it cannot be read.
        UserError: it is larger than any run writes, or not a file.
    """
    path = Path(run_dir) / METRICS_FILE
    return read_bounded(path, LARGEST_METRICS).splitlines() if path.exists() else []


def parse_line(line: bytes) -> Record | None:
    """The record in a line, with all keys and with unchecked values; None if there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not is_count(record.get("step")):
        return None
    return cast(Record, record)


def read_records(run_dir: str | Path) -> list[Record]:
    """All records of a run, in order."""
    return [record for line in read_lines(run_dir) if (record := parse_line(line)) is not None]


def usable(found: Record) -> Record:
    """The usable part of a record: its valid numbers, and the values of its evaluation that have
    the right type."""
    record: dict[str, Any] = {
        name: value
        for name, value in found.items()
        if name != "eval" and is_number(value) and _has_sign(name, value)
    }
    evaluation = found.get("eval")
    if isinstance(evaluation, dict):
        record["eval"] = {name: value for name, value in evaluation.items() if _fits(name, value)}
    return cast(Record, record)


def num_blocks(evaluation: Mapping[str, Any]) -> int:
    """Blocks that an evaluation scored; 0 if unknown."""
    protocol = evaluation.get("protocol")
    blocks = protocol.get("blocks") if isinstance(protocol, dict) else None
    return blocks if isinstance(blocks, int) else 0


_NUMBERS = (
    "brierlm",
    "brierlm_stderr",
    "cross_entropy",
    "perplexity",
    "energy_loss",
    "reconstruction_accuracy",
    "token_accuracy",
    "token_accuracy_mean",
    "collapsed_dims",
    "tokens_seen",
)
_NOT_NEGATIVE = (
    "brierlm",
    "brierlm_stderr",
    "tokens_seen",
    "tokens",
    "tokens_per_second",
    "step_seconds",
)
_LISTS: dict[str, int | None] = {"brier": 4, "brier_stderr": 4, "kl_per_dim": None}
"""Lists of numbers and their lengths: one number per length of n-grams, or any number."""
_PROTOCOL = {
    "block_size": int,
    "patch_size": int,
    "alignment": str,
    "blocks": int,
    "positions": int,
    "samples": int,
}
_LARGEST = 1e100
"""Limit of a number, so that products of such numbers in FLOPs stay finite."""


def _fits(name: str, value: Any) -> bool:
    if name in _NUMBERS:
        return is_number(value) and _has_sign(name, value)
    if name in _LISTS:
        if not isinstance(value, list) or _LISTS[name] not in (None, len(value)):
            return False
        return all(v is not None and is_number(v) for v in value)
    if name == "protocol":
        return isinstance(value, dict) and all(
            type(value.get(part)) is kind for part, kind in _PROTOCOL.items()
        )
    return True


def _has_sign(name: str, value: float | None) -> bool:
    return value is None or value >= 0 or name not in _NOT_NEGATIVE


def is_number(value: Any) -> TypeGuard[float | None]:
    """Whether a value is a number that can be used in computations, or null."""
    if isinstance(value, bool):
        return False
    return value is None or (isinstance(value, int | float) and abs(value) < _LARGEST)


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
