"""Released directories in all their forms: read to the bit, or refused with what is wrong."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from released import (
    BIN,
    GOLDEN,
    SAFE,
    Tensors,
    assert_is_golden,
    copy_released,
    edit_config,
    edit_weights,
    refused,
    tensors_of,
)
from safetensors.torch import load_file, save_file

from calm_dist.errors import CheckpointError, UserError
from calm_dist.interop.huggingface import load_autoencoder, load_calm
from calm_dist.recipe import CalmModel
from calm_dist.released.names import to_released


@pytest.fixture
def calm(tmp_path: Path) -> Path:
    """A copy of a released language model and its autoencoder that a test may change."""
    return copy_released(tmp_path)


def write_shards(directory: Path, suffix: str) -> Path:
    """Spread the weights over three files; returns the index."""
    weights = tensors_of(directory)
    (directory / BIN).unlink()
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    placed: dict[str, str] = {}
    for number in range(3):
        name = f"{stem}-{number + 1:05}-of-00003{suffix}"
        part = {key: weights[key].clone() for key in sorted(weights)[number::3]}
        if suffix == ".safetensors":
            save_file(part, directory / name)
        else:
            torch.save(part, directory / name)
        placed |= dict.fromkeys(part, name)
    index = directory / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}), encoding="utf-8")
    return index


def test_single_pickle(calm: Path) -> None:
    assert_is_golden(calm)


def test_single_safetensors(calm: Path) -> None:
    save_file({n: t.clone() for n, t in tensors_of(calm).items()}, calm / SAFE)
    (calm / BIN).unlink()
    assert_is_golden(calm)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_shards(calm: Path, suffix: str) -> None:
    write_shards(calm, suffix)
    assert_is_golden(calm)


def test_old_pickle_format(calm: Path) -> None:
    torch.save(tensors_of(calm), calm / BIN, _use_new_zipfile_serialization=False)
    assert_is_golden(calm)


@pytest.mark.parametrize(
    "lost",
    [
        "mlp_generator.",
        "generative_head.",
        "ae_model.decoder.lm_head_weight",
        "ae_model.encoder.embed_tokens.weight",
    ],
)
@pytest.mark.parametrize("has_directory", [True, False])
def test_tied_weights_are_restored(calm: Path, lost: str, has_directory: bool) -> None:
    edit_weights(calm, lambda w: [w.pop(name) for name in list(w) if name.startswith(lost)])
    if not has_directory:
        shutil.rmtree(calm.parent / "ae_k4")
    assert_is_golden(calm)


@pytest.mark.parametrize("name", ["decoder.lm_head_weight", "encoder.embed_tokens.weight"])
def test_autoencoder_lost_a_tied_weight(calm: Path, name: str) -> None:
    directory = calm.parent / "ae_k4"
    expected = tensors_of(directory)["encoder.embed_tokens.weight"]
    edit_weights(directory, lambda w: w.pop(name))
    assert torch.equal(load_autoencoder(directory).encoder.embed_tokens.weight, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_fp32(calm: Path, dtype: torch.dtype) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in tensors_of(calm).items()}
    torch.save(weights, calm / BIN)
    model = load_calm(calm)
    parts = (model.backbone, model.head)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}
    assert isinstance(model.recipe.model, CalmModel)
    released = to_released(model.recipe.model, dict(model.backbone.named_parameters()))
    for name, tensor in released.items():
        assert torch.equal(tensor, weights[name].float()), name


def test_model_survives_its_files(calm: Path) -> None:
    """Files are mapped while they are read; later changes of them must not reach the model."""
    model = load_calm(calm)
    assert model.autoencoder is not None
    tokens = load_file(calm / "io.safetensors")["input_ids"]
    before = model.hidden(tokens), model.autoencoder.encode(tokens)[0]
    for directory in (calm, calm.parent / "ae_k4"):
        with (directory / BIN).open("r+b") as file:
            file.write(bytes(200_000))
    assert torch.equal(model.hidden(tokens), before[0])
    assert torch.equal(model.autoencoder.encode(tokens)[0], before[1])


def test_grouped_queries(calm: Path) -> None:
    """A model whose heads share keys equals the one in which each head has its own copy."""
    tokens = load_file(calm / "io.safetensors")["input_ids"]
    names = [f"transformer.layers.{n}.self_attn.{k}_proj.weight" for n in range(3) for k in "kv"]

    def keep_two_heads(weights: Tensors) -> None:
        for name in names:
            weights[name] = weights[name][:16].clone()

    def repeat(weights: Tensors) -> None:
        for name in names:
            # Heads 0 and 1 use the first, 2 and 3 the second.
            weights[name] = weights[name].view(2, 1, 8, -1).expand(2, 2, 8, -1).reshape(32, -1)

    edit_config(calm, num_key_value_heads=2)
    edit_weights(calm, keep_two_heads)
    grouped = load_calm(calm)
    assert isinstance(grouped.recipe.model, CalmModel)
    assert grouped.recipe.model.num_key_value_heads == 2
    released = to_released(grouped.recipe.model, dict(grouped.backbone.named_parameters()))
    assert all(torch.equal(released[name], tensors_of(calm)[name]) for name in names)
    hidden = grouped.hidden(tokens)

    edit_config(calm, num_key_value_heads=4)
    edit_weights(calm, repeat)
    torch.testing.assert_close(hidden, load_calm(calm).hidden(tokens), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["flow", "diffusion"])
def test_other_heads(calm: Path, kind: str) -> None:
    """Hidden size 24, as the golden heads have it; the backbone is that of K=2."""
    released = calm.with_name("other")
    shutil.copytree(GOLDEN / "calm_k2", released)
    head = load_file(GOLDEN / f"{kind}_head.safetensors")

    def replace_head(weights: Tensors) -> None:
        for name in list(weights):
            if name.startswith(("mlp_generator.", "generative_head.")):
                del weights[name]
        weights |= {f"generative_head.{name}": tensor for name, tensor in head.items()}

    edit_weights(released, replace_head)
    edit_config(released, architectures=[f"{kind.capitalize()}Transformer"])
    model = load_calm(released)
    assert dict(model.head.named_parameters()).keys() == head.keys()
    assert all(torch.equal(p, head[name]) for name, p in model.head.named_parameters())
    # The training script of the authors writes no architecture, only the kind.
    edit_config(released, architectures=None, model_type=kind)
    assert type(load_calm(released).head) is type(model.head)


def test_autoencoder_is_found(calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As given, then beside the weights, then beside their directory, then inside the weights."""
    inside = load_calm(calm).autoencoder
    assert inside is not None

    def mark(directory: Path, value: float) -> None:
        """An autoencoder that can be told by one weight."""
        directory.parent.mkdir(exist_ok=True)
        shutil.copytree(GOLDEN / "ae_k4", directory)
        edit_weights(directory, lambda w: w["encoder.norm.weight"].fill_(value))

    def found() -> float:
        autoencoder = load_calm(calm).autoencoder
        assert autoencoder is not None
        return float(autoencoder.encoder.norm.weight[0].detach())

    monkeypatch.chdir(tmp_path.parent)
    shutil.rmtree(tmp_path / "ae_k4")
    assert found() == float(inside.encoder.norm.weight[0].detach())
    mark(tmp_path / "ae_k4", 1.5)
    assert found() == 1.5
    mark(calm / "ae_k4", 2.5)
    assert found() == 2.5
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    mark(tmp_path / "here" / "ae_k4", 3.5)
    assert found() == 3.5
    edit_config(calm, ae_path="/of/another/machine/ae_k4")
    assert found() == 2.5
    mark(tmp_path / "given", 4.5)
    autoencoder = load_calm(calm, autoencoder=tmp_path / "given").autoencoder
    assert autoencoder is not None
    assert float(autoencoder.encoder.norm.weight[0].detach()) == 4.5


def test_missing_keys_and_files(calm: Path) -> None:
    edit_config(calm)
    values = json.loads((calm / "config.json").read_text())
    del values["num_mlp_layers"]
    (calm / "config.json").write_text(json.dumps(values))
    refused(calm, "config.json", "num_mlp_layers")
    (calm / "config.json").write_text("[1]")
    refused(calm, "config.json")
    (calm / "config.json").unlink()
    refused(calm, "config.json")
    shutil.copyfile(GOLDEN / "calm_k4" / "config.json", calm / "config.json")
    (calm / BIN).unlink()
    refused(calm, str(calm), BIN, SAFE)
    refused(calm.parent / "nothing", "nothing")


Q = "transformer.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("edit", "tensor"),
    [
        (lambda w: w.pop(Q), Q),
        (lambda w: w.update({"transformer.layers.3.extra": torch.zeros(2)}), "layers.3.extra"),
        (lambda w: w.update({Q: w[Q][:, :-1].clone()}), Q),
        (lambda w: w[Q][0, 0].fill_(math.nan), Q),
        (lambda w: w.update({Q: w[Q].long()}), Q),
        (lambda w: w.update({Q: "text"}), Q),
        (lambda w: w["generative_head.noise_embd.bias"].add_(1), "noise_embd.bias"),
        (lambda w: w.update({"transformer.embed_tokens.weight": torch.ones(161, 32)}), "(161, 32)"),
    ],
    ids=[
        "missing",
        "unknown",
        "shape",
        "not finite",
        "integer",
        "text",
        "tied but different",
        "vocabulary",
    ],
)
def test_weights_that_do_not_fit(
    calm: Path, edit: Callable[[Tensors], object], tensor: str
) -> None:
    weights = {name: tensor.clone() for name, tensor in tensors_of(calm).items()}
    edit(weights)
    torch.save(weights, calm / BIN)
    refused(calm, str(calm), tensor)


def test_autoencoder_weights_that_do_not_fit(calm: Path) -> None:
    directory = calm.parent / "ae_k4"
    edit_weights(directory, lambda w: w.pop("encoder.norm.weight"))
    refused(directory, str(directory), "encoder.norm.weight", load=load_autoencoder)
    shutil.copyfile(GOLDEN / "ae_k4" / BIN, directory / BIN)
    edit_config(directory, intermediate_size=63)
    refused(directory, BIN, "gate_proj", "63", load=load_autoencoder)


def test_autoencoder_of_another_model(calm: Path) -> None:
    with pytest.raises(UserError, match="patch_size"):
        load_calm(calm, autoencoder=GOLDEN / "ae_k2")
    with pytest.raises(CheckpointError, match="nowhere"):
        load_calm(calm, autoencoder=calm / "nowhere")


def test_no_autoencoder_anywhere(calm: Path) -> None:
    edit_weights(calm, lambda w: [w.pop(name) for name in list(w) if name.startswith("ae_model.")])
    assert load_calm(calm).autoencoder is not None
    shutil.rmtree(calm.parent / "ae_k4")
    refused(calm, "ae_path", "ae_k4", "--autoencoder")


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("writer", ["torch", "legacy", "pickle"])
def test_pickled_code_is_not_executed(calm: Path, tmp_path: Path, writer: str) -> None:
    weights: dict[str, Any] = {**tensors_of(calm), "bomb": Bomb(tmp_path / "exploded")}
    if writer == "pickle":
        (calm / BIN).write_bytes(pickle.dumps({"bomb": Bomb(tmp_path / "exploded")}))
    else:
        torch.save(weights, calm / BIN, _use_new_zipfile_serialization=writer == "torch")
    refused(calm, BIN, "refused")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
@pytest.mark.parametrize("form", ["single", "shards"])
def test_names_of_wrappers_are_left_out(
    calm: Path, prefix: str, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_weights(calm, lambda w: [w.update({prefix + n: w.pop(n)}) for n in list(w)])
    if form == "shards":
        write_shards(calm, ".safetensors")
    assert_is_golden(calm)
    said = capsys.readouterr().err
    assert said.count("note: ") == 1 and repr(prefix) in said and str(calm) in said


def test_names_of_wrappers_before_some_tensors(calm: Path) -> None:
    """What is not before every name is part of a name, which the message shows."""
    edit_weights(calm, lambda w: w.update({"module." + Q: w.pop(Q)}))
    refused(calm, Q, "module." + Q)


def test_autoencoder_with_names_of_wrappers(calm: Path) -> None:
    directory = calm.parent / "ae_k4"
    expected = load_autoencoder(directory).state_dict()
    edit_weights(directory, lambda w: [w.update({"_orig_mod." + n: w.pop(n)}) for n in list(w)])
    for name, tensor in load_autoencoder(directory).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "complex64", "int8"])
@pytest.mark.parametrize("name", [BIN, SAFE])
def test_types_that_no_weights_have(calm: Path, name: str, dtype: str) -> None:
    weights = tensors_of(calm) | {Q: tensors_of(calm)[Q].to(getattr(torch, dtype))}
    if name == SAFE:
        save_file({n: t.clone() for n, t in weights.items()}, calm / SAFE)
    else:
        torch.save(weights, calm / BIN)
    refused(calm, name, Q, dtype, "bfloat16")


def test_tensor_that_is_larger_than_its_file(calm: Path) -> None:
    edit_weights(calm, lambda w: w.update({Q: torch.zeros(1, 1).expand(32, 32)}))
    refused(calm, BIN, Q, "(32, 32)", "4 bytes")


def deflated(path: Path) -> None:
    """The same archive, each entry compressed."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def overlapping(path: Path) -> None:
    """Entries of which each claims the bytes of the largest one."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    largest = max(entries, key=lambda entry: entry.file_size)
    data = bytearray(path.read_bytes())
    place = data.find(b"PK\x01\x02")
    while place >= 0:
        data[place + 20 : place + 28] = struct.pack("<II", largest.file_size, largest.file_size)
        place = data.find(b"PK\x01\x02", place + 1)
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [deflated, overlapping])
def test_archives_that_grow(calm: Path, damage: Callable[[Path], None]) -> None:
    damage(calm / BIN)
    refused(calm, BIN, "refused", "memory")


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_that_grow(calm: Path, legacy: bool) -> None:
    """Hashing a key of pairs of pairs of pairs takes a step for each of its 2**60 ends."""
    key: tuple[Any, ...] = ()
    for _ in range(60):
        key = (key, key)
    # The pickler would hash it, too.
    small = pickle.dumps({0: 1}, protocol=2)
    content = small.replace(b"K\x00", pickle.dumps(key, protocol=2)[2:-1], 1)
    assert len(content) < 1000
    torch.save({0: 1}, calm / BIN, _use_new_zipfile_serialization=not legacy)
    if legacy:
        whole = (calm / BIN).read_bytes()
        assert whole.count(small) == 1
        (calm / BIN).write_bytes(whole.replace(small, content))
    else:
        with zipfile.ZipFile(calm / BIN, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("x/data.pkl", content)
            archive.writestr("x/version", "3\n")
            archive.writestr("x/byteorder", "little")
    refused(calm, BIN, "refused", "memory")


@pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), {1: torch.ones(2)}])
def test_pickle_of_something_else(calm: Path, content: object) -> None:
    torch.save(content, calm / BIN)
    refused(calm, BIN)


@pytest.mark.parametrize("name", [BIN, SAFE])
@pytest.mark.parametrize("damage", ["empty", "cut", "noise"])
def test_damaged_weights(calm: Path, name: str, damage: str) -> None:
    if name == SAFE:
        save_file({n: t.clone() for n, t in tensors_of(calm).items()}, calm / SAFE)
    data = (calm / name).read_bytes()
    damaged = {"empty": b"", "cut": data[: len(data) // 2], "noise": bytes(range(256)) * 40}
    (calm / name).write_bytes(damaged[damage])
    refused(calm, name)


@pytest.mark.parametrize(
    "name", ["../secret.bin", "/etc/secret.bin", "a/b.bin", "x.safetensors", 7]
)
def test_index_stays_in_its_directory(calm: Path, name: object) -> None:
    index = write_shards(calm, ".bin")
    content = json.loads(index.read_text())
    content["weight_map"][Q] = name
    index.write_text(json.dumps(content), encoding="utf-8")
    refused(calm, index.name, Q, repr(name))


def test_index_that_promises_too_much(calm: Path) -> None:
    index = write_shards(calm, ".safetensors")
    content = json.loads(index.read_text())
    shard = content["weight_map"][Q]
    content["weight_map"]["transformer.new"] = shard
    index.write_text(json.dumps(content), encoding="utf-8")
    refused(calm, shard, "transformer.new")
    (calm / shard).unlink()
    refused(calm, shard)
    index.write_text("{}", encoding="utf-8")
    refused(calm, index.name, "weight_map")
