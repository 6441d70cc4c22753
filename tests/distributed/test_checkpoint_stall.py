"""How long training waits for a large checkpoint: written beside it, and at once."""

from __future__ import annotations

import re
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from launches import ALONE, ROOT, TIMEOUT_SECONDS, environment, recipe, torchrun

# 2 GB, in 12 layers: what does not grow with the state is 0.08 s, and alone a tenth of the
# synchronous time at 510 MB.
BIG = {
    "model__hidden_size": 1024,
    "model__intermediate_size": 2752,
    "model__num_hidden_layers": 12,
    "training__steps": 40,
    "checkpoint__every": 8,
    "checkpoint__keep": 1,
}
LEAST_BYTES = 500_000_000
MOST_OF_SYNCHRONOUS = 0.1


def seconds_waited(overrides: list[str], asynchronous: bool) -> float:
    """What training usually waits for one checkpoint, the last one left out, whose end it waits for
    anyway."""
    setting = f"checkpoint.async={str(asynchronous).lower()}"
    done = subprocess.run(
        torchrun(2, ROOT / "tools" / "train.py", recipe("calm"), *overrides, setting, fresh=True),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    waits = [float(text) for text in re.findall(r"training waited ([\d.]+) s", done.stdout)]
    assert len(waits) == 5, done.stdout[-2000:]
    print(f"async={asynchronous}: waited {waits} s")
    return statistics.median(waits[:-1])


@pytest.mark.full
def test_training_waits_for_a_small_part(tmp_path: Path, tiny: Callable[..., list[str]]) -> None:
    waited = {}
    for asynchronous in (False, True):
        run = tmp_path / str(asynchronous)
        waited[asynchronous] = seconds_waited(tiny(run, "calm", **BIG, **ALONE), asynchronous)
        (tensors,) = (run / "checkpoints").glob("step_*/tensors")
        assert sum(file.stat().st_size for file in tensors.iterdir()) >= LEAST_BYTES
    assert waited[True] < MOST_OF_SYNCHRONOUS * waited[False], waited
