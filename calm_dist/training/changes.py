"""Checks which fields a recipe may change from the checkpoint that it resumes or continues."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from calm_dist.data.download import Downloads
from calm_dist.data.store import StoreMeta, read_meta
from calm_dist.errors import CheckpointError, UserError
from calm_dist.recipe import Recipe, load_recipe
from calm_dist.redact import redact_values
from calm_dist.runs import checkpoints
from calm_dist.runs.checkpoints.run_state import RunState
from calm_dist.training.resolve import encoder_sha256
from calm_dist.training.schedule import learning_rate

_log = logging.getLogger(__name__)

# A run cannot change these; the stream checks the fields of its data.
_FIXED = ("precision", "run.seed", "training.optimizer")
_FREE_AFTER_IMPORT = ("model.init", "model.initializer_range")
# Fields of the model that `run.continue_from` allows to change: none affects the weights' shapes.
_FREE_IN_A_NEW_STAGE = (
    *_FREE_AFTER_IMPORT,
    "model.rope_theta",
    "model.head.num_samples",
    "model.head.posterior_samples",
    "model.head.beta",
    "model.head.sampling_steps",
    "model.latent_dropout",
    "model.token_dropout",
    "model.replaced_token_id",
    "model.kl_weight",
    "model.kl_clamp",
)


def check_changes(run_dir: Path, recipe: Recipe) -> None:
    """Log what the recipe has changed since the newest checkpoint, and refuse forbidden changes.

    Raises:
        CheckpointError: the checkpoints of the run or, if it has none, those of
            ``run.continue_from`` are of another model, noise or tokenizer.
    """
    own = checkpoints.step_directories(run_dir)
    if not own and recipe.run.continue_from is not None:
        _check_source(recipe.run.continue_from, recipe)
    directory, saved = _newest_readable(own)
    if directory is None or saved is None:
        return
    _check_tokenizer(directory, recipe, "use another run.dir")
    changed = _changed(saved, recipe)
    if checkpoints.has_only_weights(directory):
        # Imported weights fix neither the training nor the initialization.
        changed = {n: text for n, text in changed.items() if n.startswith("model.")}
        changed = {n: text for n, text in changed.items() if n not in _FREE_AFTER_IMPORT}
    refused = [text for n, text in changed.items() if n.startswith("model.") or n in _FIXED]
    refused += _other_ends(saved, changed)
    if refused:
        raise CheckpointError(
            f"{run_dir}: its checkpoints were written for another model, noise or tokens "
            f"({', '.join(refused)}); use the recipe inside them, or another run.dir"
        )
    if changed:
        _log.info(f"changed since {directory.name}: {', '.join(changed.values())}")
    _say_rates(RunState.read(directory).step, saved, recipe)


def _other_ends(saved: Recipe, changed: dict[str, str]) -> list[str]:
    """Begin and end tokens that differ; checkpoints of earlier versions do not name them."""
    named = {f"data.{name}": getattr(saved.data, name) for name in ("begin_token", "end_token")}
    return [text for n, text in changed.items() if named.get(n) is not None]


def _say_rates(step: int, saved: Recipe, recipe: Recipe) -> None:
    """Log the learning rates before and now, if the next one differs from the original plan."""
    if step == 0 or step >= recipe.training.steps:
        return
    last, planned = (learning_rate(saved.training, number) for number in (step - 1, step))
    now = learning_rate(recipe.training, step)
    if math.isclose(now, planned, rel_tol=1e-9):
        return
    advice = ""
    if now > last and recipe.training.schedule in ("cosine", "linear"):
        advice = (
            "; training.schedule=wsd keeps the rate constant up to a final decay, so a run that "
            "stops before the decay can be extended without a jump"
        )
    _log.info(f"learning rate: {last:.3g} in step {step}, {now:.3g} in step {step + 1}{advice}")


def _check_source(path: str, recipe: Recipe) -> None:
    """Raises CheckpointError if the weights of ``run.continue_from`` do not fit the recipe."""
    name = "run.continue_from"
    directory, saved = _newest_readable(checkpoints.candidates(path, name))
    if directory is None or saved is None:
        raise CheckpointError(
            f"{name}: {path}: recipe or state of its checkpoints are damaged; give another one"
        )
    remedy = f"give {name} a checkpoint of the same"
    meta = _check_tokenizer(directory, recipe, remedy)
    changed = _changed(saved, recipe)
    refused = [
        text
        for field, text in changed.items()
        if field in ("precision", "training.optimizer")
        or (
            field.startswith("model.")
            and field not in _FREE_IN_A_NEW_STAGE
            # It has no weights here; the latents are compared below.
            and not field.startswith("model.autoencoder_size.")
        )
    ]
    refused += _other_ends(saved, changed)
    if refused:
        raise CheckpointError(
            f"{name}: {directory} is of another model ({', '.join(refused)}); use the values in "
            "its recipe, or leave run.continue_from out to train from the beginning"
        )
    trained, given = RunState.read(directory).latents_sha256, latents_sha256(recipe, meta)
    if trained is not None and given is not None and trained != given:
        raise CheckpointError(
            f"{name}: {directory} was trained on latents of the autoencoder of sha256 "
            f"{trained[:12]}…, the data has latents of {given[:12]}…; encode the data with the "
            "former autoencoder"
        )


def latents_sha256(recipe: Recipe, meta: StoreMeta) -> str | None:
    """Fingerprint of the autoencoder whose latents the recipe trains on, stored or on the fly.

    Args:
        meta: description of one of its stores, which all have the same autoencoder.
    """
    if recipe.model.kind != "calm" or not recipe.model.has_latents:
        return None
    stored = meta.autoencoder
    return encoder_sha256(recipe) or (None if stored is None else stored.sha256)


def _newest_readable(directories: Sequence[Path]) -> tuple[Path | None, Recipe | None]:
    """The newest checkpoint whose recipe and state are intact, whatever the rest is."""
    for directory in directories:
        # Loading reports a damaged checkpoint and passes over it.
        with suppress(UserError, OSError):
            checkpoints.verify_description(directory)
            RunState.read(directory)
            return directory, load_recipe(directory / checkpoints.RECIPE_FILE)
    return None, None


def _check_tokenizer(directory: Path, recipe: Recipe, remedy: str) -> StoreMeta:
    """The description of the data's store; CheckpointError if a checkpoint has other tokens."""
    trained = RunState.read(directory).tokenizer_sha256
    path = recipe.data.sources[0].path
    meta = read_meta(path, Downloads.of(recipe.data))
    given = meta.tokenizer.sha256
    if trained not in (None, given):
        raise CheckpointError(
            f"{directory / checkpoints.STATE_FILE}: written with the tokenizer of sha256 "
            f"{trained[:12]}…, but {path} was made with {given[:12]}…; use data of the same "
            f"tokenizer, or {remedy}"
        )
    return meta


def _changed(saved: Recipe, recipe: Recipe) -> dict[str, str]:
    """``name: before -> now`` for each field that differs, by its dotted name, with secrets masked
    as in the recipe of a checkpoint."""
    before, now = (_fields(redact_values(one.to_dict())) for one in (saved, recipe))
    # Paths may change: the autoencoder is identified by its fingerprint.
    names = sorted((before.keys() | now.keys()) - {"run.dir", "model.autoencoder"})
    return {
        n: f"{n}: {before.get(n)} -> {now.get(n)}" for n in names if before.get(n) != now.get(n)
    }


def _fields(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """All fields by their dotted names."""
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            fields |= _fields(value, f"{prefix}{name}.")
        else:
            fields[f"{prefix}{name}"] = value
    return fields
