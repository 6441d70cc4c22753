"""Many texts from one command: files of prompts, samples, stop strings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_generate import run_tool, saved
from tiny_models import tiny_model

from calm_dist.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from calm_dist.errors import UserError
from calm_dist.inference.generate import generate
from calm_dist.inference.prompts import Prompt, read_prompts


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    train_tokenizer(["the sea and the sky"], 259, tmp_path / "tokenizer.json")
    return load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("kind", ["calm", "transformer"])
def test_a_stop_string_ends_a_text_before_it(kind: str, tokenizer: Tokenizer) -> None:
    model = tiny_model(kind, vocab_size=tokenizer.vocab_size)
    options: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 40, "seed": 3}
    whole = generate(model, tokenizer, "the s", **options)
    # Any two characters in the middle of what the model says without it.
    stop = next(
        whole.text[at : at + 2]
        for at in range(8, len(whole.text) - 2)
        if whole.text[at : at + 2].isprintable() and "\\ufffd" not in whole.text[at : at + 2]
    )
    cut = generate(model, tokenizer, "the s", stop=["never said", stop], **options)
    assert cut.stopped_by == "stop" and cut.text == whole.text[: whole.text.index(stop)]
    assert cut.tokens == whole.tokens[: len(cut.tokens)]
    # The last token completes the string.
    said = tokenizer.decode_continuation("the s", cut.tokens)
    assert stop in said and stop not in tokenizer.decode_continuation("the s", cut.tokens[:-1])
    both = generate(model, tokenizer, ["", "the s"], stop=[stop], **options)
    assert both[1] == cut
    with pytest.raises(UserError, match="stop: an empty string"):
        generate(model, tokenizer, "the s", stop=[""])


def test_prompts_of_a_file_sampled_several_times(
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_model("transformer", vocab_size=tokenizer.vocab_size)
    run = saved(model, tokenizer, tmp_path / "run")
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    prompts.write_text('{"prompt": "the s"}\n\n{"prompt": "", "seed": 7}\n')
    given = ["--checkpoint", str(run), "--tokenizer", str(tokenizer.path), "--max-new-tokens", "9"]
    given += ["--prompts", str(prompts), "--num-samples", "3", "--seed", "4", "--json", str(out)]
    # A batch that holds samples of both prompts.
    assert run_tool(monkeypatch, *given, "--batch-size", "4") == 0
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    expected = [("the s", 4), ("the s", 5), ("the s", 6), ("", 7), ("", 8), ("", 9)]
    assert [(line["prompt"], line["seed"]) for line in lines] == expected
    alone = generate(model, tokenizer, "the s", seed=5, max_new_tokens=9)
    assert lines[1]["tokens"] == alone.tokens and lines[1]["text"] == alone.text
    total = sum(len(line["tokens"]) for line in lines)
    assert f"6 texts, {total} tokens in " in printed.err and " tokens/s" in printed.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"p\.jsonl: holds no prompt"),
        ('{"prompt": "a"}\n{"prompt": 3}\n', r'p\.jsonl, line 2: .*has no text "prompt"'),
        ('["a"]\n', r"p\.jsonl, line 1: .*has no text"),
        ("a\n", r"p\.jsonl, line 1: not JSON"),
        ('{"prompt": "a", "seed": -1}\n', r"line 1: seed: -1 must be a whole number"),
        ('{"prompt": "a", "seed": true}\n', r"line 1: seed: "),
    ],
)
def test_bad_files_of_prompts(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / "p.jsonl")


def test_files_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "é\\n", "seed": 0, "id": 5}\n')
    assert read_prompts(tmp_path / "p.jsonl") == [Prompt("é\n", 0)]
    with pytest.raises(UserError, match=r"absent: cannot be read"):
        read_prompts(tmp_path / "absent")
    (tmp_path / "latin").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin: cannot be read as UTF-8"):
        read_prompts(tmp_path / "latin")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--prompts", "p.jsonl", "--seed", "1", "--seed", "2"], "2 seeds for --prompts"),
        (["--prompt", "a", "--prompts", "p.jsonl"], "not allowed with argument"),
        ([], "one of the arguments --prompt --prompts is required"),
        (["--prompt", "a", "--stop", ""], "an empty string ends no text"),
        (["--prompt", "a", "--num-samples", "0"], "0: give a whole number from 1"),
        (["--prompts", "absent.jsonl"], "absent.jsonl: cannot be read"),
    ],
)
def test_command_line_errors(
    given: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_tool(monkeypatch, "--checkpoint", "gone", *given) == 2
    assert message in capsys.readouterr().err
