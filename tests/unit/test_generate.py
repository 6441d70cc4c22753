"""Generation with small random models, against a plain loop without cache and batch."""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency, chisquare
from tiny_models import VOCAB, tiny_model
from tokenizer_kinds import llama2_like, metaspace, wordpiece

from calm_dist.data.latents import plan_store, write_store
from calm_dist.errors import CheckpointError, DataError, UserError
from calm_dist.inference.generate import (
    Generation,
    check_tokenizer,
    decode_latents,
    find_tokenizer,
    generate,
)
from calm_dist.inference.load import LoadedModel
from calm_dist.inference.sampling import sample_exact, sample_from_pool
from calm_dist.runs import checkpoints
from calm_dist.runs.checkpoints.run_state import RunState
from calm_dist.text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from calm_dist.training.checkpoint import model_state

ROOT = Path(__file__).parents[2]
PROMPTS = ["s", "sea", "the s", "the "]  # 1, 3, 5 and 4 tokens
SEEDS = [3, 1, 4, 1]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """Bytes and three special tokens: a character of ASCII is a token."""
    found = train_tokenizer(["abc"], VOCAB, tmp_path / "bytes.json")
    assert found.vocab_size == VOCAB
    return found


def plain_loop(
    model: LoadedModel,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    seed: int,
    temperature: float,
    max_new_tokens: int,
    exact: bool = False,
) -> Generation:
    """What `generate` must give: the whole context runs again at every step."""
    size, steps = model.recipe.model.patch_size, model.recipe.num_patches - 1
    context = tokenizer.encode(prompt)
    context = [tokenizer.begin_id] * (size - len(context) % size) + context
    context = context[-steps * size :]
    new: list[int] = []
    for number in range(max_new_tokens):
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number,)))
        if model.kind == "calm":
            generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
            hidden = model.hidden(torch.tensor([context]))[0, -1:]

            def draw(
                count: int,
                hidden: torch.Tensor = hidden,
                generator: torch.Generator = generator,
            ) -> np.ndarray:
                noise = model.head.draw_noise(generator, count, 1)
                return decode_latents(model, model.head.sample(hidden, noise)[:, 0]).numpy()

            step = list((sample_exact if exact else sample_from_pool)(draw, temperature, rng))
        else:
            logits = model.logits(torch.tensor([context]))[0, -1].double()
            if temperature == 0:
                step = [int(logits.argmax())]
            else:
                step = [int(rng.choice(VOCAB, p=(logits / temperature).softmax(-1)))]
        for token in step:
            if token == tokenizer.end_id:
                return Generation(tokenizer.decode(new), new, "end")
            new.append(token)
            if len(new) == max_new_tokens:
                return Generation(tokenizer.decode(new), new, "length")
        if len(context) == steps * size:
            # The window is full: its newer half continues, the new step included.
            context = context[len(context) - (steps // 2 - 1) * size :]
        context = context + step
    raise AssertionError("each step gives at least one token")


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
@pytest.mark.parametrize(("temperature", "exact"), [(0.5, False), (1.0, False), (0.7, True)])
def test_calm_equals_the_plain_loop(
    tokenizer: Tokenizer, patch_size: int, temperature: float, exact: bool
) -> None:
    """Over three windows: the cache is filled again; prompts of 0 to 5 tokens and a long one."""
    model = tiny_model(patch_size=patch_size, block_steps=7, seed=patch_size, noise=0.1)
    long_prompt = "It was the best of times, it was the worst of times, it was the age of wisdom"
    for seed, prompt in enumerate(["", *PROMPTS, long_prompt]):
        options: dict[str, Any] = {
            "temperature": temperature,
            "max_new_tokens": 12 * patch_size - 1,
        }
        expected = plain_loop(model, tokenizer, prompt, seed=seed, exact=exact, **options)
        method: Any = "exact" if exact else "pool"
        assert generate(model, tokenizer, prompt, seed=seed, method=method, **options) == expected


@pytest.mark.parametrize("temperature", [0, 0.3, 1.0, 2.5])
def test_transformer_equals_the_plain_loop(tokenizer: Tokenizer, temperature: float) -> None:
    model = tiny_model("transformer", block_steps=12, num_key_value_heads=2)
    for seed, prompt in enumerate(["", *PROMPTS, "longer than its block"]):
        options: dict[str, Any] = {"temperature": temperature, "max_new_tokens": 40, "seed": seed}
        expected = plain_loop(model, tokenizer, prompt, **options)
        assert generate(model, tokenizer, prompt, **options) == expected


def every_kind() -> list[LoadedModel]:
    calm = [tiny_model(patch_size=size, seed=size, noise=0.5) for size in (1, 2, 4, 8)]
    other_heads = [tiny_model(head=head, seed=9) for head in ("flow", "diffusion")]
    return [*calm, *other_heads, tiny_model("transformer", num_key_value_heads=2)]


def test_a_prompt_in_a_batch_is_continued_as_alone(tokenizer: Tokenizer) -> None:
    for model in every_kind():
        for method in ("pool", "exact"):
            options: dict[str, Any] = {"method": method, "max_new_tokens": 19}
            options["reproducible"] = True
            options["temperature"] = 0.5 if method == "pool" else 1.0
            together = generate(model, tokenizer, PROMPTS, seed=SEEDS, **options)
            for prompt, seed, found in zip(PROMPTS, SEEDS, together, strict=True):
                assert generate(model, tokenizer, prompt, seed=seed, **options) == found


@pytest.mark.parametrize("method", ["pool", "exact"])
def test_texts_of_a_batch_keep_their_own_randomness(method: Any, tokenizer: Tokenizer) -> None:
    """Without ``reproducible`` only rounding differs, which rarely tips a draw: of 40 texts at
    least 38 are those that each gives alone, whatever else is in the batch."""
    layers: dict[str, Any] = {"num_hidden_layers": 1}  # draws are what differs
    for model in (tiny_model(noise=0.5, **layers), tiny_model("transformer", **layers)):
        options: dict[str, Any] = {"method": method, "max_new_tokens": 12, "temperature": 0.5}
        prompts, seeds = PROMPTS * 10, list(range(40))
        together = generate(model, tokenizer, prompts, seed=seeds, **options)
        alone = [
            generate(model, tokenizer, prompt, seed=seed, **options)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        assert sum(one == other for one, other in zip(together, alone, strict=True)) >= 38
        assert len({new.text for new in together}) > 20


@pytest.mark.parametrize(("method", "temperature"), [("pool", 1.0), ("pool", 0.5), ("exact", 0.7)])
def test_batched_samples_have_the_distribution_of_single_ones(
    method: Any, temperature: float, tokenizer: Tokenizer
) -> None:
    """Chi-square of the first tokens of 400 texts in one batch and of 400 others, one after the
    other; a right sampler fails with probability 1e-4."""
    # The sampler is what is tested.
    model = tiny_model(patch_size=2, noise=1.0, num_hidden_layers=1)
    tokenizer.end_id = -1
    options: dict[str, Any] = {"method": method, "temperature": temperature, "max_new_tokens": 2}
    batch = generate(model, tokenizer, ["ab"] * 400, seed=list(range(400)), **options)
    single = [generate(model, tokenizer, "ab", seed=1000 + n, **options) for n in range(400)]
    counts = np.stack(
        [
            np.bincount([new.tokens[0] for new in found], minlength=VOCAB)
            for found in (batch, single)
        ]
    )
    # The tokens that are drawn often, each on its own, and the others in one group.
    often = counts.sum(0) >= 20
    table = np.concatenate([counts[:, often], counts[:, ~often].sum(1, keepdims=True)], axis=1)
    table = table[:, table.sum(0) > 0]
    assert table.shape[1] > 3
    assert chi2_contingency(table).pvalue > 1e-4


def test_one_seed_serves_every_prompt(tokenizer: Tokenizer) -> None:
    model = tiny_model()
    options: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 16}
    same, other, again = generate(model, tokenizer, ["ab", "abc", "ab"], seed=5, **options)
    assert same == again != other
    assert generate(model, tokenizer, "ab", seed=6, **options) != same
    assert generate(model, tokenizer, [], **options) == []


@pytest.mark.parametrize("kind", ["calm", "transformer"])
def test_lengths_are_exact(kind: str, tokenizer: Tokenizer) -> None:
    """The first tokens of a text do not depend on how many follow."""
    model = tiny_model(kind, block_steps=20)
    tokenizer.end_id = -1
    longest = generate(model, tokenizer, PROMPTS, temperature=1.0, max_new_tokens=13)
    for count in range(1, 13):
        found = generate(model, tokenizer, PROMPTS, temperature=1.0, max_new_tokens=count)
        for short, long in zip(found, longest, strict=True):
            assert (short.tokens, short.stopped_by) == (long.tokens[:count], "length")
            assert short.text == tokenizer.decode(short.tokens)


@pytest.mark.parametrize("kind", ["calm", "transformer"])
def test_the_end_token_stops_wherever_it_is(kind: str, tokenizer: Tokenizer) -> None:
    """Each of the tokens that a text has is made the end token in turn, also inside a patch."""
    model = tiny_model(kind, block_steps=20)
    tokenizer.end_id = -1
    options: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 14, "seed": SEEDS}
    whole = generate(model, tokenizer, PROMPTS, **options)
    for end in whole[0].tokens:
        tokenizer.end_id = end
        for long, short in zip(whole, generate(model, tokenizer, PROMPTS, **options), strict=True):
            stops = end in long.tokens
            kept = long.tokens[: long.tokens.index(end)] if stops else long.tokens
            assert (short.tokens, short.stopped_by) == (kept, "end" if stops else "length")


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_transformer_samples_its_softmax(tokenizer: Tokenizer, temperature: float) -> None:
    """Chi-square over 600 seeds; a right sampler fails with probability 1e-4."""
    model = tiny_model("transformer", vocab_size=VOCAB, seed=2)
    tokenizer.end_id = -1
    options: dict[str, Any] = {"temperature": temperature, "max_new_tokens": 1}
    found = generate(model, tokenizer, ["ab"] * 600, seed=list(range(600)), **options)
    logits = model.logits(torch.tensor([[tokenizer.begin_id, *tokenizer.encode("ab")]]))[0, -1]
    expected = (logits.double() / temperature).softmax(-1).numpy() * len(found)
    observed = np.bincount([row.tokens[0] for row in found], minlength=VOCAB)
    # Eight groups from the likeliest tokens down, of equal probability.
    order = np.argsort(-expected)
    group = np.minimum(expected[order].cumsum() // (len(found) / 8), 7).astype(int)
    by_group = [np.bincount(group, weights=counts[order]) for counts in (observed, expected)]
    assert chisquare(*by_group).pvalue > 1e-4


def test_any_temperature_falls_to_the_exact_method(tokenizer: Tokenizer) -> None:
    model = tiny_model()
    options: dict[str, Any] = {"temperature": 0.9, "max_new_tokens": 8}
    assert generate(model, tokenizer, "a", **options) == generate(
        model, tokenizer, "a", method="exact", **options
    )
    with pytest.raises(UserError, match="whole number"):
        generate(model, tokenizer, "a", method="pool", **options)


def test_draws_are_limited(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"30 draws \(max_draws\)"):
        generate(tiny_model(), tokenizer, "a", temperature=0.01, method="exact", max_draws=30)


def test_bad_arguments(tokenizer: Tokenizer) -> None:
    calm, transformer = tiny_model("calm"), tiny_model("transformer")
    for temperature in (0.0, -1.0, 1.5, float("nan"), float("inf"), 1e-310):
        with pytest.raises(UserError, match="temperature"):
            generate(calm, tokenizer, "", temperature=temperature)
    for temperature in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="temperature"):
            generate(transformer, tokenizer, "", temperature=temperature)
    with pytest.raises(UserError, match="max_new_tokens 0"):
        generate(calm, tokenizer, "", max_new_tokens=0)
    with pytest.raises(UserError, match="2 seeds for 1 prompts"):
        generate(calm, tokenizer, "a", seed=[1, 2])
    with pytest.raises(UserError, match="seed -1"):
        generate(calm, tokenizer, ["a", "b"], seed=[1, -1])
    with pytest.raises(UserError, match=r"'a\\udcff': character 1"):
        generate(calm, tokenizer, "a\udcff")


def test_the_coldest_temperature_takes_the_likeliest_token(tokenizer: Tokenizer) -> None:
    model = tiny_model("transformer")
    logits = model.logits(torch.tensor([[tokenizer.begin_id, *tokenizer.encode("ab")]]))[0, -1]
    found = generate(model, tokenizer, "ab", temperature=1e-300, max_new_tokens=1)
    assert found.tokens == [int(logits.argmax())]


def test_greedy_decoding_has_no_chance_in_it(tokenizer: Tokenizer) -> None:
    """The same text for every seed, alone and in a batch."""
    model = tiny_model("transformer", block_steps=12)
    options: dict[str, Any] = {"temperature": 0, "max_new_tokens": 30}
    together = generate(model, tokenizer, PROMPTS, seed=SEEDS, **options)
    for prompt, found in zip(PROMPTS, together, strict=True):
        assert generate(model, tokenizer, prompt, seed=99, **options) == found
    with pytest.raises(UserError, match=r"temperature 0.*most likely patch"):
        generate(tiny_model("calm"), tokenizer, "a", **options)


def test_of_equally_likely_tokens_the_lowest_is_taken(tokenizer: Tokenizer) -> None:
    """Of an output layer whose rows are all alike every token is as likely as any other."""
    model = tiny_model("transformer")
    weight = max(
        (p for p in model.backbone.parameters() if p.dim() == 2 and p.shape[0] >= VOCAB),
        key=lambda p: p.shape[0],
    )
    layers = [p for p in model.backbone.parameters() if p.shape == weight.shape]
    for layer in layers:
        layer[:] = layer[5].clone()
    logits = model.logits(torch.tensor([[tokenizer.begin_id]]))[0, -1]
    assert len(set(logits.tolist())) == 1
    tokenizer.end_id = -1
    found = generate(model, tokenizer, "ab", temperature=0, max_new_tokens=5)
    assert found.tokens == [0] * 5


@pytest.mark.parametrize("kind", ["calm", "transformer"])
def test_what_exceeds_the_context_is_said(kind: str, tokenizer: Tokenizer) -> None:
    """The note comes with the very token at which the cache is filled again, which `Contexts`
    does where it needs more than its window of 8 steps."""
    size = 4 if kind == "calm" else 1
    model = dataclasses.replace(tiny_model(kind, block_steps=9), step=7)
    tokenizer.end_id = -1
    options: dict[str, Any] = {"temperature": 1.0, "seed": 1}
    for prompt_tokens in (0, 2, size, 8 * size - 1, 8 * size, 100):
        filled = prompt_tokens // size + 1
        for new in (1, size, size + 1, 7 * size, 7 * size + 1, 8 * size, 8 * size + 1):
            found = generate(model, tokenizer, "s" * prompt_tokens, max_new_tokens=new, **options)
            steps_read = filled + -(-new // size) - 1
            assert (found.note is not None) == (steps_read > 8), (prompt_tokens, new)
            if filled > 8:
                said = f"the text outgrows the {8 * size} tokens"
                if prompt_tokens > 8 * size:
                    said = f"the prompt has {prompt_tokens} tokens, of which the last {8 * size} "
                assert found.note is not None and found.note.startswith(said)
    assert f"trained on blocks of {9 * size} tokens" in str(found.note)
    imported = dataclasses.replace(model, step=0)
    note = generate(imported, tokenizer, "s" * 100, max_new_tokens=1, **options).note
    assert f"whose configuration has positions for {9 * size} tokens" in str(note)


def with_fingerprint(sha256: str | None, vocab_size: int) -> Any:
    recipe = SimpleNamespace(model=SimpleNamespace(vocab_size=vocab_size))
    return SimpleNamespace(checkpoint="runs/tiny", tokenizer_sha256=sha256, recipe=recipe)


def test_only_the_tokenizer_of_the_model_is_taken(tokenizer: Tokenizer) -> None:
    own = tokenizer.fingerprint
    for sha256, vocab_size in ((own, VOCAB), (own, VOCAB + 1), (None, VOCAB), (None, 4096)):
        check_tokenizer(with_fingerprint(sha256, vocab_size), tokenizer)
    with pytest.raises(CheckpointError, match=f"{own[:12]}…, but runs/tiny was trained with 0000"):
        check_tokenizer(with_fingerprint("0" * 64, VOCAB), tokenizer)
    for sha256 in (own, None):
        with pytest.raises(CheckpointError, match="259 entries, but runs/tiny has 258"):
            check_tokenizer(with_fingerprint(sha256, 258), tokenizer)


def test_tokens_that_the_tokenizer_lacks_give_no_text(tokenizer: Tokenizer) -> None:
    """As with released checkpoints, whose vocabulary has one more entry than Llama 3's."""
    model = tiny_model(vocab_size=VOCAB + 300, patch_size=2)
    found = generate(model, tokenizer, "a", temperature=1.0, max_new_tokens=30)
    known = [token for token in found.tokens if token < VOCAB]
    assert len(known) < len(found.tokens) == 30
    assert found.text == tokenizer.decode(known)


def test_tokenizer_is_found(tmp_path: Path) -> None:
    """In the recipe, in the run directory, in the store."""
    text = [f"a small text, number {number}" for number in range(200)]
    (tmp_path / "corpus.txt").write_text("\n".join(text))
    tokenizer = train_tokenizer(text, 280, tmp_path / "tokenizer.json")
    plan = plan_store(
        [tmp_path / "corpus.txt"], tokenizer, variant="tokens", block_size=32, patch_size=4
    )
    write_store(tmp_path / "store", [tmp_path / "corpus.txt"], tokenizer, plan)
    recipe = tiny_model("transformer").recipe
    sha256: str | None = tokenizer.fingerprint

    def find(place: Path = tmp_path / "nowhere", **data: str) -> Path:
        values = recipe.to_dict()
        values["data"] |= data
        made = type(recipe).from_dict(values)
        found: Any = SimpleNamespace(recipe=made, checkpoint=place, tokenizer_sha256=sha256)
        return find_tokenizer(found)

    own, copy = tmp_path / "tokenizer.json", tmp_path / "store" / "tokenizer.json"
    store = str(tmp_path / "store")
    assert find(tokenizer=str(own), path=store) == own
    assert find(path=store) == copy
    assert find(tokenizer="gone.json", path=store) == copy
    assert load_tokenizer(copy).fingerprint == tokenizer.fingerprint
    with pytest.raises(DataError, match=r"gone\.json: not found.*nowhere.*--tokenizer"):
        find(tokenizer="gone.json", path=str(tmp_path))

    run = tmp_path / "run"
    inside = run / "checkpoints" / "step_00000001"
    inside.mkdir(parents=True)
    for name in ("tokenizer.model", "tokenizer.json"):
        (run / name).write_bytes(own.read_bytes())
        assert find(inside, path=store) == find(run, path="gone") == run / name


@pytest.mark.parametrize("kind", ["calm", "transformer"])
def test_texts_read_on_whatever_the_decoder_strips(kind: str, tmp_path: Path) -> None:
    """Decoders that treat the beginning of a text in their own way; prompts that are filled with
    begin tokens to whole patches of four."""
    for number, make in enumerate((llama2_like, metaspace, wordpiece)):
        tokenizer = make(tmp_path / f"{number}.json")
        model = tiny_model(kind, vocab_size=tokenizer.vocab_size, block_steps=20, seed=number)
        prompts = ["the sea", "the", "the sea is the sea", ""] * 12
        seeds = list(range(len(prompts)))
        found = generate(model, tokenizer, prompts, temperature=1.0, max_new_tokens=4, seed=seeds)
        assert any(new.text.startswith(" ") for new in found)
        for prompt, new in zip(prompts, found, strict=True):
            whole = tokenizer.decode(tokenizer.encode(prompt) + new.tokens)
            assert prompt + new.text == whole


def saved(model: LoadedModel, tokenizer: Tokenizer, run: Path) -> Path:
    """A run directory that holds the model."""
    temporary = checkpoints.begin(run, 3)
    model_state.save_weights(temporary, model.backbone, None)
    sha256 = tokenizer.fingerprint
    RunState(step=3, tokens=60, tokenizer_sha256=sha256, data={"steps_done": 3}).write(temporary)
    (temporary / checkpoints.RECIPE_FILE).write_text(model.recipe.to_yaml())
    checkpoints.commit(temporary, keep=1)
    return run


def run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of tools/generate.py, run in this process."""
    monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / "generate.py"), run_name="__main__")
    return int(ended.value.code or 0)


def test_command_line(
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The tool writes what `generate` gives: an object for one prompt, a list for several."""
    model = tiny_model("transformer")
    common = ["--checkpoint", str(saved(model, tokenizer, tmp_path / "run")), "--tokenizer"]
    common += [str(tokenizer.path), "--max-new-tokens", "9", "--temperature", "4/3"]
    options: dict[str, Any] = {"temperature": 4 / 3, "max_new_tokens": 9}
    two = generate(model, tokenizer, ["", "the s"], seed=[4, 5], **options)

    several = ["--prompt", "", "--prompt", "the s", "--seed", "4", "--seed", "5", "--json", "-"]
    assert run_tool(monkeypatch, *common, *several) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["tokens"] for entry in found] == [new.tokens for new in two]
    assert [(entry["prompt"], entry["seed"]) for entry in found] == [("", 4), ("the s", 5)]

    file = tmp_path / "one.json"
    one = ["--prompt", "the s", "--seed", "5", "--json", str(file)]
    assert run_tool(monkeypatch, *common, *one) == 0
    assert capsys.readouterr().out == f"the s{two[1].text}\n"
    assert json.loads(file.read_text()) == found[1]
    assert (found[1]["step"], found[1]["stopped_by"]) == (3, two[1].stopped_by)

    # The last of several temperatures counts.
    assert run_tool(monkeypatch, *common, *one, "--temperature", "0") == 0
    greedy = generate(model, tokenizer, "the s", temperature=0, max_new_tokens=9)
    assert json.loads(file.read_text())["tokens"] == greedy.tokens != two[1].tokens


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--temperature", "1e400", "'1e400': must be a finite number, 0 or more"),
        ("--temperature", "nan", "'nan': must be a finite number, 0 or more"),
        ("--temperature", "-1", "'-1': must be a finite number, 0 or more"),
        ("--temperature", "1/0", "'1/0' is neither a number nor a fraction"),
        ("--temperature", "1/2/3", "'1/2/3' is neither a number nor a fraction"),
        ("--max-new-tokens", "0", "0: give a whole number from 1"),
        ("--prompt", "a\udcff", r"'a\udcff' is not UTF-8"),
        ("--seed", "1", "2 seeds for 3 prompts"),
    ],
)
def test_command_line_errors(
    option: str,
    value: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = ["--prompt", "", "--prompt", "a", "--prompt", "b"]
    given = ["--checkpoint", "gone", *prompts, "--seed", "0", option, value]
    assert run_tool(monkeypatch, *given) == 2
    assert message in capsys.readouterr().err
