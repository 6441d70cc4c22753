"""``config.json`` of released directories: each field is read, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from released import assert_is_golden, copy_released, edit_config, refused
from safetensors.torch import load_file

from calm_dist.interop.huggingface import load_autoencoder, load_calm
from calm_dist.released.config import calm_values


@pytest.fixture
def calm(tmp_path: Path) -> Path:
    """A copy of a released language model and its autoencoder that a test may change."""
    return copy_released(tmp_path)


def test_further_configuration(calm: Path) -> None:
    """What config.json says reaches the backbone: base of the positions, epsilon, block size."""
    tokens = load_file(calm / "io.safetensors")["input_ids"]
    before = load_calm(calm).hidden(tokens)
    edit_config(calm, rope_theta=500, max_position_embeddings=100)
    model = load_calm(calm)
    assert model.recipe.block_size == 400
    assert not torch.allclose(model.hidden(tokens), before, atol=1e-4)
    edit_config(calm, rope_theta=10000, rms_norm_eps=0.5)
    assert not torch.allclose(load_calm(calm).hidden(tokens), before, atol=1e-3)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("tie_word_embeddings", True),
        ("attention_dropout", 0.1),
        ("head_dim", 16),
        ("num_attention_heads", 3),
        ("num_key_value_heads", 3),
        ("hidden_size", "32"),
        ("rms_norm_eps", -1.0),
        ("beta", 2.5),
        ("architectures", ["LlamaForCausalLM"]),
        ("max_position_embeddings", "many"),
    ],
)
def test_configuration_that_the_model_cannot_be(calm: Path, key: str, value: Any) -> None:
    edit_config(calm, **{key: value})
    refused(calm, "config.json", key)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("num_encoder_layers", 3),
        ("num_decoder_layers", 1),
        ("patch_size", 0),
        ("latent_size", "16"),
        ("hidden_size", 32.5),
        ("vocab_size", True),
        ("rms_norm_eps", "small"),
    ],
)
def test_configuration_that_the_autoencoder_cannot_be(calm: Path, key: str, value: Any) -> None:
    directory = calm.parent / "ae_k4"
    edit_config(directory, **{key: value})
    refused(directory, "config.json", key, load=load_autoencoder)


NEW_ROPE = {"rope_type": "default", "rope_theta": 500.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("removed", "added"),
    [
        (["rope_theta", "rope_scaling"], {"rope_parameters": NEW_ROPE}),
        (["rope_theta"], {"rope_parameters": NEW_ROPE}),
        ([], {"rope_theta": 500, "rope_parameters": NEW_ROPE}),
        ([], {"rope_theta": 500, "rope_parameters": None}),
        ([], {"rope_theta": 500, "rope_parameters": {"rope_type": "default"}}),
        ([], {"rope_theta": 500, "rope_scaling": {"type": "default", "factor": 1.0}}),
        (["rope_theta"], {"rope_scaling": NEW_ROPE}),
        ([], {"rope_theta": None, "rope_parameters": NEW_ROPE | {"partial_rotary_factor": 1.0}}),
    ],
)
def test_base_of_positions_in_every_place(
    calm: Path, removed: list[str], added: dict[str, Any]
) -> None:
    """transformers 5 writes ``rope_parameters``, 4 ``rope_theta`` and ``rope_scaling``."""
    edit_config(calm, **added)
    path = calm / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in values.items() if k not in removed}))
    assert calm_values(calm)["model"]["rope_theta"] == 500
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        values.pop(key, None)
    path.write_text(json.dumps(values))
    assert calm_values(calm)["model"]["rope_theta"] == 10000


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"rope_parameters": NEW_ROPE}, ("rope_theta 10000.0", "rope_parameters.rope_theta 500.0")),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 10000.0}}, ("rope_type", "llama3")),
        ({"rope_scaling": LLAMA3}, ("rope_scaling", "llama3")),
        ({"rope_parameters": {"type": "linear", "factor": 2.0}}, ("rope_parameters.type",)),
        ({"rope_parameters": {"factor": 2.0}}, ("rope_parameters.factor", "2.0")),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ("partial_rotary_factor", "0.5")),
        ({"rope_parameters": {"full_attention": NEW_ROPE}}, ("rope_parameters.full_attention",)),
        ({"rope_parameters": [NEW_ROPE]}, ("rope_parameters",)),
        ({"rope_parameters": {"rope_theta": "big"}, "rope_theta": None}, ("rope_theta", "big")),
        ({"sliding_window": 128}, ("sliding_window", "128")),
        ({"sliding_window": 0}, ("sliding_window", "0")),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ("layer_types",)),
        ({"use_qk_norm": True}, ("use_qk_norm",)),
        ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor",)),
        ({"attn_logit_softcapping": 50.0}, ("attn_logit_softcapping",)),
        ({"quantization_config": {"quant_method": "fp8"}}, ("quantization_config", "fp8")),
        ({"pruned_heads": {"0": [1]}}, ("pruned_heads",)),
        ({"num_experts": 8, "zeta": [1]}, ("num_experts 8", "zeta [1]", "remove")),
        ({"something_new": False}, ("something_new",)),
    ],
)
def test_fields_that_change_the_model_are_refused(
    calm: Path, changes: dict[str, Any], parts: tuple[str, ...]
) -> None:
    edit_config(calm, **changes)
    refused(calm, "config.json", *parts)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"sliding_window": 128}, ("sliding_window", "128")),
        ({"quantization_config": {"quant_method": "fp8"}}, ("quantization_config",)),
        ({"num_attention_heads": 8}, ("num_attention_heads 8",)),
        ({"rope_theta": 500.0}, ("rope_theta 500.0",)),
    ],
)
def test_fields_that_change_an_autoencoder_are_refused(
    calm: Path, changes: dict[str, Any], parts: tuple[str, ...]
) -> None:
    directory = calm.parent / "ae_k4"
    edit_config(directory, **changes)
    refused(directory, "config.json", *parts, load=load_autoencoder)


def test_fields_that_change_nothing_are_accepted(calm: Path) -> None:
    harmless = {
        "_name_or_path": "somewhere",
        "_attn_implementation": "sdpa",
        "auto_map": {"AutoModel": "modeling_energy.EnergyTransformer"},
        "dtype": "bfloat16",
        "transformers_version": "5.0.0",
        "id2label": {"0": "LABEL_0"},
        "temperature": 0.5,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "qk_norm": False,
        "partial_rotary_factor": 1.0,
        "pruned_heads": {},
        "is_decoder": False,
        "unknown_but_not_set": None,
        "layer_types": ["full_attention"] * 3,
        "head_dim": 8,
    }
    edit_config(calm, **harmless)
    no_autoencoder = {"layer_types": None, "head_dim": None}
    edit_config(calm.parent / "ae_k4", **harmless | no_autoencoder)
    assert_is_golden(calm)


@pytest.mark.parametrize(
    "text", ['{"vocab_size": NaN}', '{"vocab_size": -Infinity}', '{"rope_theta": 1e400}']
)
def test_numbers_that_json_does_not_have(calm: Path, text: str) -> None:
    (calm / "config.json").write_text(text)
    refused(calm, "config.json", text.split()[1].strip("}"))
