"""Makes a world from the environment of deepspeed, torchrun, srun or a single process.

`read_world` reads the launcher's variables, `join_world` connects the processes. Both report what
is wrong: a port that is in use, a rank that never connected.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from calm_dist.errors import LaunchError, PeerLostError
from calm_dist.parallel import slurm
from calm_dist.parallel.processes import identity

if TYPE_CHECKING:
    import torch

DEFAULT_ADDRESS = "127.0.0.1"
DEFAULT_PORT = 29500


@dataclass(frozen=True)
class World:
    """The place of this process among all processes of the run."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    launcher: str

    def export(self) -> None:
        """Set the variables that Streaming and DeepSpeed read.

        DeepSpeed's launcher does not set LOCAL_WORLD_SIZE; without it, Streaming takes every rank
        for a separate node.
        """
        os.environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.size),
            LOCAL_RANK=str(self.local_rank),
            LOCAL_WORLD_SIZE=str(self.local_size),
            MASTER_ADDR=self.address,
            MASTER_PORT=str(self.port),
        )


ALONE = World(0, 1, 0, 1, "", 0, "single process")
"""One process, which opens no port."""


def tensor_parallel_world() -> World:
    """The world of a tool whose processes share a model: those of torchrun (or deepspeed).

    Otherwise this process alone, as each task of srun is.

    Raises:
        LaunchError: a variable is missing or contradicts another.
    """
    several = "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    return read_world() if several else ALONE


def read_world(env: Mapping[str, str] | None = None) -> World:
    """The world that the launcher's environment describes.

    Raises:
        LaunchError: a variable is missing or contradicts another.
    """
    env = os.environ if env is None else env
    if "RANK" in env or "WORLD_SIZE" in env:
        world = _from_torch_variables(env)
    # A batch script has SLURM_PROCID too; only a task of srun has the step's variables.
    elif "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
        world = _from_slurm(env)
    else:
        world = World(0, 1, 0, 1, DEFAULT_ADDRESS, DEFAULT_PORT, "single process")
    if not (0 <= world.rank < world.size and 0 <= world.local_rank < world.local_size):
        raise LaunchError(
            f"rank {world.rank} of {world.size} (local {world.local_rank} of {world.local_size}), "
            f"set by {world.launcher}, is impossible; check RANK, WORLD_SIZE, LOCAL_RANK and "
            "LOCAL_WORLD_SIZE"
        )
    return world


def _number(env: Mapping[str, str], *names: str) -> int:
    """The first of the variables ``names`` that is set, as a number."""
    for name in names:
        if name in env:
            try:
                return int(env[name])
            except ValueError as error:
                raise LaunchError(f"{name}={env[name]!r} is not a number") from error
    raise LaunchError(
        f"{names[0]} is not set, although other variables of a launcher are; start with "
        "deepspeed, torchrun or srun, or unset RANK and WORLD_SIZE for a single process"
    )


def _from_torch_variables(env: Mapping[str, str]) -> World:
    rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    return World(
        rank,
        size,
        _number(env, "LOCAL_RANK"),
        # DeepSpeed's launcher calls it LOCAL_SIZE.
        _number(env, "LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
        env.get("MASTER_ADDR", DEFAULT_ADDRESS),
        _number(env, "MASTER_PORT") if "MASTER_PORT" in env else DEFAULT_PORT,
        "torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed",
    )


def _from_slurm(env: Mapping[str, str]) -> World:
    counts = slurm.tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = _number(env, "SLURM_NODEID")
    if node >= len(counts):
        raise LaunchError(
            f"SLURM_NODEID={node}, but SLURM_STEP_TASKS_PER_NODE="
            f"{env['SLURM_STEP_TASKS_PER_NODE']!r} has {len(counts)} nodes"
        )
    address = env.get("MASTER_ADDR")
    if not address:
        names = slurm.node_names(env.get("SLURM_STEP_NODELIST", ""))
        address = slurm.address_of(names[0]) if names else DEFAULT_ADDRESS
    return World(
        _number(env, "SLURM_PROCID"),
        _number(env, "SLURM_STEP_NUM_TASKS"),
        _number(env, "SLURM_LOCALID"),
        counts[node],
        address,
        _number(env, "MASTER_PORT")
        if "MASTER_PORT" in env
        else slurm.port_of(_number(env, "SLURM_JOB_ID")),
        "srun",
    )


def select_device(world: World, device: str, field: str = "parallel.device") -> torch.device:
    """The device of this process for ``parallel.device`` (auto, cuda or cpu).

    Args:
        field: the field or option that sets ``device``, for messages.

    Raises:
        LaunchError: cuda is requested but absent or there are too few devices (`device_number`); or
            the job has GPUs that torch does not find, and would silently train on the CPU.
    """
    import torch

    full_fp32()
    if device == "cpu":
        return torch.device("cpu")
    if device == "auto" and not torch.cuda.is_available():
        if gpus := slurm.allocated_gpus(os.environ):
            raise LaunchError(
                f"{field}=auto: Slurm gave the job {gpus} GPUs on "
                f"{os.environ.get('SLURMD_NODENAME', socket.gethostname())}, but torch finds no "
                "CUDA device; check the node's driver and that torch is a CUDA build, or set "
                f"{field}=cpu"
            )
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise LaunchError(f"{field}=cuda, but torch finds no CUDA device; use auto or cpu")
    number = device_number(world.local_rank, world.local_size, torch.cuda.device_count())
    torch.cuda.set_device(number)
    if number != world.local_rank:
        # DeepSpeed 0.19.8 takes it for the number of the device, at its start and, with ZeRO-3, in
        # every step. Streaming tells nodes apart by LOCAL_WORLD_SIZE and RANK.
        os.environ["LOCAL_RANK"] = str(number)
    return torch.device("cuda", number)


def device_number(local_rank: int, local_size: int, visible: int) -> int:
    """The number, for CUDA, of the GPU that a rank takes.

    Args:
        visible: GPUs that this process sees. A single one next to several ranks is the rank's own:
            Slurm's ``--gpus-per-task=1`` and ``--gpu-bind=single`` show each task only that, as
            device 0. Whether it is another rank's too is found when the ranks connect.

    Raises:
        LaunchError: the ranks of the node are more than its GPUs.
    """
    if visible >= local_size:
        return local_rank
    if visible == 1:
        return 0
    raise LaunchError(
        f"{local_size} ranks on {socket.gethostname()}, where each sees {visible} GPUs; launch as "
        "many processes as GPUs, or bind one GPU to each (--gpus-per-task=1)"
    )


def cuda_environment(tensor_parallel_size: int) -> dict[str, str]:
    """Settings of CUDA and its allocator that have to be there before the first use of a GPU.

    One hardware queue lets the kernels of tensor parallelism run in the order of their launch, so
    that communication starts before the computation that it overlaps with (Megatron-core asks for
    it). Expandable segments keep the memory of changing sizes from fragmenting.
    """
    settings = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    if tensor_parallel_size > 1:
        settings["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return settings


def full_fp32() -> None:
    """Compute fp32 products in fp32, in this process and those that it starts.

    NVIDIA's images set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, which computes every product of fp32
    tensors in TF32, with a relative error of 1e-3. `select_device` and `own_device` call this; a
    tool that takes its GPU in another way must call it too.
    """
    import torch

    os.environ["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] = "0"
    # torch read the variable when it was imported.
    torch.set_float32_matmul_precision("highest")


def own_device(device: str) -> torch.device:
    """The device of a tool's process, which is alone or one of several independent ones, for its
    option ``--device`` (auto, cuda, cuda:N or cpu).

    Raises:
        LaunchError: as `select_device`, or there is no GPU of that number.
    """
    import torch

    full_fp32()
    kind, _, number = device.partition(":")
    if number:
        visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(number) >= visible:
            raise LaunchError(
                f"--device={device}, but torch finds {visible} CUDA devices; "
                + (f"give a number below {visible}" if visible else "use auto or cpu")
            )
        torch.cuda.set_device(int(number))
        return torch.device(kind, int(number))
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    world = World(0, 1, local_rank, local_rank + 1, DEFAULT_ADDRESS, DEFAULT_PORT, "")
    return select_device(world, device, "--device")


def patience(timeout_seconds: float) -> float:
    """Time limit, in seconds, of a start and of waits outside the watchdog.

    Longer than ``health.timeout_seconds``, so that the watchdog can first name the stuck rank and
    the reason.
    """
    return 1.5 * timeout_seconds + 30.0


def join_world(
    world: World, device: torch.device, timeout_seconds: float
) -> torch.distributed.Store:
    """Connect all processes (NCCL on GPUs, gloo on CPUs) and return their common store.

    A single process opens no port. Collectives time out later than `patience`, so that the watchdog
    reports first.

    Raises:
        LaunchError: the port is in use, or another rank has the same GPU.
        PeerLostError: rank 0 does not answer, or ranks are missing after ``timeout_seconds``; the
            message names them. Another start may succeed.
    """
    import torch.distributed as dist

    timeout = timedelta(seconds=timeout_seconds)
    if world.size == 1:
        store: dist.Store = dist.HashStore()
    else:
        store = _open_store(world, timeout)
        gpu = _gpu_identity(device)
        if gpu:
            store.add(f"gpu/{gpu}", 1)
        _call_the_roll(store, world, timeout)
        if gpu:
            check_owner(store, gpu, world)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("world", store),
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=patience(timeout_seconds) + 30.0),
        # No device_id: with it, NCCL connects every group at once, and the whole world takes part
        # in each of them, also in those of one rank. Without it, a group connects when it is used.
    )
    return store


def _gpu_identity(device: torch.device) -> str:
    """The GPU's unique identity; "" for a CPU and where the driver gives none."""
    import torch

    if device.type != "cuda":
        return ""
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    return f"{socket.gethostname()}/{uuid}" if uuid.strip("0-") else ""


def check_owner(store: torch.distributed.Store, gpu: str, world: World) -> None:
    """Check that one rank only has added itself to ``gpu/{gpu}``, after all ranks have connected.

    NCCL would otherwise end all ranks with "Duplicate GPU detected" in their first collective.

    Raises:
        LaunchError: several ranks use this GPU.
    """
    users = store.add(f"gpu/{gpu}", 0)
    if users > 1:
        raise LaunchError(
            f"rank {world.rank} (local {world.local_rank} of {world.local_size}): its GPU {gpu} is "
            f"used by {users} ranks; launch as many processes as the node has GPUs, or give each "
            "its own (--gpus-per-task=1)"
        )


def _open_store(world: World, timeout: timedelta) -> torch.distributed.Store:
    import torch.distributed as dist

    # torchrun's agent already serves a store at that address.
    serve = world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    where = f"{world.address}:{world.port}"
    try:
        store = dist.TCPStore(
            world.address, world.port, world.size, serve, timeout, wait_for_workers=False
        )
    except (RuntimeError, ValueError) as error:
        if serve:
            raise LaunchError(
                f"rank 0 cannot listen on {where} (MASTER_PORT): {_first_line(error)}; "
                "another job, or a leftover process of a killed one, uses the port; choose another"
            ) from error
        raise PeerLostError(
            f"rank {world.rank} cannot reach rank 0 at {where} within "
            f"{timeout.total_seconds():.0f} s: {_first_line(error)}; see the log of rank 0, and "
            "check MASTER_ADDR and MASTER_PORT"
        ) from error
    # After a restart by torchrun, the agent's store still holds the keys of the previous attempt.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"calm_dist/{attempt}", store)


def _call_the_roll(store: torch.distributed.Store, world: World, timeout: timedelta) -> None:
    """Wait until every rank has connected; name those that have not."""
    store.set(f"roll/{world.rank}", identity())
    names = [f"roll/{rank}" for rank in range(world.size)]
    try:
        store.wait(names, timeout)
    except RuntimeError as error:
        try:
            missing = [rank for rank, name in enumerate(names) if not store.check([name])]
        except RuntimeError:
            raise PeerLostError(
                f"rank {world.rank}: rank 0 at {world.address}:{world.port} gave up while ranks "
                "were still missing; see its log"
            ) from error
        if not missing:
            return
        raise PeerLostError(
            f"rank {world.rank}: of {world.size} ranks, {_ranks(missing)} did not connect within "
            f"{timeout.total_seconds():.0f} s; see their logs, or launch {world.size} processes"
        ) from error


def _ranks(ranks: list[int]) -> str:
    named = ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
    where = slurm.where(ranks, os.environ)
    return f"{named} ({where})" if where else named


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
