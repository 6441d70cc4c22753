"""Convert ``config.json`` of the released checkpoints to and from the sections of a recipe.

Keys and defaults are those of the authors' ``CALMConfig`` and ``AutoencoderConfig``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calm_dist.errors import CheckpointError
from calm_dist.heads import HeadRecipe, Released, all_specs
from calm_dist.models.autoencoder import AutoencoderConfig
from calm_dist.recipe import CalmModel, Recipe
from calm_dist.released.config_keys import (
    NEUTRAL,
    check_attention_kinds,
    check_keys,
    rope_theta,
)
from calm_dist.released.files import CONFIG_FILE, read_config, read_json

AUTOENCODER_ARCHITECTURE = "Autoencoder"

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Keys of the authors' configurations for features that these models do not have.
_WITHOUT = {key: NEUTRAL[key] for key in ("hidden_act", "mlp_bias")}
_BACKBONE_WITHOUT = _WITHOUT | {
    key: NEUTRAL[key]
    for key in ("attention_bias", "attention_dropout", "rope_scaling", "tie_word_embeddings")
}
_WRITTEN: dict[str, Any] = {
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    # The version that the authors' classes are written for.
    "transformers_version": "4.43.0",
}
_MAX_POSITIONS = 2048
_LARGEST_NUMBER = 2**31
# Fields of backbone and head; optional ones with the authors' defaults.
_BACKBONE_KEYS = ("vocab_size", "patch_size", "latent_size", "hidden_size", "intermediate_size",
                  "num_hidden_layers", "num_attention_heads")  # fmt: skip
_BACKBONE_DEFAULTS = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "initializer_range": 0.02}
# Fields of a CALM that the layout holds elsewhere, that `HeadSpec.released` decides, or that do not
# change a trained model.
_ELSEWHERE = ("num_key_value_heads", "kind", "head", "autoencoder", "autoencoder_size",
              "latent_slots", "init")  # fmt: skip
_HEAD_DEFAULTS = {"noise_size": 64, "num_samples": 8, "beta": 1.0}
_OTHER_KEYS = ("num_mlp_layers", "num_key_value_heads", "head_dim", "rope_parameters",
               "rope_scaling", "layer_types")  # fmt: skip


def is_autoencoder(directory: str | Path) -> bool:
    """Whether a released directory holds an autoencoder and no language model."""
    config = read_config(directory)
    named = _architectures(config, Path(directory) / CONFIG_FILE)
    return AUTOENCODER_ARCHITECTURE in named or (not named and "num_encoder_layers" in config)


def calm_values(directory: str | Path) -> dict[str, Any]:
    """The contents of ``config.json`` as the ``model`` and ``data`` sections of a recipe.

    Raises:
        CheckpointError: a key is missing, or asks for something that this model does not have.
    """
    path = Path(directory) / CONFIG_FILE
    config = read_config(directory)
    kind = _head_kind(config, path)
    check_keys(config, {*_BACKBONE_KEYS, *_BACKBONE_DEFAULTS, *_HEAD_DEFAULTS, *_OTHER_KEYS}, path)
    check_attention_kinds(config, path)
    wanted = [*_BACKBONE_KEYS, "num_mlp_layers", *_released_heads()[kind].required]
    if missing := [key for key in wanted if key not in config]:
        raise CheckpointError(
            f"{path}: has no {', '.join(missing)}; it is not the configuration of a released CALM"
        )
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads")
    head_size = config.get("head_dim")
    # Check the types: in Python, text times a number is text.
    whole = isinstance(head_size, int) and isinstance(heads, int)
    if head_size is not None and not (whole and head_size * heads == config["hidden_size"]):
        raise CheckpointError(
            f"{path}: head_dim {head_size!r}; this backbone has heads of hidden_size / "
            "num_attention_heads"
        )
    positions, patch_size = (
        config.get("max_position_embeddings", _MAX_POSITIONS),
        config["patch_size"],
    )
    if not (isinstance(positions, int) and isinstance(patch_size, int) and positions > 1):
        raise CheckpointError(
            f"{path}: max_position_embeddings {positions!r}, patch_size {patch_size!r}; both must "
            "be whole numbers, with at least two patches"
        )
    model = {
        "kind": "calm",
        **{key: config[key] for key in _BACKBONE_KEYS},
        **{key: config.get(key, default) for key, default in _BACKBONE_DEFAULTS.items()},
        "rope_theta": rope_theta(config, _BACKBONE_DEFAULTS["rope_theta"], path),
        "num_key_value_heads": None if groups == heads else groups,
        "init": "released",
        "head": {
            "kind": kind,
            "num_mlp_layers": config["num_mlp_layers"],
            **{key: config.get(key, default) for key, default in _HEAD_DEFAULTS.items()},
        },
    }
    return {"model": model, "data": {"block_size": positions * patch_size}}


def calm_config(
    recipe: Recipe, token_ids: Mapping[str, int | None], ae_path: str
) -> dict[str, Any]:
    """``config.json`` of a CALM: every key of the authors' configuration.

    Args:
        recipe: with vocabulary, latent and block size filled in.
        token_ids: the known ones of `TOKEN_IDS`.
        ae_path: directory of the autoencoder.

    Raises:
        CheckpointError: the layout has no such head, or no key for a field of the model that is not
            at its default.
    """
    model = recipe.model
    assert isinstance(model, CalmModel)
    _refuse_lost_fields(model)
    head = model.head
    released = released_head(head)
    return {
        "architectures": [released.architecture],
        **({} if released.model_type is None else {"model_type": released.model_type}),
        "ae_path": ae_path,
        **{key: getattr(model, key) for key in _BACKBONE_KEYS},
        **{key: getattr(model, key) for key in _BACKBONE_DEFAULTS},
        "num_key_value_heads": model.key_value_heads,
        "num_mlp_layers": head.num_mlp_layers,
        **{key: getattr(head, key) for key in _HEAD_DEFAULTS},
        "max_position_embeddings": recipe.num_patches,
        "use_cache": True,
        **_BACKBONE_WITHOUT,
        **_WRITTEN,
        **{key: token_ids.get(key) for key in TOKEN_IDS},
    }


def _refuse_lost_fields(model: CalmModel) -> None:
    """Refuse a model whose export would compute something else, although all weights have a name.

    Raises:
        CheckpointError: names fields and values.
    """
    lost = [
        f"model.{name}={getattr(model, name)!r}"
        for name, field in type(model).model_fields.items()
        if name not in (*_BACKBONE_KEYS, *_BACKBONE_DEFAULTS, *_ELSEWHERE)
        and getattr(model, name) != field.get_default(call_default_factory=True)
    ]
    if lost:
        raise CheckpointError(
            f"{', '.join(lost)}: the authors' released layout has no key for this, so an import "
            "would be another model; such a model cannot be exported"
        )


def autoencoder_values(directory: str | Path) -> AutoencoderConfig:
    """The autoencoder that ``config.json`` describes.

    Raises:
        CheckpointError: a key is missing or wrong, or asks for something that this autoencoder does
            not have.
    """
    path = Path(directory) / CONFIG_FILE
    config = read_config(directory)
    if "vocab_size" not in config or "latent_size" not in config:
        raise CheckpointError(f"{path}: is not the configuration of an autoencoder")
    fields = {field.name: field for field in dataclasses.fields(AutoencoderConfig)}
    # As in the authors' class, the matrices are tied whatever the configuration says.
    check_keys(config, {*fields, "tie_word_embeddings"}, path)
    # The released code has a single dropout for the latent and the tokens.
    config.setdefault("token_dropout", config.get("ae_dropout", 0.15))
    values = {name: config[name] for name in fields if name in config}
    for name, value in values.items():
        _check_number(name, value, str(fields[name].type), path)
    for name in ("num_encoder_layers", "num_decoder_layers"):
        if values.get(name, 2) % 2:
            raise CheckpointError(
                f"{path}: {name} {values[name]} is odd; half of the layers work on tokens, half "
                "on patches"
            )
    try:
        return AutoencoderConfig(**values)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def autoencoder_config(
    config: AutoencoderConfig, token_ids: Mapping[str, int | None]
) -> dict[str, Any]:
    """``config.json`` of an autoencoder: every key of the authors' configuration, and ours.

    ``latent_slots`` is included only if there are slots; the authors' class does not read it.
    """
    values = dataclasses.asdict(config)
    if config.latent_slots == 1:
        del values["latent_slots"]
    return {
        "architectures": [AUTOENCODER_ARCHITECTURE],
        **values,
        "initializer_range": _BACKBONE_DEFAULTS["initializer_range"],
        "max_position_embeddings": _MAX_POSITIONS,
        **_WITHOUT,
        **_WRITTEN,
        **{key: token_ids[key] for key in TOKEN_IDS if key in token_ids},
    }


def stated_token_ids(directory: str | Path, name: str = CONFIG_FILE) -> dict[str, int | None]:
    """Those of `TOKEN_IDS` that a configuration file states.

    Raises:
        CheckpointError: one is neither a number nor a list of numbers.
    """
    path = Path(directory) / name
    config = read_json(path)
    stated = {key: config[key] for key in TOKEN_IDS if key in config}
    for key, value in stated.items():
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(number, int) and 0 <= number < 2**31 for number in ids):
            raise CheckpointError(f"{path}: {key} {value!r:.200} is not the number of a token")
    return stated


def stated_special_tokens(
    directory: str | Path, name: str = CONFIG_FILE
) -> tuple[int | None, int | None]:
    """The numbers of begin and end token that a configuration file states, for `load_tokenizer`; of
    several, the first."""
    stated: dict[str, Any] = stated_token_ids(directory, name)
    begin, end = (stated.get(key) for key in ("bos_token_id", "eos_token_id"))
    begin, end = (next(iter(v), None) if isinstance(v, list) else v for v in (begin, end))
    return begin, end


def _architectures(config: Mapping[str, Any], path: Path) -> list[str]:
    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise CheckpointError(f"{path}: architectures {named!r:.200} is not a list of names")
    return named


def _head_kind(config: Mapping[str, Any], path: Path) -> str:
    """The kind of the head: from the class that wrote the weights, else from ``model_type``."""
    named = _architectures(config, path)
    known = _released_heads()
    kinds = [kind for kind, head in known.items() if head.architecture in named]
    if kinds:
        return kinds[0]
    model_type = config.get("model_type") or None
    kinds = [kind for kind, head in known.items() if head.model_type == model_type]
    # The authors' training script also accepts "energy" as a model_type.
    kinds = kinds or [kind for kind in known if kind == model_type]
    if named or not kinds:
        raise CheckpointError(
            f"{path}: architectures {named}, model_type {model_type!r:.200}; a CALM is one of "
            f"{', '.join(head.architecture for head in known.values())}"
        )
    return kinds[0]


def _released_heads() -> dict[str, Released]:
    """The kinds of heads that the released layout supports."""
    return {kind: spec.released for kind, spec in all_specs().items() if spec.released is not None}


def released_head(head: HeadRecipe) -> Released:
    """The names of a head in the released layout.

    Raises:
        CheckpointError: the layout has no such head.
    """
    released = head.spec.released
    if released is None:
        raise CheckpointError(
            f"model.head.kind: {head.kind}; the authors' released layout has no such head, only "
            f"{', '.join(_released_heads())}"
        )
    return released


def _check_number(name: str, value: Any, kind: str, path: Path) -> None:
    """Check a field: a whole number (sizes from 1, token ids from 0) or a finite number from 0."""
    is_number = isinstance(value, int if kind == "int" else int | float)
    smallest = 1 if kind == "int" and not name.endswith("_id") else 0
    if not is_number or isinstance(value, bool) or not smallest <= value < _LARGEST_NUMBER:
        raise CheckpointError(
            f"{path}: {name} {value!r:.200} is not a valid {kind} for an autoencoder"
        )
