"""The quickstart as a user starts it: real text, real training, in the checkout's .venv."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECOND_RUN_SECONDS = 60


def venv_is_current() -> bool:
    check = f". {ROOT}/tools/_venv.sh && is_current"
    return subprocess.run(["bash", "-c", check], capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(
    not venv_is_current(), reason="needs the checkout's .venv; tools/run_tests.sh makes it"
)


def quickstart(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", ROOT / "tools" / "quickstart.sh", *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def test_a_corpus_that_is_not_there(tmp_path: Path) -> None:
    done = quickstart(tmp_path / "out", "--corpus", tmp_path / "absent")
    assert done.returncode == 2
    assert f"error: corpus {tmp_path / 'absent'}: no such file" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_an_empty_corpus(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    done = quickstart(tmp_path / "out", "--corpus", empty)
    assert done.returncode == 2
    assert f"error: corpus {empty}: holds no text" in done.stderr


@pytest.mark.full
def test_the_whole_pipeline(tmp_path: Path) -> None:
    done = quickstart(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr

    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["autoencoder"]["token_accuracy"] >= 0.99
    calm = report["models"][0]
    assert [model["kind"] for model in report["models"]] == ["calm", "transformer", "tokens"]
    for model in report["models"]:
        # BrierLM of the CALM may still be noise after so short a training.
        assert model["brier"][0] > 3 * model["brier_stderr"][0] > 0
        assert model["train_flops_ours"] == pytest.approx(calm["train_flops_ours"], rel=0.01)
    assert calm["layout"] == {"tensor": 2, "pipeline": 2, "data": 1, "zero_stage": 2}
    assert {claim["steps"] for claim in report["inference"]["claims"]} == {0.25}
    assert (tmp_path / "report" / "plots" / "generation.png").stat().st_size > 0
    assert (tmp_path / "report" / "index.html").stat().st_size > 0

    started = time.monotonic()
    again = quickstart(tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("already there") == 9
    assert time.monotonic() - started <= SECOND_RUN_SECONDS
