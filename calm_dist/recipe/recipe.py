"""Typed recipes: a YAML file and ``key=value`` overrides become one frozen, validated `Recipe`.

Precedence: defaults of the types in `recipe.sections` < the recipe file < overrides. An unknown
key, a wrong type or an impossible combination is a `RecipeError` that names the dotted field, the
value found and the remedy; all problems of a recipe are reported at once, before any process group
exists.

Neither this module nor its imports need torch.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

from pydantic import Field, ValidationError

from calm_dist.errors import RecipeError, shown
from calm_dist.files import read_bounded
from calm_dist.recipe.checks import (
    describe_validation_errors,
    impossible_combinations,
    join_problems,
)
from calm_dist.recipe.fields import RecipeFields
from calm_dist.recipe.ignored import RECIPE_FILE, leave_out_ignored
from calm_dist.recipe.overrides import apply_overrides
from calm_dist.recipe.sections import AutoencoderModel, AutoencoderSize, LanguageModel
from calm_dist.recipe.yaml_text import parse_yaml, write_yaml
from calm_dist.redact import redact_values

LARGEST_FILE = 1 << 20
"""Most bytes of a recipe file; a mixture of thousands of stores has fewer."""


class Recipe(RecipeFields):
    """A whole run: a `LanguageModelRecipe` or an `AutoencoderRecipe`.

    Made by `load_recipe` or `Recipe.from_dict`, which check it as a whole.
    """

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Recipe:
        """Make a recipe from nested mappings and check it.

        Raises:
            RecipeError: the values are not a valid recipe; the message has a line per problem.
        """
        try:
            fields = RecipeFields.model_validate(dict(values))
        except ValidationError as error:
            raise RecipeError(describe_validation_errors(error, RecipeFields)) from error
        problems = impossible_combinations(fields)
        if problems:
            raise RecipeError(join_problems(problems))
        of_autoencoder = isinstance(fields.model, AutoencoderModel)
        kind = AutoencoderRecipe if of_autoencoder else LanguageModelRecipe
        return kind.model_construct(**dict(fields))

    def to_yaml(self) -> str:
        """The resolved recipe as text; `load_recipe` reads it back to an equal recipe.

        Secrets, such as a password in the URL of a store, are masked: this text is for files, and
        a user who loads it must supply them again.
        """
        return write_yaml(redact_values(self.to_dict()))

    def with_world_size(self, world_size: int) -> Self:
        """The recipe for the number of processes that were launched.

        Raises:
            RecipeError: the layout or the batch does not fit that number.
        """
        return self._replace({"parallel": {"world_size": world_size}})

    def with_global_batch(self, blocks: int) -> Self:
        """The recipe with another number of blocks in a step of all replicas.

        Raises:
            RecipeError: the layout does not fit that number.
        """
        return self._replace({"training": {"global_batch_size": blocks}})

    def with_store(self, meta: Mapping[str, Any]) -> Self:
        """Fill absent fields from a data store's meta.json.

        ``meta`` has the keys variant, block_size, patch_size, latent_size, vocab_size,
        tokenizer {sha256, file, pad_id} and autoencoder {file} or None; ``tokenizer.file`` is
        the name of the copy inside the store. ``tokenizer`` also has begin_token and end_token,
        except in stores of earlier versions.

        Raises:
            RecipeError: recipe and store contradict each other; the message names both values.
        """
        model = self.model
        stored: dict[str, dict[str, Any]] = {
            "data": {"block_size": meta["block_size"]},
            "model": {"vocab_size": meta["vocab_size"]},
        }
        if model.kind != "transformer":
            stored["model"]["patch_size"] = meta["patch_size"]
        has_latents = model.kind == "calm" and model.has_latents
        if has_latents and meta["latent_size"] is not None:
            stored["model"]["latent_size"] = meta["latent_size"]
        if (
            model.kind == "calm"
            and has_latents
            and meta["variant"] == "tokens"
            and (model.autoencoder or (model.vocab_size or 0) > meta["vocab_size"])
        ):
            # The autoencoder decides its vocabulary, which may be larger than the store's.
            del stored["model"]["vocab_size"]
        problems = [
            f"{section}.{name}: {wanted} in the recipe, {value} in the data store; change the "
            "recipe, leave the field out where it is optional, or use another store"
            for section, fields in stored.items()
            for name, value in fields.items()
            if (wanted := getattr(getattr(self, section), name)) not in (None, value)
        ]
        problems += self._store_problems(meta)
        if problems:
            raise RecipeError(join_problems(problems))
        if (
            model.kind == "calm"
            and has_latents
            and model.autoencoder is None
            and meta["autoencoder"]
        ):
            stored["model"]["autoencoder"] = meta["autoencoder"]["file"]
        if model.kind == "autoencoder" and model.replaced_token_id is None:
            stored["model"]["replaced_token_id"] = meta["tokenizer"]["pad_id"]
        if self.data.tokenizer is None:
            file = f"{self.data.sources[0].path}/{meta['tokenizer']['file']}"
            stored["data"]["tokenizer"] = file
        for name in ("begin_token", "end_token"):
            if (token := meta["tokenizer"].get(name)) is not None:
                stored["data"][name] = token
        return self._replace(stored)

    def with_autoencoder(self, config: Mapping[str, Any]) -> Self:
        """Fill in the shape of the autoencoder checkpoint whose config.json holds ``config``.

        Raises:
            RecipeError: its patch, latent or vocabulary size contradicts the recipe, or the
                recipe's model has no autoencoder.
        """
        model, config = self.model, {"latent_slots": 1, **config}
        if model.kind != "calm":
            raise RecipeError(f"model.kind: {model.kind!r} has no autoencoder; use kind calm")
        problems = [
            f"model.{name}: {value} in the recipe, {config[name]} in the autoencoder "
            f"{model.autoencoder}; change the recipe or use another autoencoder"
            for name in ("patch_size", "latent_size", "vocab_size", "latent_slots")
            if (value := getattr(model, name)) not in (None, config[name])
        ]
        if problems:
            raise RecipeError(join_problems(problems))
        size = {name: config[name] for name in AutoencoderSize.model_fields}
        sizes = {name: config[name] for name in ("latent_size", "vocab_size")}
        if config["latent_slots"] > 1:
            # Left out if there is one, as in recipes written before the field existed.
            sizes["latent_slots"] = config["latent_slots"]
        return self._replace({"model": {"autoencoder_size": size, **sizes}})

    @property
    def reads_latents(self) -> bool:
        """Whether training reads latents from the store."""
        model = self.model
        return model.kind == "calm" and model.has_latents and self.data.latents == "stored"

    def _store_problems(self, meta: Mapping[str, Any]) -> list[str]:
        """Contradictions with a store that are not just two different numbers."""
        model = self.model
        problems = []
        if self.reads_latents and meta["variant"] == "tokens":
            problems.append(
                "data.latents: 'stored', but the store holds only tokens; encode it with "
                "tools/encode_latents.py, or set data.latents=on_the_fly"
            )
        if (
            model.kind == "autoencoder"
            and model.token_dropout > 0
            and model.replaced_token_id is None
            and meta["tokenizer"]["pad_id"] is None
        ):
            problems.append(
                "model.replaced_token_id: absent, and the tokenizer has no padding token; give "
                "the id of a token that never occurs in text, or set model.token_dropout=0"
            )
        for name in ("begin_token", "end_token"):
            wanted, stored = getattr(self.data, name), meta["tokenizer"].get(name)
            if stored is not None and wanted not in (None, stored):
                problems.append(
                    f"data.{name}: {shown(wanted)} in the recipe, {shown(stored)} in the data "
                    "store; leave the field out, or encode the corpus again with "
                    f"--{name.replace('_', '-')} {shlex.quote(wanted)}"
                )
        tokenizer = self.data.tokenizer
        if tokenizer is not None and Path(tokenizer).is_file():
            sha256 = hashlib.sha256(Path(tokenizer).read_bytes()).hexdigest()
            if sha256 != meta["tokenizer"]["sha256"]:
                problems.append(
                    f"data.tokenizer: {tokenizer} has sha256 {sha256[:12]}…, the store was made "
                    f"with {meta['tokenizer']['sha256'][:12]}…; leave the field out to use the "
                    "store's own copy, or encode the corpus again"
                )
        return problems

    def _replace(self, changes: Mapping[str, Mapping[str, Any]]) -> Self:
        """A checked copy with some fields of some sections replaced."""
        values = self.to_dict()
        for section, fields in changes.items():
            values[section].update(fields)
        return cast(Self, Recipe.from_dict(values))


class LanguageModelRecipe(Recipe):
    """A recipe that trains a CALM or a Transformer."""

    model: LanguageModel = Field(discriminator="kind")

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> LanguageModelRecipe:
        """See `Recipe.from_dict`; also refuses an autoencoder's recipe."""
        recipe = Recipe.from_dict(values)
        if not isinstance(recipe, LanguageModelRecipe):
            raise RecipeError(
                f"model.kind: {recipe.model.kind}; give the recipe of a language model, calm or "
                "transformer"
            )
        return recipe


class AutoencoderRecipe(Recipe):
    """A recipe that trains an autoencoder."""

    model: AutoencoderModel


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply ``a.b=value`` overrides (see `apply_overrides`), check the result.

    In a file named ``recipe.yaml``, as runs write it, fields that earlier versions ignored are left
    out with a warning; elsewhere they are refused.

    Raises:
        RecipeError: the file cannot be read, an override is malformed, or the recipe is wrong.
    """
    path = Path(path)
    try:
        text = read_bounded(path, LARGEST_FILE, RecipeError).decode("utf-8")
    except (OSError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise RecipeError(f"{path}: {reason}; give the path of a recipe file") from error
    values = parse_yaml(text, source=str(path))
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: not a mapping of sections; see the files in recipes/")
    if path.name == RECIPE_FILE:
        leave_out_ignored(values, str(path))
    try:
        return Recipe.from_dict(apply_overrides(values, overrides, Recipe))
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
