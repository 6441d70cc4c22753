"""Generation with models whose next step is known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from calm_dist.data.latents import plan_store, write_store
from calm_dist.data.tokenizer import load_tokenizer, train_tokenizer
from calm_dist.errors import CheckpointError, DataError, UserError
from calm_dist.evaluation.generate import find_tokenizer, generate
from calm_dist.recipe import Recipe

VOCAB, K, BLOCK = 32, 4, 24
BEGIN, END = 30, 31


class LetterTokenizer:
    """Tokens 0..29 are single characters."""

    vocab_size, begin_id, end_id = VOCAB, BEGIN, END
    fingerprint, path = "f" * 64, "letters"
    letters = "abcdefghijklmnopqrstuvwxyz.,! "

    def encode(self, text: str) -> list[int]:
        return [self.letters.index(letter) for letter in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.letters[token] for token in tokens)


class NextPatchHead:
    """Latents are the next patch's tokens; noise above 0.25 moves all of them by one."""

    def draw_noise(self, generator: torch.Generator, num_samples: int, positions: int) -> Tensor:
        return torch.rand(num_samples, positions, 1, generator=generator) - 0.5

    def sample(self, hidden: Tensor, noise: Tensor) -> Tensor:
        return hidden + (noise > 0.25)


class OneHotAutoencoder:
    def decode(self, latents: Tensor) -> Tensor:
        tokens = latents.round().long().clamp(0, VOCAB - 1)
        return torch.nn.functional.one_hot(tokens.flatten(1), VOCAB).float()


def tiny_model(kind: str, next_tokens: Any) -> Any:
    """A model with the interface of `LoadedModel`; `contexts` keeps what it was asked."""
    contexts: list[list[int]] = []

    def hidden(tokens: Tensor) -> Tensor:
        contexts.append(tokens[0].tolist())
        return torch.tensor([next_tokens(contexts[-1])], dtype=torch.float)[:, None]

    def logits(tokens: Tensor) -> Tensor:
        contexts.append(tokens[0].tolist())
        return next_tokens(contexts[-1])[None, None]

    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    recipe = Recipe.from_dict(
        {
            "run": {"dir": "runs/tiny"},
            "model": {"kind": kind, **sizes},
            "data": {"path": "latents/train", "block_size": BLOCK},
            "training": {"steps": 20, "micro_batch_size": 1, "global_batch_size": 1},
        }
    )
    return SimpleNamespace(
        kind=kind,
        recipe=recipe,
        checkpoint="runs/tiny",
        tokenizer_sha256=LetterTokenizer.fingerprint,
        autoencoder=OneHotAutoencoder(),
        head=NextPatchHead(),
        hidden=hidden,
        logits=logits,
        contexts=contexts,
    )


def counting(context: list[int]) -> list[int]:
    """The four letters after the last one."""
    return [context[-1] + step for step in range(1, K + 1)]


def test_calm_continues_patch_by_patch() -> None:
    # Three quarters of the noise leave the patch alone: the only patch seen 100 times in 200 draws.
    model = tiny_model("calm", counting)
    result = generate(model, LetterTokenizer(), "abc", temperature=0.01, max_new_tokens=10)
    assert result.text == "defghijklm" and result.stopped_by == "length"
    assert model.contexts[0] == [BEGIN, 0, 1, 2]
    assert model.contexts[1] == [BEGIN, 0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("prompt", "fill"), [("", 4), ("a", 3), ("abc", 1), ("abcd", 4)])
def test_prompt_is_filled_with_one_to_k_begin_tokens(prompt: str, fill: int) -> None:
    model = tiny_model("calm", lambda context: [0, 0, 0, 0])
    generate(model, LetterTokenizer(), prompt, max_new_tokens=1)
    assert model.contexts == [[BEGIN] * fill + LetterTokenizer().encode(prompt)]


def test_end_inside_a_patch_stops() -> None:
    model = tiny_model("calm", lambda context: [2, 1, END, 5])
    result = generate(model, LetterTokenizer(), "x", temperature=0.01, max_new_tokens=50)
    assert (result.text, result.tokens, result.stopped_by) == ("cb", [2, 1], "end")


def test_length_is_exact_when_the_end_comes_later_in_the_patch() -> None:
    model = tiny_model("calm", lambda context: [2, 1, END, 5])
    result = generate(model, LetterTokenizer(), "x", temperature=0.01, max_new_tokens=2)
    assert result.tokens == [2, 1] and result.stopped_by == "length"


def test_long_context_is_cut_at_patch_boundaries() -> None:
    model = tiny_model("calm", lambda context: [context[-4] + 1] * 4)
    prompt = "abcdefghijklmnopqrstuv"  # 2 begin tokens + 22: a full block
    generate(model, LetterTokenizer(), prompt, temperature=0.01, max_new_tokens=8)
    # The block's last patch predicts nothing in training: five patches are left.
    letters = LetterTokenizer().encode(prompt)
    assert model.contexts[0] == letters[2:]
    assert model.contexts[1] == [*letters[6:], 19, 19, 19, 19]


@pytest.mark.parametrize("method", ["pool", "exact"])
def test_the_seed_decides_the_text(method: Any) -> None:
    texts = [
        generate(
            tiny_model("calm", lambda context: [3 + context[-1] % 20] * 4),
            LetterTokenizer(),
            "abc",
            seed=seed,
            method=method,
            max_new_tokens=40,
        ).text
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_any_temperature_falls_to_the_exact_method() -> None:
    model = tiny_model("calm", lambda context: [3] * 4)
    assert (
        len(generate(model, LetterTokenizer(), "", temperature=0.7, max_new_tokens=8).tokens) == 8
    )
    with pytest.raises(UserError, match="whole number"):
        generate(model, LetterTokenizer(), "", temperature=0.7, method="pool")


def biased(context: list[int]) -> Tensor:
    logits = torch.full((VOCAB,), -torch.inf)
    logits[:2] = torch.tensor([0.0, 1.0])
    return logits


def test_transformer_samples_its_softmax_at_a_temperature() -> None:
    """2,000 tokens of odds e^(1/T): within 4.5 standard deviations (6.8e-6 to fail by chance)."""
    for temperature in (1.0, 0.5):
        model = tiny_model("transformer", biased)
        result = generate(
            model, LetterTokenizer(), "ab", temperature=temperature, max_new_tokens=2000
        )
        expected = float(torch.sigmoid(torch.tensor(1 / temperature)))
        share = sum(result.tokens) / 2000
        assert abs(share - expected) < 4.5 * (expected * (1 - expected) / 2000) ** 0.5
        assert model.contexts[0] == [BEGIN, 0, 1]
        assert max(map(len, model.contexts)) == BLOCK - 1


def test_transformer_stops_at_the_end_token() -> None:
    def ends(context: list[int]) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(END), VOCAB) * 1e4

    result = generate(tiny_model("transformer", ends), LetterTokenizer(), "ab", max_new_tokens=9)
    assert (result.tokens, result.stopped_by) == ([], "end")


def test_bad_arguments() -> None:
    calm, transformer = tiny_model("calm", counting), tiny_model("transformer", biased)
    for model in (calm, transformer):
        for temperature in (0.0, float("nan")):
            with pytest.raises(UserError, match="temperature"):
                generate(model, LetterTokenizer(), "", temperature=temperature)
    with pytest.raises(UserError, match="max_new_tokens 0"):
        generate(calm, LetterTokenizer(), "", max_new_tokens=0)


def test_another_tokenizer_is_refused() -> None:
    model = tiny_model("transformer", biased)
    model.tokenizer_sha256 = "0" * 64
    with pytest.raises(CheckpointError, match="ffffffffffff…, but runs/tiny was trained with 0000"):
        generate(model, LetterTokenizer(), "")
    smaller = LetterTokenizer()
    smaller.vocab_size = 20
    with pytest.raises(CheckpointError, match=r"20 entries, but runs/tiny has 32"):
        generate(tiny_model("transformer", biased), smaller, "")


def test_tokenizer_is_found_in_the_recipe_or_the_store(tmp_path: Path) -> None:
    text = [f"a small text, number {number}" for number in range(200)]
    (tmp_path / "corpus.txt").write_text("\n".join(text))
    tokenizer = train_tokenizer(text, 280, tmp_path / "tokenizer.json")
    plan = plan_store(
        [tmp_path / "corpus.txt"], tokenizer, variant="tokens", block_size=32, patch_size=4
    )
    write_store(tmp_path / "store", [tmp_path / "corpus.txt"], tokenizer, plan)

    model = tiny_model("transformer", biased)

    def with_data(**data: str) -> Any:
        values = model.recipe.to_dict()
        values["data"] |= data
        return SimpleNamespace(recipe=Recipe.from_dict(values))

    own, copy = tmp_path / "tokenizer.json", tmp_path / "store" / "tokenizer.json"
    store = str(tmp_path / "store")
    assert find_tokenizer(with_data(tokenizer=str(own), path=store)) == own
    assert find_tokenizer(with_data(path=store)) == copy
    assert find_tokenizer(with_data(tokenizer="gone.json", path=store)) == copy
    assert load_tokenizer(copy).fingerprint == tokenizer.fingerprint
    with pytest.raises(DataError, match=r"gone\.json: not found.*--tokenizer"):
        find_tokenizer(with_data(tokenizer="gone.json", path=str(tmp_path)))
