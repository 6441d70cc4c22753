"""tools/evaluate.py on real checkpoints, autoencoders and data stores."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model

from calm_dist.data.latents import plan_store, write_store
from calm_dist.data.tokenizer import Tokenizer, train_tokenizer
from calm_dist.evaluation.load import LoadedModel
from calm_dist.interop.autoencoder import save_autoencoder
from calm_dist.training import checkpoint
from calm_dist.training.checkpoint import model_state
from calm_dist.training.checkpoint.run_state import RunState

TOOL = Path(__file__).parents[2] / "tools" / "evaluate.py"
TEXT = [f"a small text, number {number}: {number * number}" for number in range(60)]
VOCAB = 280


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(TEXT))
    return path


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> Tokenizer:
    return train_tokenizer(TEXT, VOCAB, corpus.parent / "tokenizer.json")


def write_run(model: LoadedModel, run: Path, tokenizer_sha256: str | None) -> None:
    """A run directory with one checkpoint, and the autoencoder beside it."""
    run.mkdir()
    values = model.recipe.to_dict()
    if model.autoencoder is not None:
        (run / "autoencoder").mkdir()
        save_autoencoder(model.autoencoder, run / "autoencoder", {})
        values["model"]["autoencoder"] = str(run / "autoencoder")
    recipe = type(model.recipe).from_dict(values).to_yaml()
    temporary = checkpoint.begin(run, 3)
    model_state.save_weights(temporary, model.body, model._head)
    RunState(step=3, tokens=4096, tokenizer_sha256=tokenizer_sha256, data={"steps_done": 3}).write(
        temporary
    )
    for directory in (run, temporary):
        (directory / checkpoint.RECIPE_FILE).write_text(recipe)
    checkpoint.commit(temporary, keep=1)


def evaluate(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """The tool's exit code."""
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(TOOL), run_name="__main__")
    return int(end.value.code or 0)


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_patch_sizes(
    patch_size: int,
    tmp_path: Path,
    corpus: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """CALM on stored latents and on tokens alone, and the Transformer, with both alignments."""
    sha256 = tokenizer.fingerprint
    calm = tiny_model(patch_size=patch_size, block_steps=24 // patch_size, vocab_size=VOCAB)
    write_run(calm, tmp_path / "calm", sha256)
    write_run(tiny_model("transformer", vocab_size=VOCAB), tmp_path / "transformer", sha256)
    kinds: dict[Any, dict[str, Any]] = {
        "fp16": {"autoencoder": tmp_path / "calm" / "autoencoder"},
        "tokens": {"patch_size": patch_size},
    }
    for variant, facts in kinds.items():
        plan = plan_store([corpus], tokenizer, variant=variant, block_size=24, **facts)
        encoder = calm.autoencoder if variant == "fp16" else None
        write_store(tmp_path / variant, [corpus], tokenizer, plan, autoencoder=encoder)

    def measure(run: str, store: str, alignment: str) -> dict[str, Any]:
        code = evaluate(
            monkeypatch,
            *("--checkpoint", tmp_path / run, "--data", tmp_path / store, "--blocks", "4"),
            *("--samples", "3", "--alignment", alignment, "--json", tmp_path / "result.json"),
        )
        assert code == 0, capsys.readouterr().err
        return json.loads((tmp_path / "result.json").read_text())

    for alignment, stride in (("patch", patch_size), ("all", 1)):
        starts = list(range(patch_size, 21, stride))
        stored = measure("calm", "fp16", alignment)
        assert stored["protocol"]["positions"] == 4 * len(starts)
        assert stored["protocol"]["starts"] == {
            "first": patch_size,
            "last": starts[-1],
            "stride": stride,
            "per_block": len(starts),
        }
        assert all(-1 <= value <= 1 for value in stored["brier"])
        # The same blocks and seeds: the same draws, and posteriors that fp16 has rounded.
        encoded = measure("calm", "tokens", alignment)
        assert encoded["brier"] == stored["brier"]
        assert encoded["energy_loss"] == pytest.approx(stored["energy_loss"], rel=1e-2)
        transformer = measure("transformer", "tokens", alignment)
        assert transformer["protocol"]["starts"] == stored["protocol"]["starts"]
    records = (tmp_path / "calm" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["eval"]["protocol"]["alignment"] for line in records] == [
        *("patch", "patch", "all", "all")
    ]


def test_blocks_that_are_too_short(
    tmp_path: Path,
    corpus: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_run(tiny_model(patch_size=2, vocab_size=VOCAB), tmp_path / "calm", None)
    plan = plan_store([corpus], tokenizer, variant="tokens", block_size=4, patch_size=2)
    write_store(tmp_path / "store", [corpus], tokenizer, plan)
    arguments = ("--checkpoint", tmp_path / "calm", "--data", tmp_path / "store")
    assert evaluate(monkeypatch, *arguments) == 2
    assert "data.block_size 4: too short for an n-gram of 4 tokens" in capsys.readouterr().err
