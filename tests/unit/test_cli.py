"""Exit codes and messages that all tools share."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from calm_dist.cli import at_least, run, write_json
from calm_dist.errors import HungError, PeerLostError, RecipeError, TrainingDivergedError, UserError


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("field: bad"), 2),
        (FileNotFoundError(2, "No such file or directory", "/a/b"), 2),
        (PeerLostError("rank 1 died"), 3),
        (TrainingDivergedError("not finite"), 4),
        (HungError("rank 1 hangs"), 5),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run(raising(error))
    assert exit_info.value.code == code
    assert "Traceback" not in capsys.readouterr().err


def test_file_that_cannot_be_used_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit):
        run(lambda: (file / "run").mkdir())
    assert capsys.readouterr().err == f"error: {file / 'run'}: Not a directory\n"


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run(raising(ZeroDivisionError()))


def test_recipe_errors_are_said_by_one_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, said in (("0", "error: x: bad\n"), ("3", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as exit_info:
            run(raising(RecipeError("x: bad")))
        assert exit_info.value.code == 2
        assert capsys.readouterr().err == said


def test_json_target_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        write_json({}, tmp_path / "file" / "x.json")


@pytest.mark.parametrize("text", ["-1", "x", "1.5", str(2**70)])
def test_numbers_out_of_range_are_refused(text: str) -> None:
    with pytest.raises((ValueError, argparse.ArgumentTypeError)):
        at_least(0)(text)
    assert at_least(0)("0") == 0


LIBRARY = """
import sys, warnings
import calm_dist.cli

library = {"__name__": "megatron.core.something"}
exec("import warnings; warn = lambda: warnings.warn('will go away', FutureWarning)", library)
exec("def fail(): raise RuntimeError('NCCL error')", library)

def main():
    library["warn"]()
    warnings.warn("about our own code")
    library["fail"]()

calm_dist.cli.run(main)
"""


@pytest.mark.parametrize("asked_for", [False, True])
def test_libraries_may_not_warn_but_fail(asked_for: bool) -> None:
    done = subprocess.run(
        [sys.executable, *(["-W", "default"] if asked_for else []), "-c", LIBRARY],
        env={name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "RuntimeError: NCCL error" in done.stderr
    assert "UserWarning: about our own code" in done.stderr
    assert ("will go away" in done.stderr) == asked_for
