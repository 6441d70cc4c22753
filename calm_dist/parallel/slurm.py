"""Facts about a job from Slurm's environment: nodes, tasks, GPUs, and the address of rank 0."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Iterable, Mapping

from calm_dist.errors import LaunchError

# Range of ports derived from job ids: below Linux's ephemeral range.
PORTS = range(20000, 32000)


def port_of(job_id: int) -> int:
    """The port of a job's rank 0: the same on all nodes, different for most other jobs."""
    return PORTS[job_id % len(PORTS)]


def tasks_per_node(text: str) -> list[int]:
    """The number of tasks on each node, from Slurm's compact list such as ``8(x16),4``.

    Raises:
        LaunchError: it cannot be parsed.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise LaunchError(f"SLURM_STEP_TASKS_PER_NODE={text!r} cannot be read")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def node_names(text: str) -> list[str]:
    """The names in a node list such as ``gpu[03-18]``.

    Raises:
        LaunchError: scontrol cannot expand it.
    """
    if not any(mark in text for mark in "[,"):
        return [text] if text else []
    return _scontrol("hostnames", text).split()


def address_of(node: str) -> str:
    """The address at which other nodes reach a node: its name if that resolves, otherwise the
    address that Slurm itself uses.

    Raises:
        LaunchError: the name does not resolve, and Slurm does not know the node.
    """
    try:
        socket.getaddrinfo(node, None)
    except OSError:
        match = re.search(r"NodeAddr=(\S+)", _scontrol("node", node))
        if match is None:
            raise LaunchError(
                f"the name of node {node} does not resolve, and Slurm knows no address for it; "
                "set MASTER_ADDR to an address that all nodes can reach"
            ) from None
        return match[1]
    return node


def where(ranks: Iterable[int], env: Mapping[str, str]) -> str:
    """The nodes of ``ranks`` in a job step, such as ``on n2, n5``; "" outside a job step."""
    try:
        counts = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", ""))
        names = node_names(env.get("SLURM_STEP_NODELIST", ""))
    except LaunchError:
        return ""
    # Ranks are laid out node after node (srun's distribution "block").
    node_of = [name for name, count in zip(names, counts, strict=False) for _ in range(count)]
    nodes = dict.fromkeys(node_of[rank] for rank in ranks if rank < len(node_of))
    return f"on {', '.join(nodes)}" if nodes else ""


def allocated_gpus(env: Mapping[str, str]) -> int:
    """GPUs of the job on this node; 0 outside a job and in jobs without GPUs."""
    count = env.get("SLURM_GPUS_ON_NODE", "")
    return int(count) if count.isdigit() else 0


def binds_gpus(env: Mapping[str, str]) -> bool:
    """Whether Slurm shows each task its own GPUs only (``--gpus-per-task``, ``--gpu-bind``)."""
    per_task = "gres/gpu" in env.get("SLURM_TRES_PER_TASK", "")
    binding = env.get("SLURM_GPU_BIND", "")
    return per_task or "SLURM_GPUS_PER_TASK" in env or binding not in ("", "none")


def _scontrol(what: str, name: str) -> str:
    command = ["scontrol", "show", what, name]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise LaunchError(f"{' '.join(command)}: {error.strerror}; it comes with Slurm") from error
    if shown.returncode or not shown.stdout.strip():
        raise LaunchError(f"{' '.join(command)}: {(shown.stderr or shown.stdout).strip()}")
    return shown.stdout
