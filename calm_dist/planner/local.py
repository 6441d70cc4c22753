"""This machine as a cluster: measures its rates in as many concurrent processes as will train."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.nn.functional as F

from calm_dist.costs.clusters import Cluster, Rates
from calm_dist.errors import UserError

# Sizes of a small model's layers: rows of activations, hidden, intermediate.
ROWS, HIDDEN, INTERMEDIATE, HEADS = 1024, 512, 1408, 4
# Sizes of the all-reduces that measure bandwidth and latency.
LARGE_BYTES, SMALL_BYTES = 16 << 20, 1 << 10
REPEATS = 10
TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True)
class MeasuredRates:
    """Rates of one process while all processes run."""

    products: float
    """FLOP/s of matrix products."""
    attention: float
    """FLOP/s of causal attention, forward and backward."""
    bandwidth: float
    """Bytes/s of element-wise kernels."""
    draws: float
    """Normal numbers a second."""
    dispatch: float
    """Seconds of an operator on a tiny tensor."""
    link: float = float("inf")
    """Bytes/s of an all-reduce through each rank."""
    latency: float = 0.0
    """Seconds of half a small all-reduce."""
    fp32_products: float = 0.0
    """FLOP/s of matrix products in fp32; 0: those of ``products``."""


def measure_rates(device: torch.device, dtype: torch.dtype = torch.float32) -> MeasuredRates:
    """Time products, attention, element-wise kernels, draws and launches in this process."""
    scale = 8 if device.type == "cuda" else 1

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    x, weight = tensor(ROWS * scale, HIDDEN * scale), tensor(INTERMEDIATE * scale, HIDDEN * scale)
    y = tensor(ROWS * scale, INTERMEDIATE * scale)

    def products() -> None:
        F.linear(x, weight)
        y @ weight
        y.T @ x

    q = tensor(4, HEADS * scale, ROWS // 2, HIDDEN // HEADS).requires_grad_()

    def attention() -> None:
        output = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        output.backward(torch.ones_like(output))

    def elementwise() -> None:
        gate = F.silu(y)
        product = gate * y
        torch.ops.aten.silu_backward(product, y)

    small = tensor(8)
    number = 2_000_000
    generator = torch.Generator(device)

    def launches() -> None:
        for _ in range(200):
            small + small

    flops = 6 * x.shape[0] * HIDDEN * INTERMEDIATE * scale**2
    pairs = q.shape[0] * q.shape[1] * q.shape[2] ** 2 / 2
    return MeasuredRates(
        products=flops / _seconds(products, device),
        # Two products forward, five backward, over half of all pairs.
        attention=7 * 2 * pairs * q.shape[3] / _seconds(attention, device),
        bandwidth=8 * y.numel() * y.element_size() / _seconds(elementwise, device),
        draws=number
        / _seconds(lambda: torch.randn(number, generator=generator, device=device), device),
        dispatch=_seconds(launches, device) / 200,
    )


def measure_links(device: torch.device) -> tuple[float, float]:
    """Bytes/s through each rank of an all-reduce over the world, and seconds of half a small one.

    All ranks must call this.
    """
    ranks = dist.get_world_size()
    if ranks == 1:
        return float("inf"), 0.0
    times = []
    for size in (LARGE_BYTES, SMALL_BYTES):
        values = torch.ones(size // 4, device=device)
        times.append(_seconds(partial(dist.all_reduce, values), device))
    moved = 2 * (ranks - 1) / ranks * LARGE_BYTES
    return moved / max(times[0] - times[1], 1e-9), times[1] / 2


def local_cluster(processes: int) -> Cluster:
    """This machine, measured by ``processes`` concurrent processes.

    Raises:
        UserError: fewer GPUs than processes, or a process failed.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu and processes > torch.cuda.device_count():
        raise UserError(
            f"--gpu local: {processes} processes, but this machine has "
            f"{torch.cuda.device_count()} GPUs; give --gpus-per-node"
        )
    return cluster_of(_in_processes(processes), processes)


def cluster_of(measured: list[MeasuredRates], processes: int) -> Cluster:
    """A cluster whose rates are the medians over the processes that measured them."""
    values = {name: median(asdict(one)[name] for one in measured) for name in asdict(measured[0])}
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        memory = float(torch.cuda.get_device_properties(0).total_memory)
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes
    return Cluster(
        "local",
        peak_flops=values["products"],
        fp32_flops=values["fp32_products"] or values["products"],
        memory=memory,
        memory_bandwidth=values["bandwidth"],
        node_bandwidth=values["link"],
        network_bandwidth=values["link"],
        node_latency=values["latency"],
        network_latency=values["latency"],
        gpus_per_node=processes,
        reserved=3e9 if on_gpu else 0.0,
        on_cpu=not on_gpu,
        rates=Rates(
            matmul_fraction=1.0,
            attention_fraction=values["attention"] / values["products"],
            bandwidth_fraction=1.0,
            link_fraction=1.0,
            dispatch_seconds=values["dispatch"],
            draws_per_second=values["draws"],
            synchronous=not on_gpu,
        ),
    )


def _in_processes(processes: int) -> list[MeasuredRates]:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as directory:
        store = str(Path(directory) / "store")
        workers = [
            context.Process(target=_measure_process, args=(rank, processes, store, results))
            for rank in range(processes)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(TIMEOUT_SECONDS)
            if worker.exitcode != 0:
                for other in workers:
                    other.kill()
                raise UserError(
                    f"--gpu local: a measuring process ended with {worker.exitcode}; "
                    "see its output above, or plan for a preset"
                )
        return [results.get() for _ in workers]


def _measure_process(rank: int, processes: int, store: str, results: object) -> None:
    # As in trainings (`parallel.launch.full_fp32`).
    torch.set_float32_matmul_precision("highest")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=processes,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    dist.barrier()
    in_fp32 = measure_rates(device, torch.float32)
    rates = measure_rates(device, torch.bfloat16) if on_gpu else in_fp32
    dist.barrier()
    link, latency = measure_links(device)
    dist.destroy_process_group()
    more = {"link": link, "latency": latency, "fp32_products": in_fp32.products}
    results.put(MeasuredRates(**asdict(rates) | more))  # type: ignore[attr-defined]


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Mean seconds of some calls, after a warm-up call. The mean, unlike a median, includes the
    effect of other work on the machine, which also slows training down."""
    call()
    _wait(device)
    started = time.perf_counter()
    for _ in range(REPEATS):
        call()
        _wait(device)
    return (time.perf_counter() - started) / REPEATS


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
