"""The result that is kept of a study's run: everything that tables and plots need."""

from __future__ import annotations

import json
import platform
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calm_dist.errors import UserError
from calm_dist.files import read_bounded
from calm_dist.reports.analysis import training_totals
from calm_dist.runs.records import read_run
from calm_dist.study.plan import is_run_name

LARGEST_COLLECTED = 1 << 26
"""Bytes of a file of collected results."""
_RUNS = "runs"
_SEED = re.compile(r"-s\d+$")

Result = dict[str, Any]

_SCORES = (
    *("brier", "brier_stderr", "brierlm", "brierlm_stderr", "cross_entropy"),
    *("brierlm_of_samples", "brierlm_of_samples_stderr", "energy_loss"),
    *("reconstruction_accuracy", "reconstruction_accuracy_mean"),
)
_RECONSTRUCTION = ("token_accuracy", "token_accuracy_mean", "mean_std", "spread", "active_dims")


def result_of(
    name: str,
    run_dir: Path,
    overrides: list[str],
    *,
    diverged: bool,
    autoencoder: str | None,
    seconds: float,
    threads: int,
) -> dict[str, Any]:
    """A JSON-able dict for a finished or diverged run, with its last scores and those of earlier
    checkpoints.

    ``train_flops`` counts what this package executes; ``encoding_flops`` counts the frozen encoder,
    which runs on the fly. The autoencoder's own training is in its own result.
    """
    run = read_run(run_dir)
    recipe, counts = run.recipe, run.counts()
    training, model = recipe.training, recipe.model
    last = run.last_evaluation
    kept = _RECONSTRUCTION if run.kind == "autoencoder" else _SCORES
    return {
        "name": name,
        "kind": run.kind,
        "head": model.head.kind if model.kind == "calm" else None,
        "diverged": diverged,
        "overrides": [
            o
            for o in overrides
            if not o.startswith(("run.dir=", "data.path=", "model.autoencoder="))
        ],
        "autoencoder": autoencoder,
        "seed": recipe.run.seed,
        "patch_size": model.patch_size,
        "parameters": counts.parameters,
        "hidden_size": model.hidden_size,
        "layers": None if model.kind == "autoencoder" else model.num_hidden_layers,
        "steps": training.steps,
        "learning_rate": training.learning_rate,
        "tokens_per_step": recipe.tokens_per_step,
        "tokens": run.tokens_seen,
        "train_flops": counts.train_flops_ours,
        "encoding_flops": training_totals(run, None)["encoding_flops"],
        "train_flops_per_token": counts.train_flops_per_token_ours,
        "inference_flops_per_token": counts.inference_flops_per_token,
        "loss": run.training[-1]["loss"] if run.training else None,
        **{key: last.get(key) for key in kept},
        "protocol": last.get("protocol"),
        "earlier": [
            {
                key: e.get(key)
                for key in ("step", "tokens_seen", "brier", "brierlm", "cross_entropy")
            }
            for e in run.evaluations[:-1]
            if run.kind != "autoencoder"
        ],
        "training_seconds": run.training_seconds,
        "seconds": seconds,
        "hardware": f"{platform.processor() or platform.machine()}, {threads} thread",
    }


def collected(plan: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """The JSON object of a study for publication."""
    return {"plan": plan, _RUNS: results}


def read_collected(file: Path) -> list[dict[str, Any]]:
    """The results of a file of `collected`.

    Raises:
        UserError: it is not such a file.
    """
    try:
        results = json.loads(read_bounded(file, LARGEST_COLLECTED, UserError))[_RUNS]
        names = [result["name"] for result in results]
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; give a file of study.py --collect") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{file}: has no results; give a file of study.py --collect") from error
    wrong = [name for name in names if not isinstance(name, str) or not is_run_name(name)]
    if wrong:
        raise UserError(
            f"{file}: {wrong[0]!r} cannot name a run; give a file of study.py --collect"
        )
    return results


def label_of(result: Result) -> str:
    """The kind of model that a run trains: transformer, tokens, or the kind of a CALM's head."""
    return f"CALM, {result['head']} head" if result["kind"] == "calm" else result["kind"]


def by_seed(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by the name of their run without its seed."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[_SEED.sub("", result["name"])].append(result)
    return groups
