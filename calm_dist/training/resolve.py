"""Complete a recipe from the files it names: the data store and the autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from calm_dist.data.download import Downloads
from calm_dist.data.store import StoreMeta, read_meta
from calm_dist.data.store_plan import check_autoencoder_tokenizer
from calm_dist.errors import CheckpointError, DataError, RecipeError, shown
from calm_dist.files import file_sha256
from calm_dist.recipe import AutoencoderSize, Recipe, load_recipe
from calm_dist.released.files import CONFIG_FILE, read_config, weights_file
from calm_dist.runs.checkpoints import RECIPE_FILE, find_checkpoint, run_directory
from calm_dist.text.tokenizer import Tokenizer, load_tokenizer

KindOfRecipe = TypeVar("KindOfRecipe", bound=Recipe)


def resolve(recipe: KindOfRecipe, *, missing_stores: bool = False) -> KindOfRecipe:
    """The recipe with absent fields filled in from its stores and autoencoder.

    Args:
        missing_stores: ignore stores that do not exist (for a dry run).

    Raises:
        DataError: a store is missing or damaged.
        RecipeError: a store or the autoencoder does not fit the recipe.
        CheckpointError: the autoencoder's checkpoint is damaged.
    """
    autoencoder = named_autoencoder(recipe)
    if autoencoder is not None and not missing_stores and not Path(autoencoder).is_dir():
        raise RecipeError(
            f"model.autoencoder: {autoencoder}: no such directory; give a "
            "run directory or a checkpoint, or leave it out to use the store's autoencoder"
        )
    for source in recipe.data.sources:
        if missing_stores and "://" not in source.path and not Path(source.path).exists():
            continue
        meta = read_meta(source.path, Downloads.of(recipe.data))
        recipe = recipe.with_store(meta.to_dict())
        _check_token_names(recipe, source.path, meta)
        _check_autoencoder(recipe, meta)
    return with_autoencoder_shape(recipe)


def named_autoencoder(recipe: Recipe) -> str | None:
    """``model.autoencoder`` of a model that uses it; otherwise None."""
    model = recipe.model
    return model.autoencoder if model.kind == "calm" and model.has_latents else None


def with_autoencoder_shape(recipe: KindOfRecipe) -> KindOfRecipe:
    """Fill in the autoencoder's shape if its checkpoint exists."""
    autoencoder = named_autoencoder(recipe)
    if autoencoder is None or not Path(autoencoder).is_dir():
        return recipe
    directory = autoencoder_directory(autoencoder)
    # A released configuration may omit sizes that equal the paper's.
    config = {"patch_size": 4, **AutoencoderSize().model_dump(), **read_config(directory)}
    if missing := {"vocab_size", "latent_size"} - config.keys():
        raise CheckpointError(
            f"{directory / CONFIG_FILE}: has no {', '.join(sorted(missing))}; it is not the "
            "configuration of an autoencoder"
        )
    return recipe.with_autoencoder(config)


def autoencoder_directory(path: str | Path) -> Path:
    """The directory with ``config.json`` and weights that ``path`` stands for: itself, or the
    newest valid checkpoint of a run.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    return path if (path / CONFIG_FILE).is_file() else find_checkpoint(path)


def autoencoder_tokenizer(
    directory: str | Path,
    given: str | Path | None = None,
    begin_token: str | None = None,
    end_token: str | None = None,
) -> Tokenizer:
    """The tokenizer that an autoencoder was trained with: the file that its recipe names, or a copy
    beside it or in its run directory.

    Args:
        directory: from `autoencoder_directory`.
        given: the file, if it is known.
        begin_token, end_token: its tokens around documents, where the recipe does not name them.

    Raises:
        DataError: there is none.
    """
    directory = Path(directory)
    recipe, run = directory / RECIPE_FILE, run_directory(directory)
    data = load_recipe(recipe).data if recipe.is_file() else None
    names = (begin_token, end_token)
    candidates = []
    if data is not None:
        names = (data.begin_token or begin_token, data.end_token or end_token)
    if given is not None:
        return load_tokenizer(given, *names)
    if data is not None:
        candidates += [Path(data.tokenizer)] if data.tokenizer else []
    places = [directory, run] if run else [directory]
    candidates += [place / n for place in places for n in ("tokenizer.json", "tokenizer.model")]
    for candidate in candidates:
        if candidate.is_file():
            return load_tokenizer(candidate, *names)
    raise DataError(f"{directory}: its tokenizer is not known; give the file with --tokenizer")


def encoder_sha256(recipe: Recipe) -> str | None:
    """Fingerprint of the autoencoder that encodes on the fly; None if none does."""
    autoencoder = named_autoencoder(recipe)
    if recipe.data.latents != "on_the_fly" or autoencoder is None:
        return None
    return file_sha256(weights_file(autoencoder_directory(autoencoder)))


def _check_token_names(recipe: Recipe, path: str, meta: StoreMeta) -> None:
    """Check the recipe's begin and end tokens against a store that does not name them, as stores of
    earlier versions."""
    for role in ("begin", "end"):
        name = getattr(recipe.data, f"{role}_token")
        if name is None or getattr(meta.tokenizer, f"{role}_token") is not None:
            continue
        file = Path(path) / meta.tokenizer.file
        if not file.is_file():
            raise RecipeError(
                f"data.{role}_token: {shown(name)}, but {path} does not say whether it was made "
                "with that token; leave the field out, or encode the corpus again"
            )
        names = (recipe.data.begin_token, recipe.data.end_token)
        number = getattr(load_tokenizer(file, *names), f"{role}_id")
        stored = getattr(meta.tokenizer, f"{role}_id")
        if number != stored:
            raise RecipeError(
                f"data.{role}_token: {shown(name)} is token {number}, but {path} was made with "
                f"token {stored}; leave the field out, or encode the corpus again"
            )


def _check_autoencoder(recipe: Recipe, meta: StoreMeta) -> None:
    """Check that tokens and latents belong to the recipe's autoencoder, if its files exist."""
    autoencoder = named_autoencoder(recipe)
    if autoencoder is None or not Path(autoencoder).is_dir():
        return
    directory = autoencoder_directory(autoencoder)
    check_autoencoder_tokenizer(directory, meta.tokenizer.sha256, "data.path")
    if meta.autoencoder is None:
        entries = read_config(directory).get("vocab_size", 0)
        if entries < meta.vocab_size:
            raise RecipeError(
                f"model.autoencoder: {autoencoder} knows {entries} tokens, the store has "
                f"{meta.vocab_size}; give an autoencoder for the store's tokenizer"
            )
        return
    found = file_sha256(weights_file(directory))
    if found != meta.autoencoder.sha256:
        raise RecipeError(
            f"model.autoencoder: {autoencoder} has sha256 {found[:12]}…, the store was "
            f"encoded by {meta.autoencoder.sha256[:12]}…; give that autoencoder, or encode again"
        )
