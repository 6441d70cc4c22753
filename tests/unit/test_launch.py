"""The world as each launcher's environment describes it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from torch.distributed import TCPStore

from calm_dist.errors import LaunchError
from calm_dist.parallel.launch import (
    World,
    check_owner,
    device_number,
    read_world,
    select_device,
)
from calm_dist.parallel.slurm import PORTS, binds_gpus, node_names, where

TORCH = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "7"}
SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_PROCID": "9",
    "SLURM_STEP_NUM_TASKS": "12",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),2(x2)",
    "SLURM_STEP_NODELIST": "localhost",
}


def test_single_process() -> None:
    assert read_world({}) == World(0, 1, 0, 1, "127.0.0.1", 29500, "single process")


def test_torchrun() -> None:
    env = TORCH | {"LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}
    assert read_world(env) == World(5, 8, 1, 4, "a", 7, "torchrun")


def test_deepspeed_sets_local_size_instead() -> None:
    assert read_world(TORCH | {"LOCAL_SIZE": "4"}) == World(5, 8, 1, 4, "a", 7, "deepspeed")


def test_srun() -> None:
    port = PORTS[123456 % len(PORTS)]
    assert read_world(SLURM) == World(9, 12, 1, 2, "localhost", port, "srun")


def test_srun_address_can_be_overridden() -> None:
    world = read_world(SLURM | {"MASTER_ADDR": "b", "MASTER_PORT": "9"})
    assert (world.address, world.port) == ("b", 9)


def test_batch_script_is_a_single_process() -> None:
    """Slurm sets SLURM_PROCID=0 in a batch script, where nothing was launched by srun."""
    assert read_world({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0"}).size == 1


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        (TORCH, "LOCAL_WORLD_SIZE"),
        (TORCH | {"LOCAL_SIZE": "x"}, "LOCAL_SIZE='x'"),
        (TORCH | {"LOCAL_SIZE": "4", "RANK": "8"}, "rank 8 of 8"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4"}, "SLURM_NODEID=2"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "four"}, "SLURM_STEP_TASKS_PER_NODE"),
    ],
)
def test_what_is_wrong_is_named(env: dict[str, str], name: str) -> None:
    with pytest.raises(LaunchError, match=name.replace("(", r"\(")):
        read_world(env)


def test_allocated_gpus_without_cuda_are_no_cpu_run(monkeypatch: pytest.MonkeyPatch) -> None:
    world = read_world({})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert select_device(world, "auto").type == "cpu"
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.setenv("SLURMD_NODENAME", "gpu07")
    assert select_device(world, "cpu").type == "cpu"
    with pytest.raises(LaunchError, match=r"8 GPUs on gpu07, but torch finds no CUDA.*device=cpu"):
        select_device(world, "auto")


@pytest.mark.parametrize("take", ["select_device(read_world({}), 'cpu')", "own_device('cpu')"])
def test_an_image_that_makes_fp32_products_inexact_is_overruled(take: str) -> None:
    """NVIDIA's images set the variable, which torch reads when it is imported."""
    code = f"""
import os, torch
from calm_dist.parallel.launch import own_device, read_world, select_device
print(torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32)
{take}
print(torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32)
print(os.environ["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"},
    )  # fmt: skip
    assert done.stdout.split() == ["high", "True", "highest", "False", "0"]


@pytest.mark.parametrize(
    ("local_rank", "local_size", "visible", "number"),
    [
        (3, 8, 8, 3),
        (1, 2, 8, 1),
        (0, 1, 1, 0),
        # Slurm's --gpus-per-task=1: each task sees its own GPU, as device 0.
        (0, 8, 1, 0),
        (7, 8, 1, 0),
    ],
)
def test_gpu_of_a_rank(local_rank: int, local_size: int, visible: int, number: int) -> None:
    assert device_number(local_rank, local_size, visible) == number


@pytest.mark.parametrize("local_rank", range(4))
def test_too_few_gpus_end_every_rank(local_rank: int) -> None:
    with pytest.raises(LaunchError, match=r"4 ranks on .* each sees 2 GPUs; launch as many"):
        device_number(local_rank, 4, 2)


def test_bound_gpu_is_what_deepspeed_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two local ranks, the second sees one GPU. Only CUDA's answers are replaced."""
    taken: list[int] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    world = World(5, 8, 1, 2, "a", 7, "srun")
    monkeypatch.setenv("LOCAL_RANK", "")
    world.export()
    device = select_device(world, "auto")
    assert (device.index, taken, os.environ["LOCAL_RANK"]) == (0, [0], "0")
    # Streaming still tells the node's ranks apart.
    assert os.environ["LOCAL_WORLD_SIZE"] == "2"


def test_ranks_that_share_a_gpu_are_told() -> None:
    """Each rank through a connection of its own, as in `join_world`."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stores = [TCPStore("127.0.0.1", server.port, wait_for_workers=False) for _ in range(3)]
    worlds = [World(rank, 3, rank, 3, "127.0.0.1", server.port, "srun") for rank in range(3)]
    gpus = ["n1/GPU-a", "n1/GPU-b", "n1/GPU-b"]
    for store, gpu in zip(stores, gpus, strict=True):
        store.add(f"gpu/{gpu}", 1)
    check_owner(stores[0], gpus[0], worlds[0])
    for rank in (1, 2):
        with pytest.raises(LaunchError, match=f"rank {rank} .*GPU-b is used by 2 ranks"):
            check_owner(stores[rank], gpus[rank], worlds[rank])


def test_binding_by_slurm() -> None:
    assert not binds_gpus({"SLURM_GPUS_ON_NODE": "8", "SLURM_GPU_BIND": "none"})
    assert binds_gpus({"SLURM_GPUS_PER_TASK": "1"})
    assert binds_gpus({"SLURM_TRES_PER_TASK": "cpu:8,gres/gpu:1"})
    assert binds_gpus({"SLURM_GPU_BIND": "single:1"})


def test_nodes_of_ranks() -> None:
    assert node_names("gpu07") == ["gpu07"]
    alone = {"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_STEP_NODELIST": "gpu07"}
    assert where([1, 3], alone) == "on gpu07"
    assert where([1], {}) == ""
