"""Evaluation of models whose scores have a closed form."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from calm_dist.data.store import StoreMeta
from calm_dist.data.stream import Store
from calm_dist.errors import DataError, UserError
from calm_dist.evaluation import block_scores, brier, brier_softmax
from calm_dist.evaluation import evaluate as evaluation
from calm_dist.evaluation.evaluate import EvaluationSettings, evaluate
from calm_dist.inference.decoding import GreedyDecoder
from calm_dist.inference.generate import decode_latents
from calm_dist.recipe import CalmModel, Recipe
from calm_dist.runs.evaluation_records import record, run_with_recipe
from calm_dist.scores import MARK_EXPLAINED
from calm_dist.training.build import build_head

VOCAB, K, BLOCK = 32, 4, 24
TOKENIZER, AUTOENCODER, FINGERPRINT = "a" * 64, "b" * 64, "d" * 64


def follower(token: Any, steps: int = 1) -> Any:
    """The rule of the text, for numbers, arrays and tensors below 31: no token follows itself."""
    for _ in range(steps):
        token = (token + 1) % 31
    return token


def rule_text(blocks: int, obeyed: float) -> np.ndarray:
    """Tokens ``[blocks, BLOCK]`` that follow the rule with this probability, else anything."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, VOCAB - 1, (blocks, BLOCK))
    for at in range(1, BLOCK):
        obeys = rng.random(blocks) < obeyed
        rows[obeys, at] = follower(rows[obeys, at - 1])
    return rows


class TinyStore(Store):
    """Blocks of text that follows a rule; each latent is the patch itself, with no spread."""

    def __init__(self, blocks: int, patch_size: int = K, obeyed: float = 1.0) -> None:
        self.blocks: list[dict[str, Any]] = [
            {
                "tokens": row.astype(np.uint32),
                "mean": row.reshape(-1, patch_size).astype(np.float16),
                "log_std": np.full((BLOCK // patch_size, patch_size), -20, np.float16),
            }
            for row in rule_text(blocks, obeyed)
        ]
        self._meta = StoreMeta.model_validate(
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

    @property
    def meta(self) -> StoreMeta:
        return self._meta

    @meta.setter
    def meta(self, meta: StoreMeta) -> None:
        self._meta = meta

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.blocks[index]


def recipe(kind: str, **model: Any) -> Recipe:
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


class RoundingDecoder:
    """A token's hidden state is 1 at the nearest number to its component of the latent."""

    def __call__(self, latents: Tensor) -> Tensor:
        tokens = latents.round().long().clamp(0, VOCAB - 1)
        return torch.nn.functional.one_hot(tokens, VOCAB).float()

    def patch_hidden(self, latents: Tensor) -> Tensor:
        return latents

    def token_hidden(self, patches: Tensor, position: int) -> Tensor:
        return self(patches[:, position])


class OneHotAutoencoder:
    output_weight, decoder = torch.eye(VOCAB), RoundingDecoder()

    def __init__(self, patch_size: int) -> None:
        self.patch_size = patch_size

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        mean = tokens.reshape(len(tokens), -1, self.patch_size).float()
        return mean, torch.full_like(mean, -20)


class MostlyRightHead:
    """The latent of the hidden state, all of it plus one in a quarter of the samples."""

    def draw_noise(self, generator: torch.Generator, num_samples: int, positions: int) -> Tensor:
        return torch.rand(num_samples, positions, 1, generator=generator) - 0.5

    def sample(self, hidden: Tensor, noise: Tensor) -> Tensor:
        return hidden + (noise > 0.25)


class NoCache:
    """For models that need to see no step but the last."""

    def __init__(self, *_: int) -> None: ...

    def truncate(self, steps: int) -> None: ...


def rule_calm(patch_size: int = K, head: Any = None) -> Any:
    """A CALM whose hidden states are the patches that follow by the rule."""

    def hidden(tokens: Tensor, *_: Tensor) -> Tensor:
        last = tokens.unflatten(1, (-1, patch_size))[..., -1]
        return torch.stack([follower(last, step + 1) for step in range(patch_size)], -1).float()

    autoencoder: Any = OneHotAutoencoder(patch_size)
    return SimpleNamespace(
        kind="calm",
        recipe=recipe("calm", patch_size=patch_size, latent_size=patch_size),
        device=torch.device("cpu"),
        checkpoint=Path("runs/calm/checkpoints/step_00000020"),
        step=20,
        tokens_seen=4096,
        tokenizer_sha256=TOKENIZER,
        autoencoder_sha256=AUTOENCODER,
        autoencoder=autoencoder,
        decoder=GreedyDecoder(autoencoder),
        head=head or MostlyRightHead(),
        hidden=hidden,
        has_probabilities=False,
        new_cache=NoCache,
    )


def transformer_of(logits: Any) -> Any:
    model = rule_calm()
    model.kind, model.has_probabilities = "transformer", True
    model.outputs, model.token_logits = logits, lambda outputs, previous: outputs
    model.recipe = recipe("transformer")
    return model


def uniform_transformer() -> Any:
    return transformer_of(lambda tokens, *_: torch.zeros(*tokens.shape, VOCAB))


def rule_transformer() -> Any:
    def logits(tokens: Tensor, *_: Tensor) -> Tensor:
        return 200 * torch.nn.functional.one_hot(follower(tokens), VOCAB).float()

    return transformer_of(logits)


def test_calm_scores_have_their_closed_form() -> None:
    """A sample is right with probability 3/4 as a whole: Brier-n = 2·3/4 - (9 + 1)/16 for every n.

    Within 4.5 standard errors (6.8e-6 to fail by chance, times four dependent values).
    """
    result = evaluate(rule_calm(), TinyStore(60), EvaluationSettings(samples=6))
    assert result["brier"] == pytest.approx([0.875] * 4, abs=4.5 * result["brier_stderr"][0])
    assert result["brierlm"] == pytest.approx(87.5, abs=4.5 * result["brierlm_stderr"])
    # Per position 0.106 with six draws, five positions in each of 60 blocks.
    assert 0.3 < result["brierlm_stderr"] < 1.5
    # Samples lie at distance 0 or 2: E‖x-x'‖ - 2 E‖x-z‖ = 2 · 3/8 - 2 · 2/4 = -1/4.
    assert result["energy_loss"] == pytest.approx(0.25, abs=0.05)
    assert result["reconstruction_accuracy"] == result["reconstruction_accuracy_mean"] == 1.0
    assert result["protocol"] == {
        "block_size": 24,
        "trained_block_size": 24,
        "patch_size": 4,
        "samples": 6,
        "alignment": "patch",
        "blocks": 60,
        "positions": 300,
        "starts": {"first": 4, "last": 20, "stride": 4, "per_block": 5},
        "estimator": "all pairs of draws",
        "head": "energy",
    }
    assert (result["step"], result["tokens_seen"]) == (20, 4096)
    assert result["data_fingerprint"] == FINGERPRINT
    assert json.loads(json.dumps(result)) == result


def test_tokens_only_stores_are_encoded_on_the_fly() -> None:
    stored, tokens_only = TinyStore(3), TinyStore(3)
    for block in tokens_only.blocks:
        del block["mean"], block["log_std"]
    settings = EvaluationSettings(samples=4)
    assert evaluate(rule_calm(), stored, settings) == evaluate(rule_calm(), tokens_only, settings)


@pytest.fixture
def whole_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """No path ends early, so that closed forms hold whatever is drawn; those that do are in
    tests/unit/test_brier_tree.py."""
    monkeypatch.setattr(brier_softmax, "_SMALLEST_PRODUCT", 1e-9)


@pytest.mark.usefixtures("whole_paths")
def test_transformer_scores_have_their_closed_form() -> None:
    result = evaluate(uniform_transformer(), TinyStore(3), EvaluationSettings(samples=2))
    # P(y) = P(a=b) = V^-n, whatever is drawn.
    assert result["brier"] == pytest.approx([VOCAB**-n for n in (1, 2, 3, 4)])
    assert result["cross_entropy"] == pytest.approx(math.log(VOCAB))
    assert result["perplexity"] == pytest.approx(VOCAB)
    assert result["protocol"]["positions"] == 15 and result["protocol"]["patch_size"] == 4


class RightHead(MostlyRightHead):
    def sample(self, hidden: Tensor, noise: Tensor) -> Tensor:
        return hidden + 0 * noise


@pytest.mark.parametrize("alignment", ["patch", "all"])
@pytest.mark.parametrize("patch_size", [1, 2, 3, 4, 8])
def test_calm_and_transformer_are_scored_on_the_same_ngrams(
    patch_size: int, alignment: Any
) -> None:
    """Both know the rule that the text obeys at times, so that both hit where the text does.

    They never disagree with themselves: Brier-n is 2·hit - 1, over the starts of the definition.
    """
    store = TinyStore(5, patch_size, obeyed=0.8)
    settings = EvaluationSettings(samples=2, alignment=alignment)
    calm = evaluate(rule_calm(patch_size, RightHead()), store, settings)
    transformer = evaluate(rule_transformer(), store, settings)

    starts = [q for q in range(patch_size, BLOCK) if q + 4 <= BLOCK]
    if alignment == "patch":
        starts = [q for q in starts if q % patch_size == 0]
    rows = [block["tokens"].tolist() for block in store.blocks]
    obeys = [[follower(a) == b for a, b in itertools.pairwise(row)] for row in rows]
    hits = [[all(o[q - 1 : q - 1 + n]) for n in (1, 2, 3, 4)] for o in obeys for q in starts]
    expected = 2 * np.mean(hits, axis=0) - 1
    assert 0 < np.mean(hits, axis=0)[3] < 1
    assert calm["brier"] == pytest.approx(expected) == transformer["brier"]

    for name in ("block_size", "patch_size", "alignment", "blocks", "positions", "starts"):
        assert calm["protocol"][name] == transformer["protocol"][name]
    assert calm["protocol"]["positions"] == len(hits) == 5 * len(starts)
    assert calm["protocol"]["starts"]["first"] == starts[0]
    assert calm["protocol"]["starts"]["last"] == starts[-1]
    assert ("continued" in calm["protocol"]["estimator"]) == (patch_size < 4)


def test_losses_belong_to_the_stored_patches_whatever_ngrams_are_scored() -> None:
    settings = [EvaluationSettings(samples=2, alignment=a) for a in ("patch", "all")]
    patch, every = (evaluate(rule_calm(), TinyStore(3), setting) for setting in settings)
    assert every["protocol"]["positions"] == 3 * 17 > patch["protocol"]["positions"]
    for name in ("energy_loss", "reconstruction_accuracy", "reconstruction_accuracy_mean"):
        assert patch[name] == every[name]


def test_few_patches_of_a_block_are_reconstructed(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most the limit, evenly spaced from the first; their tokens are compared with the text's at
    the same places."""
    decoded: list[Tensor] = []

    def watched(model: Any, latents: Tensor) -> Tensor:
        decoded.append(latents)
        return decode_latents(model, latents)

    monkeypatch.setattr(block_scores, "decode_latents", watched)
    for limit, places in ((64, range(6)), (6, range(6)), (4, (0, 2, 4)), (1, (0,))):
        monkeypatch.setattr(block_scores, "_RECONSTRUCTED_PATCHES", limit)
        decoded.clear()
        store = TinyStore(1)
        result = evaluate(rule_calm(), store, EvaluationSettings(samples=2))
        assert result["reconstruction_accuracy"] == result["reconstruction_accuracy_mean"] == 1.0
        mean = torch.from_numpy(store.blocks[0]["mean"]).float()
        assert torch.equal(decoded[1], mean[list(places)])


@pytest.mark.parametrize("kind", ["energy", "flow", "diffusion"])
def test_heads_of_all_kinds_are_scored(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their noise is drawn for as many positions at once as fit the limit."""
    size = {"kind": kind, "num_mlp_layers": 1, "num_samples": 1 if kind != "energy" else 2}
    model = recipe("calm", patch_size=K, latent_size=K, hidden_size=K, head=size).model
    assert isinstance(model, CalmModel)
    head = build_head(model, seed=0)
    drawn: list[tuple[int, int]] = []

    class Watched(type(head)):  # type: ignore[misc]
        def draw_noise(self, *arguments: Any) -> Tensor:
            noise = super().draw_noise(*arguments)
            drawn.append((arguments[2], noise.numel()))
            return noise

    head.__class__ = Watched
    calm = rule_calm(head=head)
    calm.recipe = calm.recipe.model_copy(update={"model": model})
    whole = evaluate(calm, TinyStore(2), EvaluationSettings(samples=3))
    assert whole["protocol"]["head"] == kind and math.isfinite(whole["energy_loss"])
    assert [positions for positions, _ in drawn] == [1, 5, 1, 5]  # measured, then drawn

    noise_of_one, drawn[:] = drawn[0][1], []
    monkeypatch.setattr(block_scores, "_SAMPLED_AT_ONCE", 2 * 3 * (noise_of_one + K))
    evaluate(calm, TinyStore(1), EvaluationSettings(samples=3))
    assert drawn[1:] == [(2, 6 * noise_of_one), (2, 6 * noise_of_one), (1, 3 * noise_of_one)]


def test_blocks_are_spaced_and_their_draws_do_not_depend_on_the_others() -> None:
    store = TinyStore(9)
    asked: list[int] = []

    class Watched(TinyStore):
        def __getitem__(self, index: int) -> dict[str, Any]:
            asked.append(index)
            return super().__getitem__(index)

    watched = Watched(9)
    evaluate(uniform_transformer(), watched, EvaluationSettings(blocks=3, samples=2))
    assert asked == [0, 3, 6]
    settings = EvaluationSettings(samples=2)
    first = evaluate(rule_calm(), store, settings)
    del store.blocks[1:]
    alone = evaluate(rule_calm(), store, settings)
    store.blocks.append(store[0])
    # The same block under another number is drawn again.
    assert evaluate(rule_calm(), store, settings)["brier"] != alone["brier"]
    assert first["brier"] != alone["brier"] and alone["brierlm_stderr"] is None
    assert "two" in alone["stderr_undefined"]


def test_a_model_that_knows_no_tokenizer_takes_any_that_fits_its_vocabulary() -> None:
    model = rule_calm()
    model.tokenizer_sha256 = None
    store = TinyStore(2)
    for size in (VOCAB - 1, VOCAB):
        store.meta = store.meta.model_copy(update={"vocab_size": size})
        evaluate(model, store, EvaluationSettings(samples=2))
    store.meta = store.meta.model_copy(update={"vocab_size": VOCAB + 1})
    with pytest.raises(DataError, match="vocab_size: 33 in the store, 32 in"):
        evaluate(model, store, EvaluationSettings(samples=2))


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
        evaluate(rule_calm(), store, EvaluationSettings())


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(UserError, match="block_size 24: too short"):
        evaluate(uniform_transformer(), TinyStore(2), EvaluationSettings(alignment_stride=22))
    for settings in (
        {"blocks": 0},
        {"samples": 1},
        {"alignment": "none"},
        {"alignment_stride": 0},
    ):
        with pytest.raises(UserError, match=next(iter(settings))):
            EvaluationSettings(**settings)


def test_results_are_recorded_once(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 20, "loss": 3.5}\n{"step": 21, "lo')  # a writer was killed
    result = evaluate(uniform_transformer(), TinyStore(2), EvaluationSettings(samples=2))
    assert record(tmp_path, result)
    assert not record(tmp_path, result)
    assert record(tmp_path, {**result, "step": 40})
    assert record(tmp_path, {**result, "data_fingerprint": "other"})
    assert record(tmp_path, {**result, "protocol": {**result["protocol"], "samples": 9}})
    lines = metrics.read_text().splitlines()
    assert len(lines) == 6 and json.loads(lines[2]) == {"step": 20, "eval": result}


def test_run_directory_of_a_checkpoint(tmp_path: Path) -> None:
    steps = tmp_path / "checkpoints"
    (steps / "step_00000020").mkdir(parents=True)
    assert run_with_recipe(steps / "step_00000020") is None
    (tmp_path / "recipe.yaml").touch()
    assert run_with_recipe(steps / "step_00000020") == tmp_path.resolve()


@pytest.mark.usefixtures("whole_paths")
def test_table_shows_scores_and_why_an_error_is_missing() -> None:
    result = evaluate(uniform_transformer(), TinyStore(1), EvaluationSettings(samples=2))
    text = evaluation.table([result])
    assert "cross_entropy 3.4657" in text and "3.12" in text
    assert "no standard error: one block" in text and MARK_EXPLAINED not in text


@pytest.mark.usefixtures("whole_paths")
def test_table_marks_scores_of_noise() -> None:
    result = evaluate(uniform_transformer(), TinyStore(2), EvaluationSettings(samples=2))
    clear = result | {"brier": [0.5, 0.4, 0.3, 0.2], "brier_stderr": [0.01, 0.02, 0.03, 0.04]}
    clear |= {"brierlm": 33.1, "brierlm_stderr": 1.5}
    noisy = clear | {"brier_stderr": [0.01, 0.02, 0.15, 0.04]}
    head, *lines = evaluation.table([clear, noisy]).splitlines()
    assert [line.split("  ")[-5:-1] for line in lines[:1]] == [
        ["50.00 ± 1.00", "40.00 ± 2.00", "30.00 ± 3.00", "20.00 ± 4.00"]
    ]
    assert "33.10 ± 1.50" in lines[0] and "33.10* ± 1.50" in lines[1]
    assert lines[2:] == [MARK_EXPLAINED]
    assert all(f"Brier-{n} x100" in head for n in (1, 2, 3, 4))
    assert evaluation.table([clear]).count("*") == 0


@pytest.mark.parametrize("patch_size", [1, 2, 3, 4, 6])
def test_tokens_that_do_not_count_are_not_decoded(
    patch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores are those of all tokens, for draws of which some agree and some are right."""
    model = tiny_model("calm", patch_size=patch_size, block_steps=12, vocab_size=3, noise=0.5)
    tokens = torch.randint(3, (12 * patch_size,), generator=torch.Generator().manual_seed(0))
    starts = brier.ngram_starts(len(tokens), patch_size, "all")
    decoded: list[float] = []

    def all_tokens(model: Any, latents: torch.Tensor, target: Any = None) -> torch.Tensor:
        whole = decode_latents(model, latents.flatten(0, 1)).unflatten(0, latents.shape[:2])
        some = decode_draws(model, latents, target)
        assert ((some == whole) | (some >= 3)).all()
        decoded.append(float((some < 3).double().mean()))
        return whole

    decode_draws = block_scores.decode_draws
    block = {"tokens": tokens.numpy()}
    some = block_scores.score_latent_block(model, block, starts, 4, 3, released=True)
    monkeypatch.setattr(block_scores, "decode_draws", all_tokens)
    whole = block_scores.score_latent_block(model, block, starts, 4, 3, released=True)
    assert torch.equal(some.brier, whole.brier) and whole.brier.any()
    assert some.released is not None and whole.released is not None
    assert torch.equal(some.released, whole.released)
    assert patch_size == 1 or 0 < min(decoded) < 1
