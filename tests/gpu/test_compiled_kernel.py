"""The energy kernel compiled for GPUs without one: what it needs, and what it executes.

Held to what was measured with Triton 3.9, with a tenth of slack.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launches import ROOT

from calm_dist.gpu_check.parts import ENERGY_INSTRUCTIONS as INSTRUCTIONS_OF

# Not imported here: the other tests choose its interpreter before.
if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton, as bash tools/run_tests.sh installs it", allow_module_level=True)

WORKER = Path(__file__).with_name("compile_worker.py")
# Of CALM-M: N = 8, l = 128, 100 draws. The kernel that this one replaced executed 131,000
# instructions of all warps for a position, by the same count.
TARGETS = [(80, "bf16"), (90, "bf16"), (90, "fp32"), (100, "bf16")]
INSTRUCTIONS = 42_000
# As docs/performance.md prints them, for each target: all that a thread can have.
REGISTERS = 255
# Bytes of stack, for registers that are spilled.
STACK = 48
SIZES = [(2, 7), (3, 33), (8, 128), (64, 256)]


def compiled(variants: list[dict[str, Any]]) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    done = subprocess.run(
        [sys.executable, str(WORKER), json.dumps(variants)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    for result in results:
        print(result)
    return results


def small(arch: int, size: int) -> list[dict[str, Any]]:
    """The kernels of noise, rotary positions and SwiGLU with sizes and strides of ``size``."""
    strides = ("per_step", "per_text", "per_head", "angles_per_step", "angles_per_text")
    integers = {
        "noise": dict.fromkeys(("num_samples", "size"), size),
        "rotation": dict.fromkeys((*strides, "heads", "half"), size),
        "swiglu": {"size": size},
        "swiglu_backward": {"size": size},
    }
    return [{"arch": arch, "kernel": name, "integers": of} for name, of in integers.items()]


def test_instructions_and_registers() -> None:
    variants = [{"arch": arch, "dtype": dtype} for arch, dtype in TARGETS]
    one_draw = {"arch": 90, "ones": ["num_draws"]}
    others = [*small(80, 0), *small(90, 1), *small(100, 3), one_draw]
    results = compiled([*variants, *others])
    assert len(results) == len(variants) + len(others)
    for result in results[: len(variants)]:
        # What the check on a GPU predicts its time from.
        predicted = INSTRUCTIONS_OF[result["arch"] // 10]
        assert abs(result["instructions"] / predicted - 1) < 0.15, result
        assert result["instructions"] <= INSTRUCTIONS, result
        assert result["registers"] == REGISTERS, result
        assert result["stack"] <= STACK, result
        # Registers let no more than four blocks of 64 threads onto a multiprocessor.
        assert result["shared"] <= 164 * 1024 // 4, result


@pytest.mark.full
@pytest.mark.parametrize("is_drawn", [True, False])
def test_every_size_compiles(is_drawn: bool) -> None:
    variants = [
        {"arch": 90, "dtype": "fp32", "samples": n, "size": size, "is_drawn": is_drawn,
         "needs_gradient": gradient}
        for n, size in SIZES
        for gradient in (True, False)
    ]  # fmt: skip
    results = compiled(variants)
    assert len(results) == len(variants)
    assert all(result["instructions"] > 0 for result in results)
