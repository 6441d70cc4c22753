"""Conversions of whole checkpoints: to the bit both ways, and nothing left behind on failure."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from warm import warm_python

from calm_dist.data.latents import plan_store, write_store
from calm_dist.errors import CheckpointError, DataError, UserError
from calm_dist.inference.generate import generate
from calm_dist.inference.load import load_model, load_text_model
from calm_dist.interop import convert
from calm_dist.interop.convert import export_checkpoint, import_checkpoint
from calm_dist.interop.huggingface import load_autoencoder, load_calm
from calm_dist.models.autoencoder import Autoencoder, AutoencoderConfig
from calm_dist.recipe import CalmModel, Recipe, load_recipe
from calm_dist.runs import checkpoints
from calm_dist.text.tokenizer import Tokenizer, train_tokenizer

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
TOOL = ROOT / "tools" / "convert_checkpoint.py"
# The tokenizer of `worded`: 259 is the smallest vocabulary, the model has one more.
VOCABULARY = 260


def files_of(directory: Path) -> dict[str, bytes]:
    files = (file for file in sorted(directory.rglob("*")) if file.is_file())
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}


EMBEDDING, OUTPUT = "encoder.embed_tokens.weight", "decoder.lm_head_weight"


def pickled(directory: Path) -> dict[str, torch.Tensor]:
    return torch.load(directory / "pytorch_model.bin", weights_only=True)


def as_exported(released: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the name from which the authors' class cannot restore a tied pair."""
    return {n: t for n, t in released.items() if not n.endswith(EMBEDDING)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    return train_tokenizer(["a few words of text, again a few words"] * 4, 259, path)


@pytest.fixture(scope="module")
def worded(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A released CALM with the tokenizer in it, and one token more than that."""
    directory = tmp_path_factory.mktemp("worded")
    for name in ("calm_k4", "ae_k4"):
        shutil.copytree(GOLDEN / name, directory / name)
        grow = {"embed_tokens.weight", "lm_head_weight"}
        weights = pickled(directory / name)
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(VOCABULARY, 32, generator=generator)
        for key in weights:
            if any(key.endswith(ending) for ending in grow):
                weights[key] = rows
        torch.save(weights, directory / name / "pytorch_model.bin")
        config = json.loads((directory / name / "config.json").read_text())
        text = json.dumps(config | {"vocab_size": VOCABULARY})
        (directory / name / "config.json").write_text(text)
    shutil.copyfile(tokenizer.path, directory / "calm_k4" / "tokenizer.json")
    return directory / "calm_k4"


@pytest.mark.parametrize("patch_size", [2, 4])
def test_golden_there_and_back(tmp_path: Path, patch_size: int) -> None:
    """Every released tensor comes back equal, under the same names, and loads again."""
    source = GOLDEN / f"calm_k{patch_size}"
    done = import_checkpoint(source, tmp_path / "run")
    # Counted by the authors' code, without autoencoder and without the head's second names.
    assert done["parameters"] == {2: 29992, 4: 67184}[patch_size]
    export_checkpoint(tmp_path / "run", tmp_path / "released")

    for found, expected in (
        (tmp_path / "released", source),
        (tmp_path / "released" / "autoencoder", GOLDEN / f"ae_k{patch_size}"),
    ):
        exported = load_file(found / "model.safetensors")
        released = as_exported(pickled(expected))
        assert exported.keys() == released.keys()
        for name, tensor in released.items():
            assert torch.equal(exported[name], tensor), name
        old, new = (json.loads((d / "config.json").read_text()) for d in (expected, found))
        assert {key: new.get(key) for key in old if key != "ae_path"} == {
            key: value for key, value in old.items() if key != "ae_path"
        }

    tokens = load_file(source / "io.safetensors")["input_ids"]
    expected_hidden = load_calm(source).hidden(tokens)
    assert torch.equal(load_calm(tmp_path / "released").hidden(tokens), expected_hidden)
    assert torch.equal(load_model(tmp_path / "run").hidden(tokens), expected_hidden)


@pytest.mark.parametrize("kind", ["flow", "diffusion"])
def test_other_heads_there_and_back(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "calm_k2", source)
    weights = {
        name: tensor
        for name, tensor in pickled(source).items()
        if not name.startswith(("mlp_generator.", "generative_head."))
    }
    head = load_file(GOLDEN / f"{kind}_head.safetensors")
    weights |= {f"generative_head.{name}": tensor for name, tensor in head.items()}
    torch.save(weights, source / "pytorch_model.bin")
    config = json.loads((source / "config.json").read_text())
    config["architectures"] = [f"{kind.capitalize()}Transformer"]
    (source / "config.json").write_text(json.dumps(config))

    import_checkpoint(source, tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "released")
    exported = load_file(tmp_path / "released" / "model.safetensors")
    weights = as_exported(weights)
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in weights.items())
    values = json.loads((tmp_path / "released" / "config.json").read_text())
    assert (values["architectures"], values["model_type"]) == (config["architectures"], kind)


def test_export_import_export_gives_the_same_files(tmp_path: Path, worded: Path) -> None:
    """At the same place: ae_path is absolute, so that the authors' classes find it."""
    import_checkpoint(worded, tmp_path / "first")
    export_checkpoint(tmp_path / "first", tmp_path / "released")
    before = files_of(tmp_path / "released")
    both = ["config.json", "model.safetensors"]
    inside = {f"autoencoder/{name}" for name in both}
    tokenizer_files = {"tokenizer.json", "tokenizer_config.json"}
    assert before.keys() == {*tokenizer_files, "modeling_calm_dist.py", *both, *inside}
    ae_path = json.loads(before["config.json"])["ae_path"]
    assert Path(ae_path).samefile(tmp_path / "released" / "autoencoder")
    # The table has rows that pad it to shards; the released one has none.
    rows = load_file(tmp_path / "released" / "model.safetensors")["transformer.embed_tokens.weight"]
    assert rows.shape == (VOCABULARY, 32)

    import_checkpoint(tmp_path / "released", tmp_path / "second")
    shutil.rmtree(tmp_path / "released")
    export_checkpoint(tmp_path / "second", tmp_path / "released")
    assert files_of(tmp_path / "released") == before


def test_imported_run(tmp_path: Path, worded: Path, tokenizer: Tokenizer) -> None:
    """It is evaluated and generated from like any other, also where it is moved to."""
    import_checkpoint(worded, tmp_path / "run")
    assert checkpoints.find_checkpoint(tmp_path / "run").name == "step_00000000"
    state = json.loads((checkpoints.find_checkpoint(tmp_path / "run") / "state.json").read_text())
    assert state["weights_only"] is True and state["adam_steps"] == 0
    assert state["tokenizer_sha256"] == tokenizer.fingerprint
    assert files_of(tmp_path / "run" / "autoencoder") == {
        name: (worded.parent / "ae_k4" / name).read_bytes()
        for name in ("config.json", "pytorch_model.bin")
    }

    here = load_model(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    there = load_model(tmp_path / "moved")
    texts = [
        generate(model, tokenizer, "a few", max_new_tokens=9, seed=3)
        for model in (load_calm(worded), here, there)
    ]
    assert len(texts[0].tokens) == 9
    assert texts[0] == texts[1] == texts[2]
    assert there.recipe.data.tokenizer == str(tmp_path / "moved" / "tokenizer.json")
    assert there.autoencoder_sha256 == load_calm(worded).autoencoder_sha256


def test_recipe_goes_on_as_calm_m_trains(tmp_path: Path) -> None:
    import_checkpoint(GOLDEN / "calm_k4", tmp_path / "run")
    found = load_recipe(tmp_path / "run" / "recipe.yaml").to_dict()
    usual = load_recipe(ROOT / "recipes" / "calm_m.yaml").to_dict()
    # Of any size, on any number of processes.
    assert found["training"].pop("micro_batch_size") == 1
    del usual["training"]["micro_batch_size"]
    for section in ("training", "precision", "checkpoint"):
        assert found[section] == usual[section], section
    assert found["data"]["path"] == usual["data"]["path"]
    assert found["data"]["block_size"] == 4 * 2048
    assert found["model"]["init"] == usual["model"]["init"]
    assert found["model"]["autoencoder_size"] == {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
    }


def test_autoencoder_inside_the_weights_is_taken_out(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "calm_k4", source)
    import_checkpoint(source, tmp_path / "run")
    taken = load_autoencoder(tmp_path / "run" / "autoencoder")
    expected = load_autoencoder(GOLDEN / "ae_k4")
    assert taken.config == expected.config
    for name, tensor in expected.state_dict().items():
        assert torch.equal(taken.state_dict()[name], tensor), name


@pytest.mark.parametrize("form", ["pickle", "shards"])
def test_autoencoder_there_and_back(tmp_path: Path, form: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "ae_k2", source)
    weights = pickled(source)
    if form == "shards":
        (source / "pytorch_model.bin").unlink()
        for number, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2])):
            part = {name: weights[name].clone() for name in names}
            save_file(part, source / f"model-{number}.safetensors")
        placed = {n: f"model-{i % 2}.safetensors" for i, n in enumerate(sorted(weights))}
        index = json.dumps({"weight_map": placed})
        (source / "model.safetensors.index.json").write_text(index)
    import_checkpoint(source, tmp_path / "ours")
    assert set(files_of(tmp_path / "ours")) == {"config.json", "model.safetensors"}
    expected = load_autoencoder(GOLDEN / "ae_k2").state_dict()
    for name, tensor in load_autoencoder(tmp_path / "ours").state_dict().items():
        assert torch.equal(tensor, expected[name]), name

    export_checkpoint(tmp_path / "ours", tmp_path / "released")
    exported = load_file(tmp_path / "released" / "model.safetensors")
    weights = as_exported(weights)
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in weights.items())
    config = json.loads((tmp_path / "released" / "config.json").read_text())
    assert (
        config["pad_token_id"] == json.loads((source / "config.json").read_text())["pad_token_id"]
    )


def with_their_names(model: Autoencoder) -> Autoencoder:
    """Our modules as the authors' class registers them: one parameter under two names."""
    model.decoder.lm_head_weight = model.encoder.embed_tokens.weight
    return model.train().requires_grad_(True)


def load_as_they_do(directory: Path) -> Autoencoder:
    """`from_pretrained` of transformers 4.43, as far as it matters to tied parameters.

    Where the file has the model's first tensor, in the model's dtype, each tensor of the file
    becomes a parameter; otherwise it is copied into the parameters that are there.
    """
    weights = load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    fields = {field.name for field in dataclasses.fields(AutoencoderConfig)}
    torch.manual_seed(0)
    model = with_their_names(
        Autoencoder(AutoencoderConfig(**{k: v for k, v in config.items() if k in fields}))
    )
    first = next(iter(model.state_dict()))
    assert first == EMBEDDING
    missing = model.load_state_dict(weights, strict=False, assign=first in weights)
    assert not missing.unexpected_keys
    return model


def train_as_they_do(model: Autoencoder) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.arange(32).reshape(2, 16)
    for _ in range(3):
        hidden = model.decoder(model.encode(tokens)[0]).flatten(-3, -2)
        logits = F.linear(hidden, model.decoder.get_parameter("lm_head_weight"))
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("source", ["ours", "exported", "beside a calm", "inside a calm"])
def test_authors_class_ties_what_we_write(tmp_path: Path, source: str) -> None:
    """Loaded and trained by their rules, an autoencoder stays one that can be imported."""
    if source in ("ours", "exported"):
        import_checkpoint(GOLDEN / "ae_k4", tmp_path / "ours")
        export_checkpoint(tmp_path / "ours", tmp_path / "exported")
        directory = tmp_path / source
    else:
        import_checkpoint(GOLDEN / "calm_k4", tmp_path / "run")
        export_checkpoint(tmp_path / "run", tmp_path / "calm")
        directory = tmp_path / "calm" / "autoencoder"
        if source == "inside a calm":
            whole = load_file(tmp_path / "calm" / "model.safetensors")
            inside = {n.removeprefix("ae_model."): t for n, t in whole.items() if "ae_model." in n}
            save_file(inside, directory / "model.safetensors")

    theirs = load_as_they_do(directory)
    assert theirs.decoder.lm_head_weight is theirs.encoder.embed_tokens.weight
    expected = pickled(GOLDEN / "ae_k4")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, expected[name]), name

    train_as_they_do(theirs)
    trained = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    assert not torch.equal(trained[OUTPUT], expected[OUTPUT])
    save_file(trained, directory / "model.safetensors")
    import_checkpoint(directory, tmp_path / "again")
    ours = load_autoencoder(tmp_path / "again")
    assert torch.equal(ours.output_weight, trained[OUTPUT])


@pytest.mark.parametrize("place", ["autoencoder", "inside a calm"])
def test_autoencoder_that_came_untied(tmp_path: Path, place: str) -> None:
    """Of a file with both names their class makes two parameters, which ours cannot be."""
    shutil.copytree(GOLDEN / "ae_k4", tmp_path / "ae_k4")
    save_file(
        {name: tensor.clone() for name, tensor in pickled(tmp_path / "ae_k4").items()},
        tmp_path / "ae_k4" / "model.safetensors",
    )
    theirs = load_as_they_do(tmp_path / "ae_k4")
    train_as_they_do(theirs)
    weights = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    moved = (weights[EMBEDDING] - weights[OUTPUT]).abs().max().item()
    assert moved > 0
    source = tmp_path / "ae_k4"
    if place == "inside a calm":
        source = tmp_path / "calm_k4"
        shutil.copytree(GOLDEN / "calm_k4", source)
        shutil.rmtree(tmp_path / "ae_k4")
        weights = pickled(source) | {f"ae_model.{name}": t for name, t in weights.items()}
        (source / "pytorch_model.bin").unlink()
    save_file({n: t.clone() for n, t in weights.items()}, source / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        import_checkpoint(source, tmp_path / "ours")
    for part in (EMBEDDING, OUTPUT, f"{moved:.3g}", "4.43", "alone"):
        assert part in str(caught.value), str(caught.value)
    assert "damaged" not in str(caught.value)
    assert not (tmp_path / "ours").exists()


def test_tokenizer_that_does_not_fit(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="259 entries, the model only 160"):
        import_checkpoint(GOLDEN / "calm_k4", tmp_path / "run", tokenizer=tokenizer.path)
    with pytest.raises(DataError, match="no such file"):
        import_checkpoint(GOLDEN / "calm_k4", tmp_path / "run", tokenizer=tmp_path / "none.json")
    # One that only lies there is left out.
    for name in ("calm_k4", "ae_k4"):
        shutil.copytree(GOLDEN / name, tmp_path / name)
    shutil.copyfile(tokenizer.path, tmp_path / "calm_k4" / "tokenizer.json")
    done = import_checkpoint(tmp_path / "calm_k4", tmp_path / "run")
    assert any("not used" in note for note in done["notes"])
    assert load_recipe(tmp_path / "run" / "recipe.yaml").data.tokenizer is None


def test_target_must_be_new(tmp_path: Path) -> None:
    for name, make in (("file", Path.touch), ("full", lambda p: p.mkdir() or (p / "a").touch())):
        make(tmp_path / name)
        with pytest.raises(UserError, match="not empty"):
            import_checkpoint(GOLDEN / "ae_k4", tmp_path / name)
    (tmp_path / "empty").mkdir()
    import_checkpoint(GOLDEN / "ae_k4", tmp_path / "empty")
    # Whoever may read the one file may read the other.
    modes = {(tmp_path / "empty" / name).stat().st_mode for name in files_of(tmp_path / "empty")}
    assert len(modes) == 1
    with pytest.raises(UserError, match="not empty"):
        export_checkpoint(tmp_path / "empty", tmp_path / "empty")


def broken_sources(directory: Path) -> Iterator[Path]:
    for name, damage in (
        ("weights", lambda d: (d / "pytorch_model.bin").write_bytes(b"noise" * 100)),
        ("config", lambda d: (d / "config.json").write_text("{}")),
    ):
        shutil.copytree(GOLDEN / "calm_k4", directory / name)
        damage(directory / name)
        yield directory / name


def test_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    sources, targets = tmp_path / "sources", tmp_path / "targets"
    targets.mkdir()
    for source in broken_sources(sources):
        with pytest.raises(CheckpointError, match=str(source)):
            import_checkpoint(source, targets / "run")
    # Files cannot grow beyond 100 KiB: the writing of the tensors fails halfway.
    command = ["import-hf", str(GOLDEN / "calm_k4"), str(targets / "run")]
    limited = (
        "import resource, runpy, sys; del sys.argv[0]; size = 100 << 10;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size, size));"
        # A module's compiled form that is cut off at the limit would break every later import.
        "sys.dont_write_bytecode = True; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    failed = subprocess.run(
        [warm_python(), "-c", limited, str(TOOL), *command],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert failed.returncode != 0 and "File too large" in failed.stderr
    assert not list(targets.iterdir())


def transformer_run(directory: Path) -> Path:
    """A checkpoint of the discrete baseline, as far as an export looks at it."""
    values: dict[str, Any] = load_recipe(ROOT / "recipes" / "transformer_tiny.yaml").to_dict()
    temporary = checkpoints.begin(directory, 1)
    (temporary / "recipe.yaml").write_text(Recipe.from_dict(values).to_yaml())
    (temporary / "state.json").write_text("{}")
    checkpoints.commit(temporary, keep=1)
    return directory


def test_sources_that_cannot_be_exported(tmp_path: Path) -> None:
    for source, message in (
        (transformer_run(tmp_path / "transformer"), "transformer"),
        (GOLDEN / "calm_k4", "already"),
        (tmp_path / "nothing", "no such directory"),
    ):
        with pytest.raises(CheckpointError, match=message):
            export_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [warm_python(), str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_tool(tmp_path: Path) -> None:
    done = run_tool("import-hf", GOLDEN / "calm_k4", tmp_path / "run", "--json", "-")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["kind"], report["parameters"]) == ("calm with energy head", 67184)
    assert "data.path" in done.stderr
    failed = run_tool("export-hf", tmp_path / "none", tmp_path / "out")
    assert failed.returncode == 2
    assert failed.stderr.startswith(f"error: {tmp_path / 'none'}")


def test_tokens_that_a_released_configuration_states(
    tmp_path: Path, worded: Path, tokenizer: Tokenizer
) -> None:
    """They are the model's, where they are special tokens; a default such as 1 and 2 is not."""
    shutil.copytree(worded, tmp_path / "model")
    config = json.loads((worded / "config.json").read_text())
    config["ae_path"] = str(worded.parent / "ae_k4")
    own = tokenizer.begin_id, tokenizer.end_id
    for begin, end, expected in (
        (own[1], [own[0], 5], (own[1], own[0])),
        (own[1], None, (own[1], own[1])),
        (40, 41, own),
    ):
        stated = {"bos_token_id": begin, "eos_token_id": end}
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | stated))
        run = tmp_path / f"run{begin}{end}"
        import_checkpoint(tmp_path / "model", run)
        for place in (tmp_path / "model", run):
            loaded = load_text_model(place).tokenizer
            assert (loaded.begin_id, loaded.end_id) == expected, (begin, end, place)


def test_an_imported_model_takes_no_foreign_tokenizer(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store that its recipe names for further training may be there and be of another model."""
    import_checkpoint(GOLDEN / "calm_k4", tmp_path / "run")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("a few words of text. " * 50)
    plan = plan_store([corpus], tokenizer, variant="tokens", block_size=16, patch_size=4)
    monkeypatch.chdir(tmp_path)
    write_store(tmp_path / "data" / "latents" / "train", [corpus], tokenizer, plan)
    for place in (tmp_path / "run", GOLDEN / "calm_k4"):
        with pytest.raises(DataError, match="give the model's tokenizer with --tokenizer"):
            load_text_model(place)


def test_exports_say_what_they_leave_out(tmp_path: Path) -> None:
    import_checkpoint(GOLDEN / "calm_k4", tmp_path / "run")
    (note,) = export_checkpoint(tmp_path / "run", tmp_path / "released")["notes"]
    assert note.startswith("no tokenizer was found")
    model = load_recipe(tmp_path / "run" / "recipe.yaml").model
    assert isinstance(model, CalmModel)
    head = model.head.model_copy(update={"posterior_samples": 7})
    changed = model.model_copy(update={"head": head})
    assert convert._not_exported(changed, tmp_path / "released") == [
        "model.head.posterior_samples: 7 has no place in the released layout; an import has 100"
    ]
