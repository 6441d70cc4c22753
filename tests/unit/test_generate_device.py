"""Generation in bf16, and on devices other than the CPU as far as that can be seen without one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_generate import run_tool, saved
from tiny_models import VOCAB, tiny_model

from calm_dist.inference.decoding import GreedyDecoder
from calm_dist.inference.generate import generate
from calm_dist.inference.load import load_model
from calm_dist.inference.loading import _convert
from calm_dist.inference.softmax import draw_from_softmax, draw_tokens
from calm_dist.models.autoencoder import Autoencoder, AutoencoderConfig
from calm_dist.models.heads.energy import EnergyHead
from calm_dist.recipe import HeadRecipe
from calm_dist.text.tokenizer import train_tokenizer


def test_the_tool_runs_in_bf16_and_refuses_absent_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = train_tokenizer(["abc"], VOCAB, tmp_path / "bytes.json")
    run = saved(tiny_model("transformer"), tokenizer, tmp_path / "run")
    given = ["--checkpoint", str(run), "--tokenizer", str(tokenizer.path), "--prompt", "the s"]
    given += ["--max-new-tokens", "9"]
    assert run_tool(monkeypatch, *given, "--dtype", "bf16", "--device", "cpu") == 0
    text = capsys.readouterr().out
    model = load_model(run, dtype="bf16")
    assert {p.dtype for p in model.backbone.parameters()} == {torch.bfloat16}
    assert text == f"the s{generate(model, tokenizer, 'the s', max_new_tokens=9).text}\n"
    assert run_tool(monkeypatch, *given, "--device", "cuda:7") == 2
    assert "--device=cuda:7, but torch finds 0 CUDA devices; use auto or cpu" in (
        capsys.readouterr().err
    )
    assert run_tool(monkeypatch, *given, "--device", "tpu") == 2
    assert "tpu: give auto, cpu, cuda, or cuda:N for GPU N" in capsys.readouterr().err


@pytest.mark.parametrize("head", ["energy", "flow", "diffusion", "tokens"])
def test_bf16_generates_with_every_head(head: str, tmp_path: Path) -> None:
    """Its logits or hidden states are those of fp32 to the rounding of bf16, and texts grow past
    the window."""
    tokenizer = train_tokenizer(["abc"], VOCAB, tmp_path / "bytes.json")
    tokenizer.end_id = -1
    exact, rounded = (tiny_model(head=head) for _ in range(2))
    _convert("bf16", rounded.backbone, rounded._head)
    tokens = torch.arange(32)[None] % VOCAB
    hidden, found = exact.hidden(tokens), rounded.hidden(tokens)
    assert found.dtype == torch.bfloat16
    assert (found.float() - hidden).abs().max() < 0.1 * hidden.abs().max()
    options: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 40, "seed": [1, 2]}
    made = generate(rounded, tokenizer, ["the s", ""], **options)
    assert [len(new.tokens) for new in made] == [40, 40]


def test_the_transformer_draws_from_bf16_logits() -> None:
    model = tiny_model("transformer")
    _convert("bf16", model.backbone)
    logits = model.logits(torch.tensor([[1, 2, 3]]))[:, -1]
    assert logits.dtype == torch.bfloat16
    assert draw_tokens(model, logits, 0.0, torch.zeros(1, 1)).tolist() == [[int(logits.argmax())]]


def test_sampling_stays_on_the_device() -> None:
    """Meta tensors have no values: any use of them on the host is an error, and so is mixing
    devices."""
    with torch.device("meta"):
        logits, uniform = torch.empty(5, 1000), torch.empty(5, dtype=torch.float64)
        drawn = draw_from_softmax(logits, 0.7, uniform)
        assert (drawn.device.type, drawn.shape) == ("meta", (5,))
        head = EnergyHead(HeadRecipe(num_mlp_layers=2, noise_size=4), 16, 8)
        latents = head.sample(torch.empty(3, 16), torch.empty(10, 3, 4))
        config = AutoencoderConfig(300, 4, 8, hidden_size=16, intermediate_size=16)
        decoder = GreedyDecoder(Autoencoder(config))
        patches = decoder.patch_hidden(latents.flatten(0, 1))
        tokens = decoder.tokens(decoder.token_hidden(patches, 0))
        assert (tokens.device.type, tokens.shape) == ("meta", (30,))


@pytest.mark.parametrize("temperature", [1.0, 0.3, 1e-300])
def test_cumulated_in_two_levels_a_softmax_is_the_same(temperature: float) -> None:
    """Against fp64 and numpy's search, for words from 1 to 1e-9 likely; also at the ends."""
    torch.manual_seed(0)
    logits = 4 * torch.randn(3, 5000)
    logits[:, 700:1400] = -torch.inf
    uniform = torch.cat([torch.tensor([0.0, 1 - 2**-53]), torch.rand(2000, dtype=torch.float64)])
    for row in logits:
        chances = ((row.double() - row.max()) / temperature).softmax(-1).numpy()
        bounds = chances.cumsum() / chances.sum()
        expected = bounds.searchsorted(uniform.numpy(), side="right").clip(max=4999)
        found = draw_from_softmax(row.expand(len(uniform), -1), temperature, uniform).numpy()
        assert (chances[found] > 0).all()
        # Numbers beside a bound may fall on the other side of it.
        distance = np.abs(np.subtract.outer(uniform.numpy(), bounds)).min(-1)
        assert (found == expected)[distance > 1e-6].all()
        assert (distance <= 1e-6).mean() < 0.05


@pytest.mark.parametrize("supported", [False, True])
def test_a_cpu_without_int8_products_is_told(
    supported: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: supported)
    config = AutoencoderConfig(300, 4, 8, hidden_size=16, intermediate_size=16)
    with caplog.at_level(logging.INFO):
        decoder = GreedyDecoder(Autoencoder(config).requires_grad_(False))
    assert ("AVX-512 VNNI" in caplog.text) != supported
    hidden = torch.randn(40, 16)
    assert decoder.tokens(hidden).tolist() == (hidden @ decoder._weight.T).argmax(-1).tolist()
