"""Convert whole checkpoints between the authors' released layout and ours.

A conversion runs in one plain process; weights are read one by one and are in memory about once.
A failed conversion leaves nothing behind.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from calm_dist.errors import CheckpointError, DataError, UserError, shown
from calm_dist.files import file_sha256
from calm_dist.inference.loading import LoadedModel, load_model, load_released, tokenizer_file
from calm_dist.models.autoencoder import Autoencoder
from calm_dist.recipe import CalmModel, Recipe, load_recipe
from calm_dist.released.autoencoder import load_autoencoder, save_autoencoder
from calm_dist.released.calm import released_calm, released_recipe
from calm_dist.released.config import (
    calm_config,
    calm_values,
    is_autoencoder,
    released_head,
    stated_special_tokens,
    stated_token_ids,
)
from calm_dist.released.files import CONFIG_FILE, RELEASED_CONFIG_FILE, weight_files
from calm_dist.released.names import released_shapes
from calm_dist.released.tensors import write_weights
from calm_dist.runs import checkpoints
from calm_dist.runs.checkpoints.run_state import RunState
from calm_dist.text.tokenizer import Tokenizer, load_tokenizer
from calm_dist.training.checkpoint import model_state
from calm_dist.training.resolve import autoencoder_directory

AUTOENCODER_DIRECTORY = "autoencoder"
AUTO_FILE = Path(__file__).parent / "auto" / "modeling_calm_dist.py"
"""The code that an exported directory carries for transformers' Auto classes."""
AUTO_HEAD = "energy"
"""The kind of head that it has."""
AUTO_MAP = {
    "AutoConfig": f"{AUTO_FILE.stem}.CalmConfig",
    "AutoModelForCausalLM": f"{AUTO_FILE.stem}.CalmForCausalLM",
}

TokenIds = Mapping[str, int | None]


def import_checkpoint(
    source: str | Path,
    target: str | Path,
    autoencoder: str | Path | None = None,
    tokenizer: str | Path | None = None,
) -> dict[str, Any]:
    """Create a run directory from a released CALM, or an autoencoder directory from a released
    autoencoder.

    The run has one checkpoint, of step 0 and with weights only: training starts from it with a
    fresh optimizer, on any layout.

    Args:
        source: released directory.
        target: new or empty directory.
        autoencoder: CALM: overrides ``ae_path``.
        tokenizer: CALM: tokenizer file; default: the one in ``source``.

    Returns:
        A JSON-able report of the conversion.

    Raises:
        UserError: a file is missing, damaged or unsuitable, or ``target`` is not empty.
    """
    source, target = Path(source), Path(target)
    if not is_autoencoder(source):
        return _import_calm(source, target, autoencoder, tokenizer)
    if autoencoder or tokenizer:
        raise UserError(
            f"{source}: is an autoencoder; it takes no --autoencoder and no --tokenizer"
        )
    model = load_autoencoder(source)
    with _written_aside(target) as partial:
        save_autoencoder(model, partial, stated_token_ids(source))
    return _report("autoencoder", source, target, _count(model), [])


def export_checkpoint(
    source: str | Path, target: str | Path, autoencoder: str | Path | None = None
) -> dict[str, Any]:
    """Write one of our CALMs or autoencoders in the layout that the authors' classes read.

    A CALM is written with its autoencoder in a subdirectory, which ``ae_path`` names, and, if it
    has an energy head, with the code that transformers' Auto classes need (``auto_map``).

    Args:
        source: run directory or checkpoint, of any layout.
        target: new or empty directory.
        autoencoder: CALM: overrides the recipe's ``model.autoencoder``.

    Returns:
        A JSON-able report of the conversion.

    Raises:
        UserError: the checkpoint is missing, damaged or unsuitable, or ``target`` is not empty.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such directory; give a run directory or a checkpoint")
    directory = autoencoder_directory(source)
    if (directory / checkpoints.MANIFEST).is_file():
        checkpoints.verify(directory)
    if not (directory / CONFIG_FILE).is_file():
        return _export_calm(directory, target, autoencoder)
    if not is_autoencoder(directory):
        raise CheckpointError(f"{directory}: is in the released layout already; copy it as it is")
    if autoencoder:
        raise UserError(f"{source}: is an autoencoder; it takes no --autoencoder")
    model = load_autoencoder(directory)
    _check_slots(model, directory)
    with _written_aside(target) as partial:
        save_autoencoder(model, partial, _token_ids_of_autoencoder(directory))
    return _report("autoencoder", directory, target, _count(model), [])


def _check_slots(model: Autoencoder, directory: Path) -> None:
    """Refuse slots: the authors' class has none, and would decode every token from the whole
    latent."""
    if model.config.latent_slots > 1:
        raise CheckpointError(
            f"{directory}: its autoencoder has model.latent_slots {model.config.latent_slots}, "
            "which the authors' released layout does not support"
        )


def _import_calm(
    source: Path, target: Path, autoencoder: str | Path | None, given: str | Path | None
) -> dict[str, Any]:
    model = load_released(source, autoencoder)
    assert model.autoencoder is not None and model.recipe.model.vocab_size is not None
    tokenizer, notes = _find_tokenizer(source, given, model.recipe.model.vocab_size)
    copied = _copied_name(tokenizer)
    recipe = released_recipe(
        source,
        run_dir=str(target),
        autoencoder=str(target / AUTOENCODER_DIRECTORY),
        tokenizer=str(target / copied) if copied else None,
    ).with_autoencoder(asdict(model.autoencoder.config))
    with _written_aside(target) as partial:
        _place_autoencoder(model, partial / AUTOENCODER_DIRECTORY, stated_token_ids(source))
        if tokenizer is not None:
            shutil.copyfile(tokenizer.path, partial / copied)
        shutil.copyfile(source / CONFIG_FILE, partial / RELEASED_CONFIG_FILE)
        (partial / checkpoints.RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
        _write_first_checkpoint(model, recipe, partial, tokenizer)
    notes.append(
        f"to continue training: tools/train.py {target / checkpoints.RECIPE_FILE} data.path=STORE "
        f"(the recipe has {recipe.data.sources[0].path}); the store's block size must be "
        f"data.block_size={recipe.block_size}"
    )
    return _report_calm(model, source, target, notes)


def _write_first_checkpoint(
    model: LoadedModel, recipe: Recipe, run_dir: Path, tokenizer: Tokenizer | None
) -> None:
    temporary = checkpoints.begin(run_dir, 0)
    model_state.save_weights(temporary, model.backbone, model.head)
    RunState(
        step=0,
        tokenizer_sha256=tokenizer.fingerprint if tokenizer else None,
        weights_only=True,
        imported_from=str(model.checkpoint),
    ).write(temporary)
    (temporary / checkpoints.RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
    checkpoints.commit(temporary, keep=1)


def _export_calm(directory: Path, target: Path, autoencoder: str | Path | None) -> dict[str, Any]:
    recipe = load_recipe(directory / checkpoints.RECIPE_FILE)
    if recipe.model.kind != "calm":
        raise CheckpointError(
            f"{directory}: model.kind {recipe.model.kind}; the released layout is for CALM and "
            "autoencoders"
        )
    released_head(recipe.model.head)
    model = load_model(directory, autoencoder=autoencoder)
    assert isinstance(model.recipe.model, CalmModel) and model.autoencoder is not None
    _check_slots(model.autoencoder, directory)
    tokenizer = _tokenizer_of(model)
    token_ids = _token_ids(checkpoints.run_directory(directory), tokenizer)
    path = str(target.resolve() / AUTOENCODER_DIRECTORY)
    config = calm_config(model.recipe, token_ids, path)
    weights = released_calm(
        model.recipe.model,
        dict(model.backbone.named_parameters()),
        dict(model.head.named_parameters()),
        model.autoencoder,
    )
    with _written_aside(target) as partial:
        if model.recipe.model.head.kind == AUTO_HEAD:
            config["auto_map"] = AUTO_MAP
            shutil.copyfile(AUTO_FILE, partial / AUTO_FILE.name)
        text = json.dumps(config, indent=2) + "\n"
        (partial / CONFIG_FILE).write_text(text, encoding="utf-8")
        write_weights(weights, partial)
        (partial / AUTOENCODER_DIRECTORY).mkdir()
        save_autoencoder(model.autoencoder, partial / AUTOENCODER_DIRECTORY, token_ids)
        if tokenizer is not None:
            shutil.copyfile(tokenizer.path, partial / _copied_name(tokenizer))
            _write_tokenizer_config(tokenizer, partial)
        notes = _not_exported(model.recipe.model, partial)
    if tokenizer is None:
        notes.append(
            "no tokenizer was found that the model is known to be trained with: copy it to "
            f"{target}, and set bos_token_id and eos_token_id in {CONFIG_FILE}"
        )
    return _report_calm(model, directory, target, notes)


def _write_tokenizer_config(tokenizer: Tokenizer, directory: Path) -> None:
    """What AutoTokenizer needs beside a ``tokenizer.json``: its class, which it cannot know from a
    model type of our own, and the tokens around documents."""
    if tokenizer.path.suffix != ".json":
        return
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": tokenizer.begin_token,
        "eos_token": tokenizer.end_token,
    }
    if tokenizer.pad_id is not None:
        config["pad_token"] = tokenizer.pad_token
    text = json.dumps(config, indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _not_exported(model: CalmModel, exported: Path) -> list[str]:
    """Notes on fields of the head that an import of the directory would not have."""
    again = type(model.head).model_validate(calm_values(exported)["model"]["head"]).model_dump()
    return [
        f"model.head.{name}: {shown(value)} has no place in the released layout; an import has "
        f"{shown(again[name])}"
        for name, value in model.head.model_dump().items()
        if value != again[name]
    ]


def _place_autoencoder(model: LoadedModel, directory: Path, token_ids: TokenIds) -> None:
    """Copy the autoencoder's files unchanged, since data stores record their sha256. An autoencoder
    that was inside the weights, or in several files, is written as a new file."""
    assert isinstance(model.recipe.model, CalmModel) and model.autoencoder is not None
    directory.mkdir()
    named = model.recipe.model.autoencoder
    if named is None:
        save_autoencoder(model.autoencoder, directory, token_ids)
        return
    found = autoencoder_directory(named)
    files = list(weight_files(found))
    if len(files) > 1:
        save_autoencoder(model.autoencoder, directory, stated_token_ids(found))
        return
    for file in (found / CONFIG_FILE, files[0]):
        shutil.copyfile(file, directory / file.name)


def _find_tokenizer(
    source: Path, given: str | Path | None, vocab_size: int
) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer to copy, and notes on a tokenizer that was found but is not used.

    Raises:
        DataError: the given tokenizer cannot be used.
    """
    path = given or tokenizer_file(source)
    if path is None:
        return None, ["no tokenizer given or found: generation needs --tokenizer"]
    try:
        tokenizer = load_tokenizer(path, *stated_special_tokens(source))
        if tokenizer.vocab_size > vocab_size:
            raise DataError(
                f"tokenizer {path}: has {tokenizer.vocab_size} entries, the model only {vocab_size}"
            )
    except DataError as error:
        if given:
            raise
        return None, [f"the tokenizer in {source} is not used ({error})"]
    return tokenizer, []


def _tokenizer_of(model: LoadedModel) -> Tokenizer | None:
    """The tokenizer that a checkpoint's recipe names, if the file exists and is unchanged."""
    path = model.recipe.data.tokenizer
    if path is None or not Path(path).is_file():
        return None
    same = model.tokenizer_sha256 in (None, file_sha256(Path(path)))
    data = model.recipe.data
    return load_tokenizer(path, data.begin_token, data.end_token) if same else None


def _token_ids(run_dir: Path | None, tokenizer: Tokenizer | None) -> TokenIds:
    """The token ids from which the run was imported, or else the tokenizer's."""
    if run_dir is not None and (run_dir / RELEASED_CONFIG_FILE).is_file():
        return stated_token_ids(run_dir, RELEASED_CONFIG_FILE)
    if tokenizer is None:
        return {}
    return {
        "bos_token_id": tokenizer.begin_id,
        "eos_token_id": tokenizer.end_id,
        "pad_token_id": tokenizer.pad_id,
    }


def _token_ids_of_autoencoder(directory: Path) -> TokenIds:
    if stated := stated_token_ids(directory):
        return stated
    recipe = directory / checkpoints.RECIPE_FILE
    data = load_recipe(recipe).data if recipe.is_file() else None
    if data is None or data.tokenizer is None or not Path(data.tokenizer).is_file():
        return {}
    return _token_ids(None, load_tokenizer(data.tokenizer, data.begin_token, data.end_token))


def _copied_name(tokenizer: Tokenizer | None) -> str:
    """The name under which `load_tokenizer` finds a copy in a directory."""
    if tokenizer is None:
        return ""
    return "tokenizer.json" if tokenizer.path.suffix == ".json" else "tokenizer.model"


def _report_calm(
    model: LoadedModel, source: Path, target: Path, notes: list[str]
) -> dict[str, Any]:
    recipe = model.recipe.model
    assert isinstance(recipe, CalmModel)
    # Without the rows that only pad our embedding table.
    of_backbone = sum(math.prod(shape) for shape in released_shapes(recipe).values())
    count = of_backbone + _count(model.head)
    return _report(f"calm with {recipe.head.kind} head", source, target, count, notes)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _report(
    kind: str, source: Path, target: Path, parameters: int, notes: list[str]
) -> dict[str, Any]:
    return {
        "kind": kind,
        "source": str(source),
        "target": str(target),
        "parameters": parameters,
        "notes": notes,
    }


@contextmanager
def _written_aside(target: Path) -> Iterator[Path]:
    """A directory that is renamed to ``target`` on success, and removed on an exception.

    Raises:
        UserError: ``target`` exists and is not empty.
    """
    target = target.resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target}: exists and is not empty; give a new directory")
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
