"""Scores of plain text, as the authors' script makes them, of a directory in their layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_evaluate_tool import VOCAB, evaluate, write_run
from test_generate import run_tool
from tiny_models import tiny_model

from calm_dist.errors import UserError
from calm_dist.evaluation.block_scores import draw_latents, score_latent_block
from calm_dist.evaluation.brier import NGRAM, ngram_starts
from calm_dist.evaluation.text import TextBlocks
from calm_dist.inference.generate import decode_latents
from calm_dist.interop.convert import export_checkpoint
from calm_dist.text.tokenizer import Tokenizer, train_tokenizer

TEXT = [f"a small text, number {number}: {number * number}" for number in range(60)]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return train_tokenizer(TEXT, VOCAB, tmp_path / "tokenizer.json")


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """A .json file of lines, as the authors publish theirs."""
    path = tmp_path / "documents.json"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT))
    return path


def as_the_script_cuts(tokenizer: Tokenizer, texts: list[str], block_size: int) -> np.ndarray:
    joined = [token for text in texts for token in [tokenizer.begin_id, *tokenizer.encode(text)]]
    count = len(joined) // block_size
    return np.array(joined[: count * block_size]).reshape(count, block_size)


def test_blocks_of_a_text(tokenizer: Tokenizer, lines: Path) -> None:
    expected = as_the_script_cuts(tokenizer, TEXT, 64)
    options: dict[str, Any] = {"block_size": 64, "patch_size": 4}
    blocks = TextBlocks([lines], tokenizer, protocol="published", **options)
    found = np.stack([blocks[number]["tokens"] for number in range(len(blocks))])
    assert np.array_equal(found, expected) and found.dtype == np.uint32
    assert tokenizer.end_id not in found
    own = TextBlocks([lines], tokenizer, **options)
    assert tokenizer.end_id in own[0]["tokens"]
    assert own.meta.fingerprint != blocks.meta.fingerprint
    again = TextBlocks([lines], tokenizer, protocol="published", **options)
    assert again.meta == blocks.meta
    with pytest.raises(UserError, match="fills no block of 65536 tokens"):
        TextBlocks([lines], tokenizer, block_size=65536, patch_size=4)
    with pytest.raises(UserError, match="block size 66: is not a multiple of the patch size 4"):
        TextBlocks([lines], tokenizer, block_size=66, patch_size=4)


@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_the_released_estimator_is_its_formula_on_two_draws(patch_size: int) -> None:
    """For K >= 4 from the same random numbers; for K = 2, where samples are continued, without a
    chance that they agree, and for one start less."""
    model = tiny_model(patch_size=patch_size, block_steps=12)
    tokens = torch.arange(12 * patch_size) % VOCAB
    starts = ngram_starts(len(tokens), patch_size)
    block = {"tokens": tokens.numpy().astype(np.uint32)}
    released = score_latent_block(model, block, starts, 5, seed=3, released=True).released
    assert released is not None
    generator = torch.Generator().manual_seed(3)
    known = int(starts[-1]) // patch_size + -(-NGRAM // patch_size) - 1
    hidden = model.hidden(tokens[None, : known * patch_size])[0]
    latents = draw_latents(model, hidden, 5, generator)
    one, two = decode_latents(model, latents.flatten(0, 1)).view(5, known, -1)[:2]
    targets = tokens.view(-1, patch_size)[1 : known + 1]
    if patch_size < NGRAM:
        one, two, targets = (torch.cat([x[:-1], x[1:]], dim=-1)[:-1] for x in (one, two, targets))
        assert not (one[:, :2] == two[:, :2]).all(-1).any()
    accuracy = sum((drawn == targets).float().cumprod(-1) for drawn in (one, two))
    expected = accuracy - (one == two).float().cumprod(-1)
    assert torch.equal(released.float(), expected[:, :NGRAM])


def test_a_released_directory_is_scored_as_published(
    tmp_path: Path,
    tokenizer: Tokenizer,
    lines: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, out = tmp_path / "run", tmp_path / "scores.json"
    write_run(tiny_model(vocab_size=VOCAB), run, tokenizer.fingerprint)
    export_checkpoint(run, released := tmp_path / "released")
    common: list[Any] = ["--checkpoint", released, "--text", lines, "--tokenizer", tokenizer.path]
    common += ["--device", "cpu", "--json", out]
    published = ["--protocol", "published", "--block-size", "64"]
    assert evaluate(monkeypatch, *common, *published) == 0
    printed, result = capsys.readouterr(), json.loads(out.read_text())
    assert result["protocol"]["blocks"] == len(as_the_script_cuts(tokenizer, TEXT, 64))
    scores = result["released_estimator"]
    product = float(np.prod(scores["brier"]))
    assert scores["brierlm"] == pytest.approx(100 * max(product, 0) ** 0.25)
    assert f"released script: BrierLM {scores['brierlm']:.3f}" in printed.out
    # The configuration has positions for 9 patches of 4.
    assert "scored on blocks of 64 tokens" in result["block_size_note"]
    assert "warning: scored on blocks of 64 tokens" in printed.out
    assert not list(released.glob("metrics*"))

    # A run, by the protocol of stores, at its own block size: nothing to warn of.
    common[1] = run
    assert evaluate(monkeypatch, *common) == 0
    printed, result = capsys.readouterr(), json.loads(out.read_text())
    assert result["protocol"]["block_size"] == 36 and "released_estimator" not in result
    assert "warning" not in printed.out

    # A model with probabilities has no two draws of latents.
    write_run(tiny_model("transformer", vocab_size=VOCAB), common_run := tmp_path / "transformer",
              tokenizer.fingerprint)  # fmt: skip
    common[1] = common_run
    assert evaluate(monkeypatch, *common, *published) == 0
    result, said = json.loads(out.read_text()), "no score of the released estimator"
    assert said in capsys.readouterr().out and said in result["released_estimator_note"]
    assert run_tool(
        monkeypatch, "--checkpoint", str(released), "--tokenizer", str(tokenizer.path),
        "--prompt", "a small", "--max-new-tokens", "4",
    ) == 0  # fmt: skip
    assert capsys.readouterr().out.startswith("a small")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "one of the arguments --data --text is required"),
        (["--data", "x", "--block-size", "64"], "--block-size: is for --text, not for --data"),
        (["--data", "x", "--protocol", "published"], "a store is cut into blocks already"),
        (["--text", "absent.json"], "absent.json"),
    ],
)
def test_command_line_errors(
    given: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert evaluate(monkeypatch, "--checkpoint", tmp_path, *given) == 2
    assert message in capsys.readouterr().err
