"""The quickstart's stages: what is skipped, done again, set aside, shown and passed on."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"

# A pipeline of one stage that writes what its input says, and how often it was run.
PIPELINE = """
set -euo pipefail
. {tools}/_venv.sh
. {tools}/_stages.sh
OUT={out} STAGES=1
open_output
copy() {{
  mkdir -p "$OUT/result"
  logged cp {source} "$OUT/result/copy.json"
  echo run >>{source}.runs
  {after}
}}
run_stage copy "result" {source}
echo end
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "source"
    file.write_text("first\n")
    return file


def run(source: Path, after: str = ":") -> subprocess.CompletedProcess[str]:
    script = PIPELINE.format(tools=TOOLS, out=source.parent / "out", source=source, after=after)
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)


def runs(source: Path) -> int:
    return len(source.with_name("source.runs").read_text().splitlines())


def test_a_finished_stage_is_skipped(source: Path) -> None:
    assert "[1/1] copy ...\n[1/1] copy: done in" in run(source).stdout
    assert run(source).stdout == "[1/1] copy: already there\nend\n"
    assert runs(source) == 1


def test_changed_inputs_set_the_former_result_aside(source: Path) -> None:
    run(source)
    source.write_text("second\n")
    assert "its inputs changed" in run(source).stdout
    out = source.parent / "out"
    assert (out / "result" / "copy.json").read_text() == "second\n"
    assert (out / "previous" / "result" / "copy.json").read_text() == "first\n"


@pytest.mark.parametrize("text", [None, "changed\n"])
def test_a_damaged_result_is_made_again(source: Path, text: str | None) -> None:
    run(source)
    result = source.parent / "out" / "result" / "copy.json"
    if text is None:
        result.unlink()
    else:
        result.write_text(text)
    assert "changed or is damaged" in run(source, after='echo "redo: $redo"').stdout
    assert result.read_text() == "first\n"
    assert not (source.parent / "out" / "previous").exists()


def test_results_that_were_moved_are_still_there(source: Path) -> None:
    run(source)
    (source.parent / "out").rename(source.parent / "moved")
    script = PIPELINE.format(tools=TOOLS, out=source.parent / "moved", source=source, after=":")
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[1/1] copy: already there\nend\n"


def test_nothing_that_was_set_aside_is_lost(source: Path) -> None:
    for text in ("first", "second", "third"):
        source.write_text(text)
        run(source)
    previous = source.parent / "out" / "previous"
    assert (previous / "result" / "copy.json").read_text() == "first"
    assert (previous / "result.2" / "copy.json").read_text() == "second"


def test_a_failed_stage_ends_all_with_its_exit_code_and_goes_on_later(source: Path) -> None:
    failed = run(source, after="logged bash -c 'echo error: no text >&2; exit 2'")
    assert failed.returncode == 2
    assert "error: no text\n" in failed.stderr
    assert "stage copy failed with exit code 2" in failed.stderr
    assert "end" not in failed.stdout
    assert "error: no text" in (source.parent / "out" / "logs" / "copy.log").read_text()

    assert "already there" not in run(source).stdout
    assert runs(source) == 2
    assert not (source.parent / "out" / "previous").exists()


def test_of_a_training_the_first_and_the_last_step_are_shown(source: Path) -> None:
    """All steps come within ten seconds; libraries' warnings are for the log only."""
    lines = [f"step {n}/20 | loss 1.0" for n in range(1, 21)]
    lines[3:3] = ["/lib/a.py:1: UserWarning: slow", "  warnings.warn(", "checkpoint written"]
    text = source.with_name("lines")
    text.write_text("\n".join(lines) + "\n")
    shown = run(source, after=f"logged cat {text}").stdout
    assert "    step 1/20 | loss 1.0\n    checkpoint written\n    step 20/20 | loss 1.0\n" in shown
    assert text.read_text() in (source.parent / "out" / "logs" / "copy.log").read_text()


def test_a_stop_signal_reaches_the_command(source: Path) -> None:
    ready, ended = source.with_name("ready"), source.with_name("ended")
    command = f'trap "touch {ended}; exit 1" TERM; touch {ready}; while :; do sleep 0.1; done'
    script = PIPELINE.format(
        tools=TOOLS, out=source.parent / "out", source=source, after=f"logged bash -c '{command}'"
    )
    process = subprocess.Popen(["bash", "-c", script], stderr=subprocess.PIPE, text=True)
    for _ in range(200):
        if ready.exists():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 143
    assert ended.exists()
    assert "the same command goes on from here" in errors
