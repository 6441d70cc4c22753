"""Many texts from one command: files of prompts, samples, stop strings."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from test_generate import run_tool, saved
from tiny_models import tiny_model
from tokenizer_kinds import llama2_like, metaspace, wordpiece

from calm_dist.errors import UserError
from calm_dist.inference.generate import generate
from calm_dist.inference.load import TextModel
from calm_dist.inference.prompts import Prompt, read_prompts
from calm_dist.text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer


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


def test_one_stop_string_and_a_method_that_is_none(tokenizer: Tokenizer) -> None:
    model = tiny_model("transformer", vocab_size=tokenizer.vocab_size)
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.0}
    whole = generate(model, tokenizer, "the", **options).text
    found = generate(model, tokenizer, "the", stop=whole[3:5], **options)
    assert found == generate(model, tokenizer, "the", stop=[whole[3:5]], **options)
    assert found.stopped_by == "stop"
    with pytest.raises(UserError, match=r"method 'exakt': must be one of auto, exact, pool"):
        generate(model, tokenizer, "the", method="exakt")  # type: ignore[call-overload]


@pytest.mark.parametrize("kind", ["calm", "transformer"])
def test_texts_are_shown_while_they_grow(kind: str, tmp_path: Path) -> None:
    """Random bytes, which are parts of characters, and decoders that treat the beginning of a text
    in their own way: the pieces are the texts, and come before the end."""
    makers = (llama2_like, metaspace, wordpiece)
    kinds = [make(tmp_path / f"{number}.json") for number, make in enumerate(makers)]
    kinds.append(train_tokenizer(["the sea and the sky"], 259, tmp_path / "bytes.json"))
    for tokenizer in kinds:
        model = tiny_model(kind, vocab_size=tokenizer.vocab_size, block_steps=20)
        prompts = ["the sea", "", "the ", "s"] * 3
        options: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 24, "seed": range(12)}
        whole = generate(model, tokenizer, prompts, **options)
        # Two characters that one of the texts has.
        stop = next(iter(re.findall("[!-~]{2}", whole[1].text + whole[2].text)), "sea")
        for stops in ((), (stop, "e")):
            pieces: dict[int, list[str]] = {number: [] for number in range(12)}
            found = generate(
                model, tokenizer, prompts, stop=stops,
                on_text=lambda number, piece: pieces[number].append(piece),  # noqa: B023
                **options,
            )  # fmt: skip
            if not stops:
                assert found == whole
            for number, made in enumerate(found):
                # The decoders of the first two make replacement characters of valid bytes beside
                # wrong ones.
                if tokenizer is kinds[-1] or "\ufffd" not in made.text:
                    assert "".join(pieces[number]) == made.text
            if not stops:
                assert max(map(len, pieces.values())) >= 3


def test_each_token_is_decoded_with_a_tail_only(tmp_path: Path) -> None:
    """Decoding takes as long for the last token as for the first; the prompt is encoded once."""
    tokenizer = train_tokenizer(["the sea and the sky"], 259, tmp_path / "bytes.json")
    tokenizer.end_id = -1
    model = tiny_model("transformer", block_steps=300)
    decoded, encoded = [], []
    decode, encode = tokenizer.decode, tokenizer.encode_batch
    tokenizer.decode = lambda ids: decoded.append(len(ids)) or decode(ids)  # type: ignore[method-assign,func-returns-value]
    tokenizer.encode_batch = lambda texts: encoded.append(texts) or encode(texts)  # type: ignore[method-assign,func-returns-value]
    prompt = "sea " * 20
    generate(model, tokenizer, prompt, temperature=1.0, max_new_tokens=150, stop=["never said"])
    assert len(encoded) == 1
    # But for the first tokens, and the whole text at the end.
    assert max(decoded[60:-6]) < 40


def test_a_directory_loads_into_a_model_that_generates(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import calm_dist.inference
    from calm_dist.inference.load import load_model

    run = saved(tiny_model("transformer"), tokenizer, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    loaded = calm_dist.inference.load(run, tokenizer=tokenizer.path)  # type: ignore[operator]
    options: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 8, "seed": 3}
    one, *others = loaded.generate(["the s", "a"], **options)
    assert len(others) == 1
    assert one.tokens == generate(load_model(run), tokenizer, "the s", **options).tokens
    assert loaded.generate("the s", **options).text == one.text
    assert loaded.model.step == 3


def test_prompts_of_a_file_sampled_several_times(
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_model("transformer", vocab_size=tokenizer.vocab_size)
    run = saved(model, tokenizer, tmp_path / "run")
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    prompts.write_text('{"prompt": "the s"}\n\n{"prompt": "", "seed": 7}\n{"prompt": "a"}\n')
    given = ["--checkpoint", str(run), "--tokenizer", str(tokenizer.path), "--max-new-tokens", "9"]
    given += ["--prompts", str(prompts), "--num-samples", "3", "--seed", "4", "--json", str(out)]
    # A batch that holds samples of both prompts.
    assert run_tool(monkeypatch, *given, "--batch-size", "4") == 0
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    # Prompts without a seed of their own do not share one.
    expected = [("the s", 4), ("the s", 5), ("the s", 6), ("", 7), ("", 8), ("", 9)]
    expected += [("a", 10), ("a", 11), ("a", 12)]
    assert [(line["prompt"], line["seed"]) for line in lines] == expected
    alone = generate(model, tokenizer, "the s", seed=5, max_new_tokens=9)
    assert lines[1]["tokens"] == alone.tokens and lines[1]["text"] == alone.text
    # Printed as they grow, the texts are those that are printed at the end, in another form.
    assert run_tool(monkeypatch, *given, "--stream") == 0
    printed_at_once = capsys.readouterr().out
    assert printed_at_once == "\n".join(line["prompt"] + line["text"] + "\n" for line in lines)
    assert printed_at_once == printed.out
    total = sum(len(line["tokens"]) for line in lines)
    assert f"9 texts, {total} tokens in " in printed.err and " tokens/s" in printed.err


def test_what_a_killed_job_finished_is_kept(
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Lines are in the file before the next batch begins; an array is written at SIGTERM."""
    model = tiny_model("transformer", vocab_size=tokenizer.vocab_size)
    run = saved(model, tokenizer, tmp_path / "run")
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    prompts.write_text('{"prompt": "the s"}\n' * 5)
    out.write_text("of an earlier job\n")
    given = ["--checkpoint", str(run), "--tokenizer", str(tokenizer.path), "--max-new-tokens", "4"]
    given += ["--prompts", str(prompts), "--batch-size", "2", "--json"]
    held: list[int] = []
    once = TextModel.generate

    def watched(self: TextModel, *args: Any, **options: Any) -> Any:
        held.append(len(out.read_text().splitlines()))
        if len(held) == 3:
            signal.raise_signal(signal.SIGTERM)
        return once(self, *args, **options)

    monkeypatch.setattr(TextModel, "generate", watched)
    before = signal.getsignal(signal.SIGTERM)
    assert run_tool(monkeypatch, *given, str(out)) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert held == [1, 2, 4]
    assert [json.loads(line)["seed"] for line in out.read_text().splitlines()] == [0, 1, 2, 3]
    assert "4 texts, " in capsys.readouterr().err
    held.clear()
    array = tmp_path / "texts.json"
    assert run_tool(monkeypatch, *given, str(array)) == 128 + signal.SIGTERM
    assert [text["seed"] for text in json.loads(array.read_text())] == [0, 1, 2, 3]


def test_lines_to_stdout_one_prompt_and_equal_seeds(
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_model("transformer", vocab_size=tokenizer.vocab_size)
    run = saved(model, tokenizer, tmp_path / "run")
    given = ["--checkpoint", str(run), "--tokenizer", str(tokenizer.path), "--max-new-tokens", "4"]
    (tmp_path / "p.jsonl").write_text('{"prompt": "the s"}\n')
    of_file = [*given, "--prompts", str(tmp_path / "p.jsonl"), "--json", "-"]
    assert run_tool(monkeypatch, *of_file) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["seed"] == 0 and printed.out.count("\n") == 1
    assert "1 text, " in printed.err and " tokens/s" in printed.err and "seed" not in printed.err
    assert run_tool(monkeypatch, *of_file, "--num-samples", "3", "--batch-size", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [0, 1, 2]
    both = ["--prompt", "a", "--prompt", "b", "--seed", "1", "--seed", "2", "--num-samples", "2"]
    assert run_tool(monkeypatch, *given, *both) == 0
    assert "note: 2 texts have the seed 2, and thus the same random" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"p\.jsonl: holds no prompt"),
        ('{"prompt": "a"}\n{"prompt": 3}\n', r'p\.jsonl, line 2: .*has no text "prompt"'),
        ('["a"]\n', r"p\.jsonl, line 1: .*has no text"),
        ("a\n", r"p\.jsonl, line 1: not JSON"),
        ('{"prompt": "a", "seed": -1}\n', r"line 1: seed: -1 must be a whole number"),
        ('{"prompt": "a", "seed": true}\n', r"line 1: seed: "),
        ('\n{"prompt": "a", "sed": 1}\n', r"p\.jsonl, line 2: 'sed': unknown key; write .*seed"),
        (f'{{"prompt": "a", "seed": {"1" * 5000}}}\n', r"line 1: not JSON"),
        ("[" * 100_000, r"line 1: not JSON"),
        ('{"prompt": "a"}\n{"prompt": "\\ud800"}\n', r"line 2: .*a lone surrogate is not text"),
    ],
)
def test_bad_files_of_prompts(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / "p.jsonl")


def test_files_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "é\\n", "seed": 0}\n')
    assert read_prompts(tmp_path / "p.jsonl") == [Prompt("é\n", 0)]
    # JSON's strings may hold what str.splitlines takes for the end of a line.
    lines = b'{"prompt": "a\xe2\x80\xa8b\xc2\x85"}\r\n{"prompt": "c"}\r\n'
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "p.jsonl").write_bytes(mark + lines)
        assert read_prompts(tmp_path / "p.jsonl") == [Prompt("a\u2028b\x85"), Prompt("c")]
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
