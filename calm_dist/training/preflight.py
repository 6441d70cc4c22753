"""Checks on every node before a job's ranks start.

A failure found here costs a minute; found by 128 ranks, it costs all their start-ups and is buried
in their messages.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sysconfig
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from calm_dist.data.download import Downloads
from calm_dist.data.store import read_meta
from calm_dist.errors import LaunchError, PeerLostError, UserError
from calm_dist.parallel.launch import World, join_world
from calm_dist.parallel.slurm import allocated_gpus, binds_gpus
from calm_dist.planner.dry_run import plan
from calm_dist.recipe import Recipe
from calm_dist.training.checkpoint.restart import free_space
from calm_dist.training.resolve import resolve

if TYPE_CHECKING:
    import torch

# With a smaller share of free memory, another process is using the GPU.
_FREE_GPU_MEMORY = 0.9
_ALL_REDUCE_BYTES = 64 << 20
_ALL_REDUCES = 5


def check_node(recipe: Recipe, world: World, timeout_seconds: float) -> str:
    """Check this node's GPUs, disk and data, and its connection to the job's other nodes.

    Args:
        world: a world of one process per node.
        timeout_seconds: longest wait for the other nodes.

    Returns:
        The findings, in one line.

    Raises:
        UserError: something is wrong with this node; the message names it.
        PeerLostError: another node did not connect; the message names it.
    """
    node = node_name()
    try:
        # Stores and autoencoder may fill in sizes that the recipe leaves out.
        recipe = resolve(recipe)
        found = [_check_disk(recipe), _check_data(recipe), *_check_gpus(recipe, world.size)]
        found.append(_all_reduce(recipe, world, timeout_seconds))
    except (UserError, PeerLostError) as error:
        raise type(error)(f"node {node}: {error}") from error
    return f"node {node}: {', '.join(found)}"


def node_name() -> str:
    """The node's name in Slurm, which may run several nodes on one machine, or the host name."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def _check_disk(recipe: Recipe) -> str:
    """Check that the run directory is writable here and has room for another checkpoint."""
    run_dir = Path(recipe.run.dir)
    probe = run_dir / f".preflight.{node_name()}.{os.getpid()}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"0" * 4096)
    except OSError as error:
        raise LaunchError(
            f"run.dir: {run_dir} cannot be written ({error.strerror}); it must be on a file "
            "system that every node mounts"
        ) from error
    finally:
        with suppress(OSError):
            probe.unlink()
    return f"{free_space(recipe) / 1e9:.0f} GB free in run.dir"


def _check_data(recipe: Recipe) -> str:
    """Check that the stores are visible here, with a valid meta.json."""
    downloads = Downloads.of(recipe.data)
    metas = [read_meta(source.path, downloads) for source in recipe.data.sources]
    return f"data of {sum(meta.num_tokens for meta in metas):.3g} tokens"


def _check_gpus(recipe: Recipe, num_nodes: int) -> list[str]:
    """Check that there is a GPU per rank of the node, free, and large enough for the plan."""
    if recipe.parallel.device == "cpu":
        return []
    import torch

    ranks = recipe.world_size // num_nodes
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count and recipe.parallel.device == "auto" and not allocated_gpus(os.environ):
        return ["no GPU"]
    if count and binds_gpus(os.environ):
        # A task sees its own GPU only, and this is one task of the node's.
        ranks = min(ranks, count)
    if count < ranks:
        raise LaunchError(
            f"torch finds {count} GPUs for {ranks} ranks; check the driver (nvidia-smi) and that "
            "torch is a CUDA build, ask for as many GPUs as tasks, or set parallel.device=cpu"
        )
    planned = max(stage["memory_bytes"]["total"] for stage in plan(recipe)["stages"])
    for number in range(ranks):
        free, total = torch.cuda.mem_get_info(number)
        if free < _FREE_GPU_MEMORY * total:
            raise LaunchError(
                f"GPU {number}: {(total - free) / 1e9:.1f} of {total / 1e9:.0f} GB are in use "
                "before the job starts; another process holds it (nvidia-smi)"
            )
        if planned > total:
            raise LaunchError(
                f"GPU {number}: has {total / 1e9:.0f} GB, a rank needs about {planned / 1e9:.0f} "
                "GB; see --dry-run, use a smaller training.micro_batch_size, recomputation or more "
                "model parallelism"
            )
    found = [f"{ranks} x {torch.cuda.get_device_name(0)}"]
    # The autoencoder's training launches torch's own kernels only.
    return found if recipe.model.kind == "autoencoder" else [*found, check_compiler()]


def check_compiler(include: str | None = None) -> str:
    """Compile and load a library that includes Python.h, as Triton and torch.compile do on each
    node when they first launch a kernel.

    Args:
        include: directory of Python.h; the interpreter's own if absent.

    Returns:
        The compiler that works.

    Raises:
        LaunchError: there is no compiler, no header, or the result cannot be loaded.
    """
    # As Triton chooses it.
    named = os.environ.get("CC")
    names = (named,) if named else ("gcc", "clang")
    compiler = next((path for name in names if (path := shutil.which(name))), None)
    if compiler is None:
        raise LaunchError(
            f"no C compiler ({', '.join(names)}), which Triton and torch.compile need on every "
            "node; install gcc there, set CC, or use an image that contains it"
        )
    include = include or sysconfig.get_paths()["include"]
    with tempfile.TemporaryDirectory() as directory:
        source, library = Path(directory, "probe.c"), Path(directory, "probe.so")
        source.write_text("#include <Python.h>\nint answer(void) { return PY_MAJOR_VERSION; }\n")
        command = [compiler, "-shared", "-fPIC", f"-I{include}", "-o", str(library), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise LaunchError(_compiler_problem(compiler, include, done.stderr))
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            raise LaunchError(
                f"a library compiled in {directory} cannot be loaded ({error}), as those of Triton "
                "and torch.compile will be; set TMPDIR and TRITON_CACHE_DIR to directories that "
                "are not mounted with noexec"
            ) from error
    return f"compiler {compiler}"


def _compiler_problem(compiler: str, include: str, errors: str) -> str:
    if "Python.h" in errors:
        version = sysconfig.get_python_version()
        return (
            f"{include} has no Python.h, which Triton and torch.compile need on every node; "
            f"install the headers of Python {version} (python{version}-dev, python{version}-devel),"
            " or use an interpreter that contains them"
        )
    lines = [line for line in errors.splitlines() if "error" in line] or errors.splitlines()
    return (
        f"{compiler} compiles nothing ({lines[0] if lines else 'no message'}), but Triton and "
        "torch.compile need it on every node; repair it, or set CC to another compiler"
    )


def _all_reduce(recipe: Recipe, world: World, timeout_seconds: float) -> str:
    """Sum over all nodes, to check that they reach each other and how fast."""
    import torch
    import torch.distributed as dist

    on_gpu = recipe.parallel.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    join_world(world, device, timeout_seconds)
    try:
        seconds = _time_all_reduce(device, world.size)
        if on_gpu and recipe.parallel.distributed_optimizer:
            _try_gloo()
    finally:
        dist.destroy_process_group()
    return f"all-reduce of {_ALL_REDUCE_BYTES >> 20} MiB over {world.size} nodes {seconds:.3f} s"


def _try_gloo() -> None:
    """Sum over all nodes through gloo, which connects to the address of the host's name unless
    GLOO_SOCKET_IFNAME says otherwise."""
    import torch
    import torch.distributed as dist

    try:
        dist.all_reduce(torch.ones(1), group=dist.new_group(backend="gloo"))
    except RuntimeError as error:
        raise LaunchError(
            f"gloo cannot connect the nodes ({error}); the distributed optimizer's checkpoints "
            "need it: set GLOO_SOCKET_IFNAME to the interface that NCCL_SOCKET_IFNAME names"
        ) from error


def _time_all_reduce(device: torch.device, size: int) -> float:
    """Seconds of an all-reduce; the median of several."""
    import torch
    import torch.distributed as dist

    times = []
    for _ in range(_ALL_REDUCES):
        values = torch.ones(_ALL_REDUCE_BYTES // 4, device=device)
        started = time.perf_counter()
        dist.all_reduce(values)
        # Reading a value waits for the GPU.
        if float(values[-1]) != size:
            raise LaunchError(f"an all-reduce over {size} nodes gave {float(values[-1])}")
        times.append(time.perf_counter() - started)
    return sorted(times)[_ALL_REDUCES // 2]
