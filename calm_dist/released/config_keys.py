"""Keys of a released ``config.json`` that have no field in a recipe.

A key is read, or known not to change what the model computes, or has a single value that this
model supports. Any other key is refused, since ignoring it could give a different model from the
one that was trained.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from calm_dist.errors import CheckpointError, shown

# fmt: off
LABELS = frozenset((
    "architectures", "auto_map", "ae_path", "model_type", "name_or_path", "torch_dtype", "dtype",
    "use_bfloat16", "transformers_version", "initializer_range", "max_position_embeddings",
    "pretraining_tp", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
    "decoder_start_token_id", "tokenizer_class", "prefix", "is_decoder", "attn_implementation",
    "torchscript", "return_dict", "output_attentions", "output_hidden_states", "id2label",
    "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params",
    "tf_legacy_loss", "do_sample", "temperature", "top_k", "top_p", "typical_p", "min_length",
    "max_length", "num_beams", "num_beam_groups", "num_return_sequences", "repetition_penalty",
    "length_penalty", "diversity_penalty", "early_stopping", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id",
    "suppress_tokens", "begin_suppress_tokens", "remove_invalid_values",
    "exponential_decay_length_penalty", "output_scores", "return_dict_in_generate",
))
# fmt: on
"""Keys about the file, its loading, and training and generation by transformers. Keys with a
leading underscore are treated in the same way."""

NEUTRAL: Mapping[str, Any] = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "tie_encoder_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
    "sliding_window": None,
    "use_sliding_window": False,
    "qk_norm": False,
    "use_qk_norm": False,
    "qk_layernorm": False,
    "qkv_bias": False,
    "use_bias": False,
    "partial_rotary_factor": 1.0,
    "rotary_pct": 1.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "logits_scaling": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "hidden_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "quantization_config": None,
}
"""The only value that each key may have, since the model behaves as if it were set. Null, meaning
that the key is not set, is accepted as well."""

_ROPE = ("rope_parameters", "rope_scaling")
"""The keys of transformers 5 and of transformers 4."""
_ROPE_NEUTRAL = {"rope_type": "default", "type": "default", "factor": 1.0,
                 "partial_rotary_factor": 1.0}  # fmt: skip
_FULL_ATTENTION = "full_attention"


def check_keys(config: Mapping[str, Any], read: Collection[str], path: Path) -> None:
    """Refuse keys that describe, or may describe, another model.

    Args:
        read: keys that the caller uses or checks.

    Raises:
        CheckpointError: there is such a key; the message has the key and its value.
    """
    # Qwen 2 writes the size of a window even if it is not used.
    unused = {"sliding_window"} if config.get("use_sliding_window") is False else set()
    for key, value in NEUTRAL.items():
        if key not in read and key not in _ROPE and key not in unused:
            _check_neutral(key, config.get(key), value, path)
    known = {*read, *NEUTRAL, *LABELS}
    unknown = [
        key
        for key, value in config.items()
        if key not in known and not key.startswith("_") and value is not None
    ]
    if unknown:
        listed = ", ".join(f"{key} {shown(config[key])}" for key in sorted(unknown)[:5])
        raise CheckpointError(
            f"{path}: {listed}: unknown, and might change what the model computes; remove keys "
            "that do not from the file"
        )


def check_attention_kinds(config: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError if ``layer_types`` contains anything but full attention."""
    kinds = config.get("layer_types")
    if kinds is None:
        return
    if not isinstance(kinds, list) or any(kind != _FULL_ATTENTION for kind in kinds):
        raise CheckpointError(
            f"{path}: layer_types {shown(kinds)}; this model has only {_FULL_ATTENTION!r}"
        )


def rope_theta(config: Mapping[str, Any], default: float, path: Path) -> Any:
    """The base of the positions, which may be in three places; its type is not checked.

    Raises:
        CheckpointError: the places disagree, or one asks for scaled positions.
    """
    found = {"rope_theta": config.get("rope_theta")}
    for key in _ROPE:
        values = config.get(key)
        if values is None:
            continue
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: {key} {shown(values)} is not an object of its fields")
        for name, value in values.items():
            if name == "rope_theta":
                found[f"{key}.{name}"] = value
            elif value is not None:
                _check_neutral(f"{key}.{name}", value, _ROPE_NEUTRAL.get(name), path)
    stated = {key: value for key, value in found.items() if value is not None}
    if not stated:
        return default
    values = list(stated.values())
    if any(value != values[0] for value in values):
        listed = ", ".join(f"{key} {shown(value)}" for key, value in stated.items())
        raise CheckpointError(f"{path}: {listed} disagree; keep only the one used in training")
    return values[0]


def _check_neutral(key: str, found: Any, value: Any, path: Path) -> None:
    if found is None or found == value or (found is False and value is None):
        return
    only = "this model has no such field" if value is None else f"this model has only {value!r}"
    raise CheckpointError(f"{path}: {key} {shown(found)}; {only}")
