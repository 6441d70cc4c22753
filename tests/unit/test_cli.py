"""Exit codes and messages that all tools share."""

from __future__ import annotations

import argparse
import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from warm import warm_python

from calm_dist.cli.console import (
    add_json,
    at_least,
    image_file,
    run,
    writable_directory,
    write_json,
)
from calm_dist.errors import (
    HungError,
    PeerLostError,
    RecipeError,
    TrainingDivergedError,
    UnreachableError,
    UserError,
)

TOOLS = Path(__file__).parents[2] / "tools"


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("field: bad"), 2),
        (FileNotFoundError(2, "No such file or directory", "/a/b"), 2),
        (UnreachableError("the store does not answer"), 6),
        (OSError(errno.ESTALE, "Stale file handle", "/a/b"), 6),
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


def json_target(text: str) -> str:
    """What ``--json`` makes of its value."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_json(parser)
    return str(parser.parse_args(["--json", text]).json)


def test_targets_that_can_be_written_are_taken_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("old")
    (tmp_path / "dangling").symlink_to(tmp_path / "new.json")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(path.name for path in tmp_path.iterdir())
    for name in ("old.json", "new.json", "deep/er/new.json", "dangling", "pipe"):
        assert json_target(str(tmp_path / name)) == str(tmp_path / name)
    assert json_target("-") == "-" and json_target("/dev/null") == "/dev/null"
    assert writable_directory(str(tmp_path / "report" / "of")) == str(tmp_path / "report" / "of")
    assert image_file(str(tmp_path / "a.svg")) == str(tmp_path / "a.svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "old.json").read_text() == "old"


def test_targets_that_cannot_be_written_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "file" / "x.json")
    wrong = {
        "": "is empty: give a file, or - for stdout",
        str(tmp_path): "Is a directory",
        str(tmp_path / "file" / "x.json"): "Not a directory",
        str(tmp_path / "file" / "deep" / "x.json"): "Not a directory",
        str(tmp_path / "dangling"): "Not a directory",
        str(tmp_path / ("x" * 300)): "File name too long",
        "/proc/x.json": "cannot be written",
    }
    for target, message in wrong.items():
        with pytest.raises(argparse.ArgumentError, match=message):
            json_target(target)
    for directory in (tmp_path / "file", tmp_path / "file" / "deep", "/proc/x"):
        with pytest.raises(argparse.ArgumentTypeError, match="give a writable directory"):
            writable_directory(str(directory))
    with pytest.raises(argparse.ArgumentTypeError, match="is empty: give a directory"):
        writable_directory("")
    with pytest.raises(argparse.ArgumentTypeError, match=r"ends in \.svg or \.png"):
        image_file(str(tmp_path / "plot.xyz"))


def test_a_place_without_room_is_refused(tmp_path: Path) -> None:
    """The kernel refuses to let any file grow, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        with pytest.raises(argparse.ArgumentError, match=r"new\.json: cannot be written"):
            json_target(str(tmp_path / "new.json"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


# What each tool needs besides --json; nothing of it is looked at before that.
WITH_JSON = {
    "benchmark.py": ["energy"],
    "convert_checkpoint.py": ["import-hf", "from", "to"],
    "encode_text.py": ["--autoencoder", "gone", "--text", ""],
    "evaluate.py": ["--checkpoint", "gone", "--data", "gone"],
    "flops_report.py": [],
    "generate.py": ["--checkpoint", "gone", "--prompt", ""],
    "inspect_data.py": ["gone", "--block", "0"],
    "plan.py": ["gone.yaml"],
    "rehearse.py": ["gone.yaml"],
    "report.py": ["--run", "gone", "--out", "report"],
    "runs.py": [],
    "train.py": ["gone.yaml", "--dry-run"],
    "train_autoencoder.py": ["gone.yaml", "--dry-run"],
    "verify_data.py": ["gone"],
}


def call(tool: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [warm_python(), str(tool), *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(TOOLS.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_tool_refuses_json_before_it_works(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    target = str(tmp_path / "file" / "x.json")
    shared = {
        "train.py",
        "train_autoencoder.py",
    }  # for --json see cli/training_tool.py
    for tool in sorted(TOOLS.glob("*.py")):
        if "add_json" not in tool.read_text() and tool.name not in shared:
            continue
        done = call(tool, *WITH_JSON[tool.name], "--json", target, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, ""), tool.name
        assert f"--json: {target}: cannot be written (Not a directory)" in done.stderr
    for arguments in (["flops_report.py", "--run", "gone"], ["report.py", "--run", "gone"]):
        done = call(TOOLS / arguments[0], *arguments[1:], "--out", target, cwd=tmp_path)
        assert done.returncode == 2 and f"--out: {target}: cannot be written" in done.stderr
    growth = call(TOOLS / "benchmark.py", "growth", "--plot", f"{target}.svg", cwd=tmp_path)
    assert growth.returncode == 2 and "--plot" in growth.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_full_disk_refuses_later_is_shown_first(tmp_path: Path) -> None:
    """/dev/full can be opened, and fails at each write with what a full disk says."""
    done = call(TOOLS / "flops_report.py", "--json", "/dev/full", cwd=tmp_path)
    assert done.returncode == 2 and "CALM-XL" in done.stdout
    assert done.stderr.startswith("error: --json /dev/full: cannot write (No space left")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, str(TOOLS / "flops_report.py")],
            env=os.environ | {"PYTHONPATH": str(TOOLS.parent)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (2, "error: output: No space left on device\n")


@pytest.mark.parametrize("text", ["-1", "x", "1.5", str(2**70)])
def test_numbers_out_of_range_are_refused(text: str) -> None:
    with pytest.raises((ValueError, argparse.ArgumentTypeError)):
        at_least(0)(text)
    assert at_least(0)("0") == 0


LIBRARY = """
import sys, warnings
import calm_dist.cli.console

library = {"__name__": "megatron.core.something"}
exec("import warnings; warn = lambda: warnings.warn('will go away', FutureWarning)", library)
exec("def fail(): raise RuntimeError('NCCL error')", library)

def main():
    library["warn"]()
    warnings.warn("about our own code")
    library["fail"]()

calm_dist.cli.console.run(main)
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
