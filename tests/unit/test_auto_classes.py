"""Exported directories in transformers' Auto classes, by the code that they carry."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_evaluate_tool import write_run
from tiny_models import tiny_model

from calm_dist.interop.convert import export_checkpoint, import_checkpoint
from calm_dist.interop.huggingface import load_calm
from calm_dist.text.tokenizer import load_tokenizer, train_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers copies the code of a directory into its cache."""
    import transformers.dynamic_module_utils as dynamic

    kept = dynamic.HF_MODULES_CACHE
    dynamic.HF_MODULES_CACHE = str(tmp_path_factory.mktemp("hf"))
    yield
    dynamic.HF_MODULES_CACHE = kept


def exported(root: Path, patch_size: int, quiet: bool = False) -> Path:
    """``quiet``: the head's noise has no effect, so that all draws are equal."""
    import_checkpoint(GOLDEN / f"calm_k{patch_size}", root / "run")
    export_checkpoint(root / "run", root / "out")
    if quiet:
        file = root / "out" / "model.safetensors"
        weights = load_file(file)
        for name in ("mlp_generator", "generative_head"):
            weights[f"{name}.norm_noise.weight"].zero_()
        save_file(weights, file, {"format": "pt"})
    return root / "out"


def auto(directory: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options)


@pytest.mark.parametrize("patch_size", [2, 4])
def test_hidden_states_and_samples_are_the_golden_ones(patch_size: int, tmp_path: Path) -> None:
    model = auto(exported(tmp_path, patch_size))
    io = load_file(GOLDEN / f"calm_k{patch_size}" / "io.safetensors")
    hidden = model(io["input_ids"]).last_hidden_state[:, :-1]
    torch.testing.assert_close(hidden, io["hidden_states"], atol=3e-6, rtol=1e-5)
    with torch.no_grad():
        noise = io["noise_uniform01"] - 0.5
        flat = io["hidden_states"].flatten(0, 1).expand(len(noise), -1, -1)
        latents = model.mlp_generator(flat, noise)
    torch.testing.assert_close(latents, io["latent_samples"], atol=3e-6, rtol=1e-5)
    drawn = model.ae_model.tokens(io["brier.latents"].flatten(0, 2))
    assert torch.equal(drawn.view(io["brier.pred"].shape), io["brier.pred"])


def test_it_generates_what_the_package_does(tmp_path: Path) -> None:
    """Without noise every draw is the same. Prompts of a batch, padded and not, and one alone."""
    directory = exported(tmp_path, 4, quiet=True)
    model, ours = auto(directory), load_calm(directory)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 150, (3, 6), generator=generator)

    def expected(prompt: list[int], count: int, window: int = 1000) -> list[int]:
        """``window``: the most patches that are read; beyond it, the newest half of it is."""
        config = json.loads((directory / "config.json").read_text())
        tokens = [config["bos_token_id"]] * (4 - len(prompt) % 4) + prompt
        start, first = len(tokens), max(0, len(tokens) // 4 - window)
        while len(tokens) < start + count:
            if len(tokens) // 4 - first > window:
                first = len(tokens) // 4 - window // 2
            hidden = ours.hidden(torch.tensor([tokens[first * 4 :]]))[0, -1:]
            latent = ours.head.sample(hidden, torch.zeros(1, 1, 16))[:, 0]
            patch = ours.decoder.tokens(ours.decoder.hidden(latent)[0]).tolist()
            tokens += patch
        return tokens[start : start + count]

    for temperature in (1.0, 0.5, 1 / 3):
        found = model.generate(
            prompts, max_new_tokens=9, temperature=temperature, num_samples=5, eos_token_id=-1
        )
        assert found[:, :6].equal(prompts)
        assert found[:, 6:].tolist() == [expected(row, 9) for row in prompts.tolist()]
    mask = torch.tensor([[1] * 6, [0] * 2 + [1] * 4, [0] * 3 + [1] * 3])
    found = model.generate(prompts, attention_mask=mask, max_new_tokens=5, eos_token_id=-1)
    known = [row[-length:] for row, length in zip(prompts.tolist(), (6, 4, 3), strict=True)]
    assert found[:, 6:].tolist() == [expected(row, 5) for row in known]
    # Each token of a continuation as the end token: it is written, and nothing after it.
    whole = expected(known[0], 8)
    for end in set(whole):
        found = model.generate(prompts[:1], max_new_tokens=8, eos_token_id=end, pad_token_id=1)
        assert found[0, 6:].tolist() == whole[: whole.index(end) + 1]
    several = model.generate(prompts[:1], max_new_tokens=8, eos_token_id=[-1, whole[3]])
    assert several[0, 6:].tolist() == whole[: whole.index(whole[3]) + 1]
    model.config.max_position_embeddings = 6
    for prompt in (known[1], known[0] * 5):
        found = model.generate(torch.tensor([prompt]), max_new_tokens=40, eos_token_id=-1)
        assert found[0, len(prompt) :].tolist() == expected(prompt, 40, window=5)
    # The weights of a cold pool are larger than any float.
    found = model.generate(prompts[:1], max_new_tokens=8, temperature=0.01, eos_token_id=-1)
    assert found[0, 6:].tolist() == whole
    with pytest.raises(ValueError, match=r"temperature 0.7: must be 1/n"):
        model.generate(prompts, temperature=0.7)
    with pytest.raises(ValueError, match=r"num_samples 3: temperature 0.2 needs 5"):
        model.generate(prompts, temperature=0.2, num_samples=3)
    # As callers of other models write it; what would change the samples is refused.
    found = model.generate(prompts, do_sample=True, max_new_tokens=9, eos_token_id=-1)
    assert found[:, 6:].tolist() == [expected(row, 9) for row in prompts.tolist()]
    for options in ({"do_sample": False}, {"top_p": 0.9, "num_beams": 2}):
        with pytest.raises(ValueError, match=f"generate: {', '.join(options)}.*: not for this"):
            model.generate(prompts, **options)


def test_the_tokenizer_is_exported_for_auto_tokenizer(tmp_path: Path) -> None:
    """It gives the tokens that the package's gives, and names those around documents."""
    from transformers import AutoTokenizer

    ours = train_tokenizer(["the sea and the sky"], 270, tmp_path / "tokenizer.json")
    model = tiny_model(vocab_size=ours.vocab_size)
    values = model.recipe.to_dict()
    values["data"]["tokenizer"] = str(ours.path)
    model = dataclasses.replace(model, recipe=type(model.recipe).from_dict(values))
    write_run(model, tmp_path / "run", ours.fingerprint)
    export_checkpoint(tmp_path / "run", out := tmp_path / "out")
    found = AutoTokenizer.from_pretrained(out)
    text = "the sea, é and 海"
    assert found(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    assert found.bos_token_id == ours.begin_id and found.eos_token_id == ours.end_id
    assert found.pad_token_id == ours.pad_id
    assert load_tokenizer(out).fingerprint == ours.fingerprint


def test_another_precision_and_saved_again(tmp_path: Path) -> None:
    """Its configuration then has the autoencoder's, so that the copy needs no subdirectory."""
    model = auto(exported(tmp_path, 2), dtype=torch.bfloat16)
    prompts = torch.tensor([[5, 6, 7]])
    found = model.generate(prompts, max_new_tokens=7, temperature=0.5, eos_token_id=-1)
    assert found.shape == (1, 10)
    model.save_pretrained(tmp_path / "again")
    again = auto(tmp_path / "again", dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_samples_vary_and_are_reproducible(tmp_path: Path) -> None:
    model = auto(exported(tmp_path, 4))
    prompts = torch.tensor([[5, 6, 7]] * 20)

    def texts(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "eos_token_id": -1}
        return model.generate(prompts, generator=generator, **options).tolist()

    assert texts(0) == texts(0) != texts(1)
    assert len(set(map(tuple, texts(0)))) > 5
