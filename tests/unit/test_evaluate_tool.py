"""tools/evaluate.py on real checkpoints, autoencoders and data stores."""

from __future__ import annotations

import argparse
import json
import os
import resource
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model
from warm import warm_python

from calm_dist.cli.console import add_device
from calm_dist.data.latents import plan_store, write_store
from calm_dist.inference.load import LoadedModel
from calm_dist.released.autoencoder import save_autoencoder
from calm_dist.reports.report import write_report
from calm_dist.runs import checkpoints
from calm_dist.runs.checkpoints.run_state import RunState
from calm_dist.text.tokenizer import Tokenizer, train_tokenizer
from calm_dist.training.checkpoint import model_state

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


def write_run(model: LoadedModel, run: Path, tokenizer_sha256: str | None, step: int = 3) -> None:
    """A run directory with a checkpoint, and the autoencoder beside it."""
    run.mkdir(exist_ok=True)
    values = model.recipe.to_dict()
    if model.autoencoder is not None:
        (run / "autoencoder").mkdir()
        save_autoencoder(model.autoencoder, run / "autoencoder", {})
        values["model"]["autoencoder"] = str(run / "autoencoder")
    recipe = type(model.recipe).from_dict(values).to_yaml()
    temporary = checkpoints.begin(run, step)
    model_state.save_weights(temporary, model.backbone, model._head)
    sha256, data = tokenizer_sha256, {"steps_done": step}
    RunState(step=step, tokens=4096, tokenizer_sha256=sha256, data=data).write(temporary)
    for directory in (run, temporary):
        (directory / checkpoints.RECIPE_FILE).write_text(recipe)
    checkpoints.commit(temporary, keep=9)


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


@pytest.fixture
def scored(tmp_path: Path, corpus: Path, tokenizer: Tokenizer) -> list[str | Path]:
    """Arguments that score a Transformer in the run directory ``tmp_path / "run"``."""
    write_run(tiny_model("transformer", vocab_size=VOCAB), tmp_path / "run", tokenizer.fingerprint)
    plan = plan_store([corpus], tokenizer, variant="tokens", block_size=24, patch_size=4)
    write_store(tmp_path / "store", [corpus], tokenizer, plan)
    arguments = ("--checkpoint", tmp_path / "run", "--data", tmp_path / "store", "--blocks", "2")
    return [*arguments, "--json", tmp_path / "scores.json"]


# Permission bits apply to root as well: CAP_DAC_OVERRIDE (1) is cleared in the three sets of
# capabilities; the last three of the six words hold the capabilities from 32 on.
WITHOUT_OVERRIDE = """
import ctypes, runpy, sys
libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)()
assert libc.capget(header, sets) == 0
for number in range(3):
    sets[number] &= ~(1 << 1)
assert libc.capset(header, sets) == 0
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_run_that_cannot_be_written_is_scored_and_shown(
    tmp_path: Path, scored: list[str | Path]
) -> None:
    run = tmp_path / "run"
    run.chmod(0o555)
    done = subprocess.run(
        [warm_python(), "-c", WITHOUT_OVERRIDE, TOOL, *scored],
        env=os.environ | {"PYTHONPATH": str(TOOL.parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    run.chmod(0o755)
    assert done.returncode == 0, done.stderr
    # Said before the work, in one line.
    assert done.stderr.splitlines()[0] == (
        f"warning: {run / 'metrics.jsonl'}: cannot be written (Permission denied): the scores are "
        "shown, not recorded; reports will lack them"
    )
    assert "BrierLM" in done.stdout and "cross_entropy" in done.stdout
    assert json.loads((tmp_path / "scores.json").read_text())["step"] == 3
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "recipe.yaml"]


def test_metrics_that_are_no_file_do_not_cost_the_scores(
    tmp_path: Path,
    scored: list[str | Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    assert evaluate(monkeypatch, *scored) == 0
    captured = capsys.readouterr()
    assert "cannot be written (Is a directory): the scores are shown" in captured.err
    assert "BrierLM" in captured.out and (tmp_path / "scores.json").is_file()


def test_a_disk_that_fills_up_while_scoring_costs_the_record_alone(
    tmp_path: Path,
    scored: list[str | Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The kernel lets no file grow beyond a limit that half of the record reaches."""
    metrics = tmp_path / "run" / "metrics.jsonl"
    before = b'{"step": 1, "loss": 1.0, "bytes": "\xff"}\n' * 300
    metrics.write_bytes(before)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A module's compiled form that is cut off at the limit would break every later import.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, limits[1]))
        assert evaluate(monkeypatch, *scored) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    captured = capsys.readouterr()
    assert "BrierLM" in captured.out and (tmp_path / "scores.json").is_file()
    assert f"error: {metrics}: step 3 was not recorded (" in captured.err
    assert metrics.read_bytes() == before
    # With room again it is recorded, once.
    assert evaluate(monkeypatch, *scored) == evaluate(monkeypatch, *scored) == 0
    assert metrics.read_bytes().startswith(before)
    assert metrics.read_bytes().count(b'"eval"') == 1


def test_what_was_scored_before_an_error_is_shown(
    tmp_path: Path,
    scored: list[str | Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_run(tiny_model("transformer", vocab_size=VOCAB), tmp_path / "run", "0" * 64, step=4)
    assert evaluate(monkeypatch, *scored, "--all-checkpoints") == 2
    captured = capsys.readouterr()
    assert "error: tokenizer sha256" in captured.err
    assert captured.out.splitlines()[1].split()[0] == "3"
    assert [result["step"] for result in json.loads((tmp_path / "scores.json").read_text())] == [3]


@pytest.mark.parametrize(
    ("block_size", "said"),
    [
        (24, None),
        (48, "longer blocks exceed the trained context"),
        (16, "less context than in training"),
    ],
)
def test_blocks_of_another_size_are_named_everywhere(
    block_size: int,
    said: str | None,
    tmp_path: Path,
    corpus: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Console, JSON, the record of the evaluation, and the report, also of an early record."""
    model = tiny_model("transformer", vocab_size=VOCAB, block_steps=24)
    write_run(model, tmp_path / "run", tokenizer.fingerprint)
    plan = plan_store([corpus], tokenizer, variant="tokens", block_size=block_size, patch_size=4)
    write_store(tmp_path / "store", [corpus], tokenizer, plan)
    arguments = ("--checkpoint", tmp_path / "run", "--data", tmp_path / "store", "--blocks", "2")
    assert evaluate(monkeypatch, *arguments, "--json", tmp_path / "scores.json") == 0
    result = json.loads((tmp_path / "scores.json").read_text())
    sizes = result["protocol"]["block_size"], result["protocol"]["trained_block_size"]
    assert sizes == (block_size, 24)
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert json.loads(metrics.read_text())["eval"] == result
    output = capsys.readouterr().out
    # Recorded before there was such a note: the same measurement, and the same note in a report.
    early = result | {"protocol": dict(result["protocol"])}
    early.pop("block_size_note", None)
    del early["protocol"]["trained_block_size"]
    metrics.write_text(json.dumps({"step": 3, "eval": early}) + "\n")
    assert evaluate(monkeypatch, *arguments) == 0
    assert "step 3: already in" in capsys.readouterr().err
    write_report([tmp_path / "run"], tmp_path / "report")
    words = (tmp_path / "report" / "report.md").read_text()
    expected = f"scored on blocks of {block_size} tokens, trained on blocks of 24"
    if said is None:
        assert "block_size_note" not in result and "trained on blocks" not in output + words
    else:
        assert expected in result["block_size_note"] and said in result["block_size_note"]
        assert output.count(f"warning: {expected}") == 1 and words.count(expected) == 1


def test_an_imported_model_has_no_known_training_block_size(
    tmp_path: Path,
    corpus: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_run(
        tiny_model("transformer", vocab_size=VOCAB, block_steps=24), tmp_path / "run", None, 0
    )
    plan = plan_store([corpus], tokenizer, variant="tokens", block_size=48, patch_size=4)
    write_store(tmp_path / "store", [corpus], tokenizer, plan)
    arguments = ("--checkpoint", tmp_path / "run", "--data", tmp_path / "store", "--blocks", "2")
    assert evaluate(monkeypatch, *arguments, "--json", tmp_path / "scores.json") == 0
    result = json.loads((tmp_path / "scores.json").read_text())
    assert result["protocol"]["trained_block_size"] is None
    said = "not known, its configuration has positions for 24 tokens, and tokens after"
    assert said in result["block_size_note"] and said in capsys.readouterr().out


def test_the_text_may_have_another_key(
    tmp_path: Path,
    corpus: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same documents under another key have the same score."""
    write_run(tiny_model("transformer", vocab_size=VOCAB), tmp_path / "run", tokenizer.fingerprint)
    file = corpus.parent / "tokenizer.json"

    def scores(key: str, *options: str) -> dict[str, Any]:
        documents = ({"id": str(number), key: text} for number, text in enumerate(TEXT))
        lines = "".join(f"{json.dumps(document)}\n" for document in documents)
        (tmp_path / f"{key}.jsonl").write_text(lines)
        code = evaluate(
            monkeypatch,
            *("--checkpoint", tmp_path / "run", "--text", tmp_path / f"{key}.jsonl"),
            *("--tokenizer", file, "--block-size", "24", "--blocks", "2"),
            *("--json", tmp_path / "scores.json"),
            *options,
        )
        assert code == 0, capsys.readouterr().err
        return json.loads((tmp_path / "scores.json").read_text())

    assert scores("content", "--text-key", "content")["brier"] == scores("text")["brier"]
    # Without the option, the error names an option that this tool has.
    arguments = ("--checkpoint", tmp_path / "run", "--text", tmp_path / "content.jsonl")
    assert evaluate(monkeypatch, *arguments, "--tokenizer", file) == 2
    error = capsys.readouterr().err
    assert 'content.jsonl:1: has no "text" string' in error
    assert "--text-key names another key" in error
    assert "--on-bad-line skip of prepare_corpus.py or encode_latents.py" in error


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--alignment-stride", "-1"], "-1: give a whole number from 1"),
        (["--blocks", "0"], "0: give a whole number from 1"),
        (["--samples", "1"], "1: give a whole number from 2"),
        (["--begin-token", "<s>"], "--begin-token: is for --text, not for --data"),
        (["--text-key", "content"], "--text-key: is for --text, not for --data"),
        (["--text-key", ""], "--text-key: is empty; name a key or column"),
    ],
)
def test_wrong_options_are_refused_at_once(
    given: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert evaluate(monkeypatch, "--checkpoint", "gone", "--data", "gone", *given) == 2
    assert message in capsys.readouterr().err


def test_the_cpu_is_chosen_before_torch_sees_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    add_device(parser)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert parser.parse_args(["--device", "cuda:0"]).device == "cuda:0"
    assert parser.parse_args([]).device == "auto" and os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    assert parser.parse_args(["--device", "cpu"]).device == "cpu"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
