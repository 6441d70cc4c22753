"""Compile the energy kernel ahead of time, without a GPU: what each variant needs, as JSON.

python compile_worker.py '[{"arch": 90, "dtype": "bf16", "samples": 8, "size": 128}]'
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from calm_dist.losses import energy_kernel
from calm_dist.models import rotary_kernel, swiglu_kernel
from calm_dist.models.heads import noise_kernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ALIGNED = ("samples", "mean", "log_std", "noise", "score", "gradient", "keys")
DRAWS = 100


def compile_kernel(
    arch: int,
    dtype: str = "bf16",
    samples: int = 8,
    size: int = 128,
    is_drawn: bool = True,
    needs_gradient: bool = True,
    ones: Sequence[str] = (),
) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory and instructions of a position.

    ``ones`` names integers that are 1, which become constants, as in `compile_small`; then only
    bytes.
    """
    kernel = energy_kernel._energy_kernel
    constants = energy_kernel.constants(samples, size) | {
        "BETA": 1.0, "IS_DRAWN": is_drawn, "NEEDS_GRADIENT": needs_gradient,
    }  # fmt: skip
    constants |= dict.fromkeys(ones, 1)
    warps = constants.pop("num_warps")
    of_samples = {"bf16": "*bf16", "fp32": "*fp32"}[dtype]
    types = dict.fromkeys(("mean", "log_std", "noise", "score"), "*fp32")
    types |= {"samples": of_samples, "gradient": of_samples, "keys": "*i64"}
    types |= dict.fromkeys(("num_samples", "num_draws", "size"), "i32")
    names = [parameter.name for parameter in kernel.params]
    source = ASTSource(
        fn=kernel,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in ALIGNED},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps}
    )
    if ones:
        return {"bytes": len(compiled.asm["cubin"])}
    with tempfile.TemporaryDirectory() as directory:
        binary = Path(directory) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage = _output(TOOLS / "cuobjdump", "-res-usage", binary)
        listing = _output(TOOLS / "nvdisasm", "-c", binary)
    instructions, by_kind = executed(listing, samples)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),  # type: ignore[index]
        "shared": compiled.metadata.shared,
        "instructions": warps * instructions,
        "by_kind": {kind: warps * count for kind, count in by_kind.most_common(8)},
    }


def compile_small(arch: int, kernel: str, integers: dict[str, int]) -> dict[str, Any]:
    """Compile the kernel ``noise``, ``rotation``, ``swiglu`` or ``swiglu_backward``; an integer of
    1 becomes a constant, as Triton makes it when the kernel is launched."""
    kernels: dict[str, tuple[Any, dict[str, str], dict[str, float]]] = {
        "noise": (
            noise_kernel._uniform_kernel,
            {"noise": "*bf16", "keys": "*i64"},
            {"ROWS": 8, "GROUP": 16},
        ),
        "rotation": (
            rotary_kernel._rotation_kernel,
            {"states": "*bf16", "angles": "*fp32", "rotated": "*bf16"},
            {"SIGN": -1.0, "ROWS": 16, "HALF": 32},
        ),
        "swiglu": (
            swiglu_kernel._forward_kernel,
            dict.fromkeys(("both", "result"), "*bf16"),
            {"COLUMNS": 1024},
        ),
        "swiglu_backward": (
            swiglu_kernel._backward_kernel,
            dict.fromkeys(("both", "gradient", "result"), "*bf16"),
            {"COLUMNS": 1024},
        ),
    }
    function, pointers, fixed = kernels[kernel]
    constants = fixed | {name: value for name, value in integers.items() if value == 1}
    names = [parameter.name for parameter in function.params]
    types = dict.fromkeys(integers, "i32") | pointers | dict.fromkeys(constants, "constexpr")
    compiled = triton.compile(
        ASTSource(
            fn=function,
            signature={name: types[name] for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
        ),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": 4},
    )
    return {"bytes": len(compiled.asm["cubin"])}


def executed(listing: str, samples: int) -> tuple[int, Counter[str]]:
    """Instructions that one warp executes for a position: those of the loop over samples N times,
    those of the loop over draws once for each tile of draws."""
    kinds: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in listing.splitlines():
        if label := re.match(r"^\.(L_\w+):", line):
            labels[label[1]] = len(kinds)
        elif found := re.match(
            r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T0-9]+ )?\s*([A-Z0-9_]+)(.*?);", line
        ):
            if found[1] == "BRA" and (target := re.search(r"\.(L_\w+)", found[2])):
                jumps.append((len(kinds), target[1]))
            kinds.append(found[1])
    loops = sorted(
        (labels[target], place + 1)
        for place, target in jumps
        if labels[target] < place  # The last instruction of a kernel jumps to itself.
    )
    over_samples, over_draws = loops
    times = [1] * len(kinds)
    times[slice(*over_samples)] = [samples] * (over_samples[1] - over_samples[0])
    tiles = -(-DRAWS // energy_kernel._DRAWS_AT_ONCE)
    times[slice(*over_draws)] = [tiles] * (over_draws[1] - over_draws[0])
    by_kind: Counter[str] = Counter()
    for kind, count in zip(kinds, times, strict=True):
        by_kind[kind] += count
    return sum(times), by_kind


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    for variant in json.loads(sys.argv[1]):
        compile_one = compile_small if "kernel" in variant else compile_kernel
        print(json.dumps(variant | compile_one(**variant)), flush=True)
