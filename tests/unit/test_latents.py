"""Writing data stores: contents, identity, resumption and refusals."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calm_dist.data import latents
from calm_dist.data.latents import finished_store, plan_store, read_meta, write_store
from calm_dist.data.stream import open_store, open_training_stream
from calm_dist.errors import DataError
from calm_dist.interop.huggingface import load_autoencoder, save_autoencoder
from calm_dist.models.autoencoder import Autoencoder, AutoencoderConfig
from calm_dist.recipe import load_recipe
from calm_dist.text.corpus import ShuffledDocuments, pack_blocks
from calm_dist.text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

REPOSITORY = Path(__file__).parents[2]
BLOCK, SHARD_BYTES = 32, 4096
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "that", "dog", "run"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """corpus.jsonl, tokenizer.json and a small untrained autoencoder."""
    root = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 5 + i % 50)) for i in range(150)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (root / "corpus.jsonl").write_text("".join(lines))
    tokenizer = train_tokenizer(texts, 280, root / "tokenizer.json")
    torch.manual_seed(0)
    config = AutoencoderConfig(
        vocab_size=tokenizer.vocab_size,
        patch_size=4,
        latent_size=6,
        hidden_size=16,
        intermediate_size=32,
    )
    (root / "autoencoder").mkdir()
    save_autoencoder(Autoencoder(config), root / "autoencoder")
    return root


def tokenizer_of(inputs: Path) -> Tokenizer:
    return load_tokenizer(inputs / "tokenizer.json")


def plan_for(inputs: Path, **changes: object) -> latents.StorePlan:
    options: dict = {
        "variant": "fp16",
        "block_size": BLOCK,
        "autoencoder": inputs / "autoencoder",
        "seed": 5,
        "token_dtype": "uint32",
        **changes,
    }
    return plan_store([inputs / "corpus.jsonl"], tokenizer_of(inputs), **options)


def write(inputs: Path, out: Path, **changes: object) -> latents.StoreMeta:
    plan = plan_for(inputs, **changes)
    model = load_autoencoder(inputs / "autoencoder") if plan.variant == "fp16" else None
    return write_store(
        out,
        [inputs / "corpus.jsonl"],
        tokenizer_of(inputs),
        plan,
        autoencoder=model,
        # Does not divide the blocks of a shard.
        batch_size=5,
        shard_bytes=SHARD_BYTES,
    )


def contents(out: Path) -> dict[str, bytes]:
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file()
    }


def expected_blocks(inputs: Path) -> list[np.ndarray]:
    documents = ShuffledDocuments([inputs / "corpus.jsonl"], seed=5)
    return list(pack_blocks(documents, tokenizer_of(inputs), BLOCK, 4, seed=5))


def test_store_holds_the_blocks_and_what_the_autoencoder_says(inputs: Path, tmp_path: Path) -> None:
    meta = write(inputs, tmp_path / "out")
    store = open_store(tmp_path / "out")
    blocks = expected_blocks(inputs)
    assert len(store) == meta.num_blocks == len(blocks) > 100
    assert meta.num_tokens == len(blocks) * BLOCK
    assert len(list((tmp_path / "out").glob("shard.*.mds"))) > 5
    assert np.array_equal([store[i]["tokens"] for i in range(len(store))], blocks)

    model = load_autoencoder(inputs / "autoencoder")
    with torch.no_grad():
        mean, log_std = model.encode(torch.from_numpy(np.stack(blocks).astype(np.int64)))
    for name, value in (("mean", mean), ("log_std", log_std)):
        stored = np.stack([store[i][name] for i in range(len(store))])
        assert stored.dtype == np.float16 and stored.shape == (len(blocks), BLOCK // 4, 6)
        # fp16 keeps 11 bits.
        np.testing.assert_allclose(stored, value.numpy(), rtol=2**-11, atol=1e-6)
    assert value.std() > 0


def test_meta_names_all_that_the_store_was_made_from(inputs: Path, tmp_path: Path) -> None:
    meta = write(inputs, tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert raw == meta.to_dict() == read_meta(tmp_path / "out").to_dict()
    sha256 = subprocess.run(
        ["sha256sum", inputs / "autoencoder" / "model.safetensors", inputs / "tokenizer.json"],
        capture_output=True, text=True, check=True,
    ).stdout.split()[::2]  # fmt: skip
    assert [raw["autoencoder"]["sha256"], raw["tokenizer"]["sha256"]] == sha256
    assert (tmp_path / "out" / raw["tokenizer"]["file"]).read_bytes() == (
        inputs / "tokenizer.json"
    ).read_bytes()
    assert raw["variant"] == "fp16" and (raw["patch_size"], raw["latent_size"]) == (4, 6)
    assert sorted(contents(tmp_path / "out"))[:2] == ["index.json", "meta.json"]


def test_shards_and_index_equal_those_of_streamings_own_writer(
    inputs: Path, tmp_path: Path
) -> None:
    from calm_dist.compat.streaming import MDSWriter

    write(inputs, tmp_path / "out", variant="tokens", autoencoder=None, patch_size=4)
    per_shard = SHARD_BYTES // (4 * BLOCK)
    blocks = expected_blocks(inputs)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    with MDSWriter(
        out=str(tmp_path / "theirs"),
        columns={"tokens": f"ndarray:uint32:{BLOCK}"},
        hashes=["sha256"],
        size_limit=None,
    ) as writer:
        for i, block in enumerate(blocks):
            if i and i % per_shard == 0:
                writer.flush_shard()
                writer._reset_cache()
            writer.write({"tokens": block})
    assert index == json.loads((tmp_path / "theirs" / "index.json").read_text())
    for path in (tmp_path / "theirs").glob("*.mds"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


# With three parts, the kill comes in the second.
@pytest.mark.parametrize(("parts", "shards_before_the_kill"), [(1, 3), (3, 8)])
def test_killed_run_continues_to_the_same_store(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    parts: int,
    shards_before_the_kill: int,
) -> None:
    write(inputs, tmp_path / "unbroken", parts=parts)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED_RUN, inputs, out, str(parts), str(shards_before_the_kill)],
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{Path(__file__).parent}"},
    )
    assert process.wait(240) == -9
    kept = [path.name for path in (out / ".parts").glob("*/*")]
    assert len([name for name in kept if name.isdigit()]) == shards_before_the_kill
    assert [name for name in kept if name.endswith(".tmp")] and not (out / "meta.json").exists()
    assert len(list((out / ".parts").glob("0*.json"))) == (0 if parts == 1 else 1)

    written: list[tuple[Path, int, int]] = []
    original = latents.write_shard

    def watched(*args: Any) -> None:
        written.append(args[:3])
        original(*args)

    monkeypatch.setattr(latents, "write_shard", watched)
    write(inputs, out, parts=parts)
    assert contents(out) == contents(tmp_path / "unbroken")
    total = len(list(out.glob("shard.*.mds")))
    assert len(written) == total - shards_before_the_kill


# Writes a store of argv[3] parts, and dies by SIGKILL in the shard after argv[4] finished ones.
_KILLED_RUN = """
import os, signal, sys
from pathlib import Path
from calm_dist.data import latents
from calm_dist.compat.streaming import MDSWriter
import test_latents

inputs, out = Path(sys.argv[1]), Path(sys.argv[2])
parts, shards = int(sys.argv[3]), int(sys.argv[4])
write = MDSWriter.write
def die_in_shard(self, sample):
    write(self, sample)
    if len(list((out / ".parts").glob("*/*[0-9]"))) == shards:
        os.kill(os.getpid(), signal.SIGKILL)
MDSWriter.write = die_in_shard
test_latents.write(inputs, out, parts=parts)
"""


def test_finished_store_is_left_alone_whatever_path_the_autoencoder_has(
    inputs: Path, tmp_path: Path
) -> None:
    meta = write(inputs, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    shutil.copytree(inputs / "autoencoder", tmp_path / "copy")
    assert write(inputs, tmp_path / "out", autoencoder=tmp_path / "copy") == meta
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_workers_write_the_store_of_one_process(inputs: Path, tmp_path: Path) -> None:
    """Latents too; and meta.json has one path, also where workers have copies of the weights."""
    write(inputs, tmp_path / "one", parts=4)
    shutil.copytree(inputs / "autoencoder", tmp_path / "copy")
    out = tmp_path / "out"
    for worker, directory in (((0, 2), inputs / "autoencoder"), ((1, 2), tmp_path / "copy")):
        latents.write_parts(
            out,
            [inputs / "corpus.jsonl"],
            tokenizer_of(inputs),
            plan_for(inputs, parts=4, autoencoder=directory),
            worker=worker,
            autoencoder=load_autoencoder(directory),
            batch_size=5,
            shard_bytes=SHARD_BYTES,
        )
    assert contents(out) == contents(tmp_path / "one")


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"block_size": 64}, r"block_size \(32 there, 64 now\)"),
        ({"seed": 6}, r"seed \(5 there, 6 now\)"),
        ({"variant": "tokens", "autoencoder": None, "patch_size": 4}, "variant"),
    ],
)
def test_store_of_another_plan_is_refused_finished_or_begun(
    inputs: Path, tmp_path: Path, changes: dict, differs: str
) -> None:
    out = tmp_path / "out"
    write(inputs, out)
    with pytest.raises(DataError, match=differs + r".*--overwrite"):
        write(inputs, out, **changes)
    begun = tmp_path / "begun"
    (begun / ".parts").mkdir(parents=True)
    (begun / ".parts" / "plan.json").write_text(json.dumps(plan_for(inputs).to_dict()))
    with pytest.raises(DataError, match=differs):
        write(inputs, begun, **changes)


def test_other_autoencoder_tokenizer_and_corpus_are_refused(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(inputs, out)
    other = tmp_path / "other"
    shutil.copytree(inputs, other)
    model = load_autoencoder(other / "autoencoder")
    next(model.parameters()).mul_(2)
    save_autoencoder(model, other / "autoencoder")
    with pytest.raises(DataError, match="another autoencoder"):
        finished_store(out, plan_for(inputs, autoencoder=other / "autoencoder"))
    (other / "tokenizer.json").write_text((inputs / "tokenizer.json").read_text() + "\n")
    with pytest.raises(DataError, match="another tokenizer"):
        finished_store(out, plan_for(other, autoencoder=inputs / "autoencoder"))
    shutil.copyfile(inputs / "tokenizer.json", other / "tokenizer.json")
    with (other / "corpus.jsonl").open("a") as stream:
        stream.write('{"text": "more"}\n')
    with pytest.raises(DataError, match="another corpus_sha256"):
        finished_store(out, plan_for(other, autoencoder=inputs / "autoencoder"))


def test_overwrite_replaces_a_store_but_no_other_files(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(inputs, out)
    plan = plan_for(inputs, block_size=64, variant="tokens", autoencoder=None, patch_size=4)
    corpus = [inputs / "corpus.jsonl"]
    write_store(out, corpus, tokenizer_of(inputs), plan, overwrite=True)
    assert open_store(out).meta.block_size == 64
    assert len(list(out.glob("shard.*"))) == 1
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="is not a data store"):
            write_store(tmp_path / "home", corpus, tokenizer_of(inputs), plan, overwrite=overwrite)
    assert (tmp_path / "home" / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 30}, "block size 30: must be a positive multiple of the patch size 4"),
        ({"patch_size": 2}, "patch size 2: the autoencoder .* has 4"),
        ({"autoencoder": None}, "needs an autoencoder"),
        ({"autoencoder": Path("/nowhere")}, r"/nowhere/config.json: is not the configuration"),
        ({"variant": "tokens"}, "uses no autoencoder"),
        ({"variant": "tokens", "autoencoder": None}, "give --patch-size"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: Path, changes: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        plan_for(inputs, **changes)


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [
        (279, "has 280 entries, more than the 279 of the autoencoder .*; use its own tokenizer"),
        ("280", "config.json: is not the configuration of an autoencoder"),
        (0, "config.json: is not the configuration of an autoencoder"),
    ],
)
def test_autoencoder_without_room_for_the_tokenizer_is_refused(
    inputs: Path, tmp_path: Path, vocab_size: object, message: str
) -> None:
    other = tmp_path / "autoencoder"
    shutil.copytree(inputs / "autoencoder", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": vocab_size}))
    with pytest.raises(DataError, match=message):
        plan_for(inputs, autoencoder=other)


def test_autoencoder_with_a_token_more_than_the_tokenizer(inputs: Path, tmp_path: Path) -> None:
    """As the released ones: the store, and so the model, have the autoencoder's vocabulary."""
    config = load_autoencoder(inputs / "autoencoder").config
    larger = Autoencoder(replace(config, vocab_size=config.vocab_size + 1))
    (tmp_path / "autoencoder").mkdir()
    save_autoencoder(larger, tmp_path / "autoencoder")
    plan = plan_for(inputs, autoencoder=tmp_path / "autoencoder")
    assert plan.vocab_size == 281 == tokenizer_of(inputs).vocab_size + 1
    corpus = [inputs / "corpus.jsonl"]
    write_store(tmp_path / "out", corpus, tokenizer_of(inputs), plan, autoencoder=larger)

    stream = open_training_stream([tmp_path / "out"], batch_size=2)
    assert next(iter(stream))["mean"].shape == (2, 8, 6)
    (meta,) = stream.metas
    recipe = load_recipe(
        REPOSITORY / "recipes" / "calm_tiny.yaml",
        ["model.vocab_size=null", "model.latent_size=6", "data.block_size=32"],
    ).with_store(meta.to_dict())
    recipe = recipe.with_autoencoder(asdict(larger.config))
    assert recipe.model.vocab_size == 281

    # Where the autoencoder says which tokenizer it was trained with, the size does not matter.
    (tmp_path / "autoencoder" / "state.json").write_text(json.dumps({"tokenizer_sha256": "f" * 64}))
    with pytest.raises(DataError, match="trained with ffffffffffff"):
        plan_for(inputs, autoencoder=tmp_path / "autoencoder")


def test_tokenizer_of_the_same_size_is_told_from_the_autoencoders_own(
    inputs: Path, tmp_path: Path
) -> None:
    """Checkpoints of this project say which tokenizer they were trained with."""
    trained = tmp_path / "autoencoder"
    shutil.copytree(inputs / "autoencoder", trained)
    state = {"tokenizer_sha256": tokenizer_of(inputs).fingerprint}
    (trained / "state.json").write_text(json.dumps(state))
    assert plan_for(inputs, autoencoder=trained).latent_size == 6
    (trained / "state.json").write_text(json.dumps({"tokenizer_sha256": "f" * 64}))
    with pytest.raises(DataError, match=r"trained with ffffffffffff"):
        plan_for(inputs, autoencoder=trained)


def test_text_shorter_than_a_block_and_broken_weights_are_refused(
    inputs: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="less than one block of 65536 tokens"):
        write(inputs, tmp_path / "short", block_size=65536)
    plan = plan_for(inputs)
    model = load_autoencoder(inputs / "autoencoder")
    for parameter in model.parameters():
        parameter.mul_(1e8)
    with pytest.raises(DataError, match="not finite in fp16"):
        write_store(
            tmp_path / "out",
            [inputs / "corpus.jsonl"],
            tokenizer_of(inputs),
            plan,
            autoencoder=model,
        )


def test_command_writes_then_skips_without_torch(inputs: Path, tmp_path: Path) -> None:
    command: list[str | Path] = [
        sys.executable, "-X", "importtime", "tools/encode_latents.py",
        "--autoencoder", inputs / "autoencoder", "--tokenizer", inputs / "tokenizer.json",
        "--corpus", inputs / "corpus.jsonl", "--out", tmp_path / "out", "--block-size", "32",
    ]  # fmt: skip
    runs = []
    for _ in range(2):
        start = time.monotonic()
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
        )
        torch = re.search(r"\| +torch\n", done.stderr) is not None
        runs.append((done.stdout, torch, time.monotonic() - start))
    assert "blocks of 32 tokens written" in runs[0][0] and runs[0][1]
    assert "already there and complete" in runs[1][0] and not runs[1][1]


def test_small_vocabulary_is_stored_in_half_the_bytes(inputs: Path, tmp_path: Path) -> None:
    """And a store that is there keeps its type."""
    options = {"variant": "tokens", "autoencoder": None, "patch_size": 4}
    wide = write(inputs, tmp_path / "wide", **options)
    auto = write(inputs, tmp_path / "auto", token_dtype="auto", **options)
    assert (wide.token_dtype, auto.token_dtype) == ("uint32", "uint16")
    assert "token_dtype" not in json.loads((tmp_path / "wide" / "meta.json").read_text())
    stores = [open_store(tmp_path / name) for name in ("wide", "auto")]
    first, second = ([store[i]["tokens"] for i in range(len(store))] for store in stores)
    assert np.array_equal(first, second) and second[0].dtype == np.uint16
    sizes = [sum(file.stat().st_size for file in (tmp_path / name).glob("shard.*"))
             for name in ("wide", "auto")]  # fmt: skip
    assert sizes[1] < 0.6 * sizes[0]
    batch = next(iter(open_training_stream([tmp_path / "auto"], batch_size=2)))
    assert batch["tokens"].dtype == torch.int64
    assert np.array_equal(batch["tokens"], [first[i] for i in batch["index"].tolist()])
    for name in ("wide", "auto"):
        plan = plan_for(inputs, token_dtype="auto", out=tmp_path / name, **options)
        assert finished_store(tmp_path / name, plan) is not None
    with pytest.raises(DataError, match=r"token_dtype .*uint32 there, uint16 now"):
        finished_store(tmp_path / "wide", plan_for(inputs, token_dtype="uint16", **options))
