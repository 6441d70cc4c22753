"""The world as each launcher's environment describes it."""

from __future__ import annotations

import pytest

from calm_dist.errors import LaunchError
from calm_dist.parallel.launch import World, read_world, select_device
from calm_dist.parallel.slurm import PORTS, node_names, where

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


def test_nodes_of_ranks() -> None:
    assert node_names("gpu07") == ["gpu07"]
    alone = {"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_STEP_NODELIST": "gpu07"}
    assert where([1, 3], alone) == "on gpu07"
    assert where([1], {}) == ""
