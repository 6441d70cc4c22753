"""tools/encode_text.py: text to vectors and back."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import VOCAB, tiny_model

from calm_dist.data import text_vectors
from calm_dist.data.text_vectors import TextVectors, decode_vectors, encode_text
from calm_dist.errors import DataError
from calm_dist.models.autoencoder import Autoencoder
from calm_dist.released.autoencoder import save_autoencoder
from calm_dist.text.tokenizer import Tokenizer, train_tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "encode_text.py"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return train_tokenizer(["abc"], VOCAB, tmp_path / "tokenizer.json")


def copying() -> Autoencoder:
    """Encodes a patch of one token so that its decoder returns it: the latent is the embedding."""
    model = tiny_model(patch_size=1).autoencoder
    assert model is not None
    torch.manual_seed(0)
    for layers in (model.encoder.encoder_layers, model.decoder.decoder_layers):
        for layer in layers:
            layer.mlp.down_proj.weight.zero_()  # type: ignore[operator,union-attr]
    size, latent = model.config.hidden_size, model.config.latent_size
    model.output_weight.copy_(torch.nn.functional.normalize(torch.randn(VOCAB, size)))
    model.output_weight[:, latent:] = 0
    model.output_weight.copy_(torch.nn.functional.normalize(model.output_weight))
    eye = torch.eye(latent, size)
    for linear, weight in (
        (model.encoder.squeeze_layer, torch.eye(size)),
        (model.encoder.hidden_to_latent, torch.cat([eye, torch.zeros_like(eye)])),
        (model.decoder.latent_to_hidden, eye.T),
        (model.decoder.expand_layer, torch.eye(size)),
    ):
        linear.weight.copy_(weight)
        linear.bias.zero_()
    model.encoder.hidden_to_latent.bias[latent:] = -20
    return model


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(TOOL), run_name="__main__")
    return int(end.value.code or 0)


def test_vectors_are_the_encoders(tokenizer: Tokenizer) -> None:
    model = tiny_model().autoencoder
    assert model is not None
    vectors = encode_text(model, tokenizer, "the sea")
    # One begin token fills the first of two patches.
    tokens = [tokenizer.begin_id, *tokenizer.encode("the sea")]
    mean, log_std = model.encode(torch.tensor([tokens]))
    assert np.array_equal(vectors.mean, mean[0].numpy())
    assert np.array_equal(vectors.log_std, log_std[0].numpy())
    expected = model.decode(mean)[0].argmax(-1).tolist()
    assert decode_vectors(model, tokenizer, vectors.mean) == tokenizer.decode(expected)
    assert encode_text(model, tokenizer, "").mean.shape == (0, 6)
    assert decode_vectors(model, tokenizer, np.empty((0, 6), np.float32)) == ""
    noise = (vectors.sample(0) - vectors.mean) / np.exp(vectors.log_std)
    normal = np.random.default_rng(0).standard_normal(noise.shape, np.float32)
    np.testing.assert_allclose(noise, normal, atol=1e-3)
    with pytest.raises(DataError, match=r"vectors \(2, 5\): the autoencoder's are \[patches, 6\]"):
        decode_vectors(model, tokenizer, np.zeros((2, 5), np.float32))


def test_a_text_is_encoded_in_pieces(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their size, and whether or not it divides the text, to the same vectors."""
    model = tiny_model().autoencoder
    assert model is not None
    text = "the sea and the sky " * 5
    whole = encode_text(model, tokenizer, text)
    lengths: list[int] = []
    encode = model.encode
    model.encode = lambda tokens: lengths.append(tokens.shape[1]) or encode(tokens)  # type: ignore[method-assign,func-returns-value]
    for patches in (1, 5, 7, 25):
        monkeypatch.setattr(text_vectors, "_PATCHES_AT_ONCE", patches)
        lengths.clear()
        found = encode_text(model, tokenizer, text)
        assert max(lengths) == patches * model.patch_size
        # A product of few rows may add in another order.
        np.testing.assert_allclose(found.mean, whole.mean, atol=1e-6, rtol=1e-5)
        np.testing.assert_allclose(found.log_std, whole.log_std, atol=1e-6, rtol=1e-5)


def test_text_to_vectors_to_text(
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "ae").mkdir()
    save_autoencoder(copying(), tmp_path / "ae", {})
    common: list[str | Path] = ["--autoencoder", tmp_path / "ae", "--device", "cpu"]
    assert run(monkeypatch, *common, "--text", "the sea") == 2
    assert "its tokenizer is not known; give the file with --tokenizer" in capsys.readouterr().err
    (tmp_path / "ae" / "tokenizer.json").write_bytes(tokenizer.path.read_bytes())
    text, file = "The sea, é and 海.\n", tmp_path / "text.txt"
    file.write_text(text)
    vectors = tmp_path / "sea.npz"
    assert run(monkeypatch, *common, "--file", file, "--out", vectors, "--json", "-") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["restored"] == text and facts["vectors"] == len(text.encode())
    assert run(monkeypatch, *common, "--vectors", vectors) == 0
    assert capsys.readouterr().out == text + "\n"
    assert run(monkeypatch, *common, "--vectors", vectors, "--sample", "1") == 0
    assert capsys.readouterr().out == text + "\n"
    assert np.load(vectors)["mean"].shape == (len(text.encode()), 6)
    changed = TextVectors.load(vectors)
    np.savez(vectors, mean=changed.mean[::-1])
    assert run(monkeypatch, *common, "--vectors", vectors) == 0
    assert capsys.readouterr().out.startswith("\n.")


@pytest.mark.parametrize("content", [b"", b"PK damaged", b"text"])
def test_damaged_vectors(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "v.npz"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"v\.npz: cannot be read as vectors"):
        TextVectors.load(file)
    np.savez(file, mean=np.zeros(3))
    with pytest.raises(DataError, match="mean \\(3,\\)"):
        TextVectors.load(file)
    np.savez(file, other=np.zeros(3))
    with pytest.raises(DataError, match="cannot be read as vectors"):
        TextVectors.load(file)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_spreads_that_are_no_numbers(value: float, tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", mean=np.zeros((1, 2)), log_std=np.full((1, 2), value))
    with pytest.raises(DataError, match="log_std finite or -inf"):
        TextVectors.load(tmp_path / "v.npz")


def test_tokens_around_documents_can_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As for a tokenizer that has one special token, whose name says nothing."""
    tokenizer = train_tokenizer(["abc"], VOCAB, tmp_path / "tokenizer.json")
    text = tokenizer.path.read_text()
    for role in ("begin", "end", "pad"):
        text = text.replace(f"<|{role}|>", f"<|{role[0]}x|>")
    tokenizer.path.write_text(text)
    (tmp_path / "ae").mkdir()
    save_autoencoder(copying(), tmp_path / "ae")
    common = ("--autoencoder", tmp_path / "ae", "--tokenizer", tokenizer.path, "--text", "ab")
    assert run(monkeypatch, *common) == 2
    assert "--begin-token" in capsys.readouterr().err
    assert run(monkeypatch, *common, "--begin-token", "<|bx|>", "--end-token", "<|ex|>") == 0
    assert capsys.readouterr().out.strip() == "ab"
