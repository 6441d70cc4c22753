"""The machine: its GPU, its software, and the rates that it reaches with plain operations."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch

from calm_dist.benchmark.timing import median_seconds
from calm_dist.gpu_check.worker import Check

PACKAGES = ("torch", "triton", "megatron-core", "deepspeed", "mosaicml-streaming", "numpy",
            "flash-attn")  # fmt: skip
_QUERY = ("name", "driver_version", "memory.total", "clocks.sm", "clocks.max.sm", "clocks.mem",
          "power.limit")  # fmt: skip
REPEATS = 10


def measure(check: Check) -> None:
    """Add what the machine is and has, then its rates."""
    device = check.device
    check.add(
        python=platform.python_version(),
        packages=versions(),
        compiler=shutil.which("gcc") or shutil.which("cc"),
        python_headers=(Path(sysconfig.get_paths()["include"]) / "Python.h").is_file(),
        cuda=torch.version.cuda,
        # "highest" is fp32; the variable makes it TF32 in NVIDIA's images.
        fp32_products=torch.get_float32_matmul_precision(),
        tf32_override=os.environ.get("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
        nvidia_smi=nvidia_smi() if device.type == "cuda" else None,
        gpu=gpu_properties(device) if device.type == "cuda" else platform.machine(),
    )
    size = 256 if check.small else 8192
    check.add(bf16_tflops=_product_tflops(size, torch.bfloat16, device))
    check.add(fp32_tflops=_product_tflops(size // 2, torch.float32, device))
    check.add(copy_bytes_per_second=_copy_rate(1 << (20 if check.small else 31), device))
    if device.type == "cuda":
        check.add(host_to_device_bytes_per_second=_upload_rate(1 << 28, device))
    check.add(launch_seconds=launch_seconds(device))


def versions() -> dict[str, str | None]:
    """Versions of the packages that matter; None where one is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def nvidia_smi() -> dict[str, str] | None:
    """What nvidia-smi says of the first GPU; None without it."""
    if shutil.which("nvidia-smi") is None:
        return None
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"],
        capture_output=True, text=True, timeout=20,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return None
    return dict(zip(_QUERY, (value.strip() for value in lines[0].split(",")), strict=False))


def gpu_properties(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def max_clock(device: torch.device) -> float | None:
    """Highest clock of the multiprocessors in Hz, None if unknown."""
    found = nvidia_smi() if device.type == "cuda" else None
    try:
        return float((found or {})["clocks.max.sm"]) * 1e6
    except (KeyError, ValueError):
        return None


def _product_tflops(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Of square products of random numbers: zeros run faster."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2e-12 * size**3 / median_seconds(lambda: torch.mm(a, b, out=out), REPEATS, device)


def _copy_rate(size: int, device: torch.device) -> float:
    """Bytes read and written."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: target.copy_(source), REPEATS, device)


def _upload_rate(size: int, device: torch.device) -> float:
    source = torch.zeros(size, dtype=torch.uint8).pin_memory()
    target = torch.empty(size, dtype=torch.uint8, device=device)
    return size / median_seconds(lambda: target.copy_(source, non_blocking=True), REPEATS, device)


def launch_seconds(device: torch.device) -> float:
    """Time of the host for one small operation with a gradient, as most of a step's are."""
    x = torch.zeros(8, device=device, requires_grad=True)
    number = 500

    def launch() -> None:
        for _ in range(number):
            x.mul(1.0)

    launch()
    started = time.perf_counter()
    launch()
    return (time.perf_counter() - started) / number
