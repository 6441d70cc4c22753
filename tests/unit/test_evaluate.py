"""Evaluation of models whose scores have a closed form."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from calm_dist.data.store import StoreMeta
from calm_dist.errors import DataError, UserError
from calm_dist.evaluation import evaluate as evaluation
from calm_dist.evaluation.evaluate import EvaluationSettings, evaluate
from calm_dist.recipe import Recipe

VOCAB, K, BLOCK = 32, 4, 24
TOKENIZER, AUTOENCODER, FINGERPRINT = "a" * 64, "b" * 64, "d" * 64


class TinyStore(list):
    """Blocks of patches [c, c, c, c]; each latent is the patch itself, with no spread."""

    def __init__(self, blocks: int, patch_size: int = K) -> None:
        rng = np.random.default_rng(0)
        values = rng.integers(0, VOCAB - 1, (blocks, BLOCK // patch_size))
        super().__init__(
            {
                "tokens": np.repeat(row, patch_size).astype(np.uint32),
                "mean": np.repeat(row[:, None], patch_size, 1).astype(np.float16),
                "log_std": np.full((len(row), patch_size), -20, np.float16),
            }
            for row in values
        )
        self.meta = StoreMeta.model_validate(
            {
                "variant": "fp16",
                "block_size": BLOCK,
                "patch_size": patch_size,
                "latent_size": patch_size,
                "vocab_size": VOCAB,
                "tokenizer": {
                    "sha256": TOKENIZER,
                    "file": "tokenizer.json",
                    "begin_id": 29,
                    "end_id": 30,
                    "pad_id": 31,
                },
                "autoencoder": {"sha256": AUTOENCODER, "file": "runs/autoencoder"},
                "corpus_sha256": "c" * 64,
                "seed": 0,
                "num_blocks": blocks,
                "num_tokens": blocks * BLOCK,
                "fingerprint": FINGERPRINT,
            }
        )


def recipe(kind: str, **model: int) -> Recipe:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    return Recipe.from_dict(
        {
            "run": {"dir": "runs/calm"},
            "model": {"kind": kind, **sizes, **model},
            "data": {"path": "latents/train", "block_size": BLOCK},
            "training": {"steps": 20, "micro_batch_size": 1, "global_batch_size": 1},
        }
    )


class OneHotAutoencoder:
    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        mean = tokens.reshape(len(tokens), -1, K).float()
        return mean, torch.full_like(mean, -20)

    def decode(self, latents: Tensor) -> Tensor:
        tokens = latents.round().long().clamp(0, VOCAB - 1)
        return torch.nn.functional.one_hot(tokens.flatten(1), VOCAB).float()


class MostlyRightHead:
    """The latent of the hidden state, all of it plus one in a quarter of the samples."""

    def draw_noise(self, generator: torch.Generator, num_samples: int, positions: int) -> Tensor:
        return torch.rand(num_samples, positions, 1, generator=generator) - 0.5

    def sample(self, hidden: Tensor, noise: Tensor) -> Tensor:
        return hidden + (noise > 0.25)


def clairvoyant_calm(patch_size: int = K) -> Any:
    """A CALM whose hidden states are the next patches."""

    def hidden(tokens: Tensor) -> Tensor:
        return tokens.reshape(len(tokens), -1, patch_size).roll(-1, 1).float()

    return SimpleNamespace(
        kind="calm",
        recipe=recipe("calm", patch_size=patch_size, latent_size=patch_size),
        device=torch.device("cpu"),
        checkpoint=Path("runs/calm/checkpoints/step_00000020"),
        step=20,
        tokens_seen=4096,
        tokenizer_sha256=TOKENIZER,
        autoencoder_sha256=AUTOENCODER,
        autoencoder=OneHotAutoencoder(),
        head=MostlyRightHead(),
        hidden=hidden,
    )


def uniform_transformer() -> Any:
    def logits(tokens: Tensor, positions: Any = None, mask: Any = None) -> Tensor:
        return torch.zeros(*tokens.shape, VOCAB)

    model = clairvoyant_calm()
    model.kind, model.logits = "transformer", logits
    model.recipe = recipe("transformer")
    return model


def test_calm_scores_have_their_closed_form() -> None:
    """A sample is right with probability 3/4 as a whole: Brier-n = 2·3/4 - (9 + 1)/16 for every n.

    Within 4.5 standard errors (6.8e-6 to fail by chance, times four dependent values).
    """
    result = evaluate(clairvoyant_calm(), TinyStore(60), EvaluationSettings(samples=6))
    assert result["brier"] == pytest.approx([0.875] * 4, abs=4.5 * result["brier_stderr"][0])
    assert result["brierlm"] == pytest.approx(87.5, abs=4.5 * result["brierlm_stderr"])
    # Per position 0.106 with six draws, five positions in each of 60 blocks.
    assert 0.3 < result["brierlm_stderr"] < 1.5
    # Samples lie at distance 0 or 2: E‖x-x'‖ - 2 E‖x-z‖ = 2 · 3/8 - 2 · 2/4 = -1/4.
    assert result["energy_loss"] == pytest.approx(0.25, abs=0.05)
    assert result["reconstruction_accuracy"] == result["reconstruction_accuracy_mean"] == 1.0
    assert result["protocol"] == {
        "block_size": 24,
        "patch_size": 4,
        "samples": 6,
        "alignment": "patch",
        "blocks": 60,
        "positions": 300,
    }
    assert (result["step"], result["tokens_seen"]) == (20, 4096)
    assert result["data_fingerprint"] == FINGERPRINT
    assert json.loads(json.dumps(result)) == result


def test_tokens_only_stores_are_encoded_on_the_fly() -> None:
    stored, tokens_only = TinyStore(3), TinyStore(3)
    for block in tokens_only:
        del block["mean"], block["log_std"]
    settings = EvaluationSettings(samples=4)
    assert evaluate(clairvoyant_calm(), stored, settings) == evaluate(
        clairvoyant_calm(), tokens_only, settings
    )


def test_transformer_scores_have_their_closed_form() -> None:
    result = evaluate(uniform_transformer(), TinyStore(3), EvaluationSettings(samples=2))
    # P(y) = P(a=b) = V^-n, whatever is drawn.
    assert result["brier"] == pytest.approx([VOCAB**-n for n in (1, 2, 3, 4)])
    assert result["cross_entropy"] == pytest.approx(math.log(VOCAB))
    assert result["perplexity"] == pytest.approx(VOCAB)
    assert result["protocol"]["positions"] == 15 and result["protocol"]["patch_size"] == 4


def test_blocks_are_spaced_and_their_draws_do_not_depend_on_the_others() -> None:
    store = TinyStore(9)
    asked: list[int] = []

    class Watched(TinyStore):
        def __getitem__(self, number: Any) -> Any:
            asked.append(number)
            return super().__getitem__(number)

    watched = Watched(9)
    evaluate(uniform_transformer(), watched, EvaluationSettings(blocks=3, samples=2))
    assert asked == [0, 3, 6]
    settings = EvaluationSettings(samples=2)
    first = evaluate(clairvoyant_calm(), store, settings)
    del store[1:]
    alone = evaluate(clairvoyant_calm(), store, settings)
    store.append(store[0])
    # The same block under another number is drawn anew.
    assert evaluate(clairvoyant_calm(), store, settings)["brier"] != alone["brier"]
    assert first["brier"] != alone["brier"] and alone["brierlm_stderr"] is None
    assert "two" in alone["stderr_undefined"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tokenizer", "c" * 64, "tokenizer sha256: cccc"),
        ("autoencoder", "c" * 64, "autoencoder sha256: cccc"),
        ("vocab_size", 99, "vocab_size: 99"),
        ("patch_size", 8, "patch_size: 8"),
        ("latent_size", 8, "latent_size: 8"),
    ],
)
def test_stores_that_do_not_fit_are_refused(field: str, value: Any, message: str) -> None:
    store = TinyStore(2)
    if field in ("tokenizer", "autoencoder"):
        value = getattr(store.meta, field).model_copy(update={"sha256": value})
    store.meta = store.meta.model_copy(update={field: value})
    with pytest.raises(DataError, match=message):
        evaluate(clairvoyant_calm(), store, EvaluationSettings())


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(UserError, match=r"patch_size 2: .* at least 4"):
        evaluate(clairvoyant_calm(2), TinyStore(2, patch_size=2), EvaluationSettings())
    with pytest.raises(UserError, match="block_size 24: too short"):
        evaluate(uniform_transformer(), TinyStore(2), EvaluationSettings(alignment_stride=22))
    for settings in ({"blocks": 0}, {"samples": 1}, {"alignment_stride": 0}):
        with pytest.raises(UserError, match=next(iter(settings))):
            EvaluationSettings(**settings)


def test_results_are_recorded_once(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 20, "loss": 3.5}\n{"step": 21, "lo')  # a writer was killed
    result = evaluate(uniform_transformer(), TinyStore(2), EvaluationSettings(samples=2))
    assert evaluation.record(tmp_path, result)
    assert not evaluation.record(tmp_path, result)
    assert evaluation.record(tmp_path, {**result, "step": 40})
    assert evaluation.record(tmp_path, {**result, "data_fingerprint": "other"})
    assert evaluation.record(tmp_path, {**result, "protocol": {**result["protocol"], "samples": 9}})
    lines = metrics.read_text().splitlines()
    assert len(lines) == 6 and json.loads(lines[2]) == {"step": 20, "eval": result}


def test_run_directory_of_a_checkpoint(tmp_path: Path) -> None:
    steps = tmp_path / "checkpoints"
    (steps / "step_00000020").mkdir(parents=True)
    assert evaluation.run_directory(steps / "step_00000020") is None
    (tmp_path / "recipe.yaml").touch()
    assert evaluation.run_directory(steps / "step_00000020") == tmp_path.resolve()


def test_table_shows_scores_and_why_an_error_is_missing() -> None:
    result = evaluate(uniform_transformer(), TinyStore(1), EvaluationSettings(samples=2))
    text = evaluation.table([result])
    assert "cross_entropy 3.4657" in text and "3.12" in text
    assert "no standard error: one block" in text
