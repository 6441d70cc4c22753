"""What is kept of a run of a study: everything that its tables and plots are made of."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from calm_dist.reports.analysis import training_totals
from calm_dist.runs.records import read_run

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
    """A JSON-able dict of a run that is finished or diverged, with its last scores and those of
    earlier checkpoints.

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
