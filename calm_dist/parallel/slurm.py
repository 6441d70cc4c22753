"""What Slurm says of a job in the environment: nodes, tasks, GPUs, and where rank 0 is met."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Iterable, Mapping

from calm_dist.errors import LaunchError

# Ports that are derived from a job id: below Linux's ephemeral range.
PORTS = range(20000, 32000)


def port_of(job_id: int) -> int:
    """The port on which rank 0 of a job listens: the same on all nodes, another for other jobs."""
    return PORTS[job_id % len(PORTS)]


def tasks_per_node(text: str) -> list[int]:
    """Slurm's compact list, such as ``8(x16),4``, as the number of tasks of each node.

    Raises:
        LaunchError: it cannot be read.
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
        LaunchError: scontrol, which knows the syntax, cannot expand it.
    """
    if not any(mark in text for mark in "[,"):
        return [text] if text else []
    return _scontrol("hostnames", text).split()


def address_of(node: str) -> str:
    """What other nodes can call a node: its name where that resolves, else the address that Slurm
    itself uses.

    Raises:
        LaunchError: the name does not resolve, and Slurm does not know the node.
    """
    try:
        socket.getaddrinfo(node, None)
    except OSError:
        match = re.search(r"NodeAddr=(\S+)", _scontrol("node", node))
        if match is None:
            raise LaunchError(
                f"the name of node {node} does not resolve, and Slurm knows no address of it; "
                "set MASTER_ADDR to an address that all nodes reach"
            ) from None
        return match[1]
    return node


def where(ranks: Iterable[int], env: Mapping[str, str]) -> str:
    """The nodes of some ranks of a job step, such as ``on n2, n5``; "" outside of one."""
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
    """GPUs that the job has on this node; 0 outside of a job and in jobs without."""
    count = env.get("SLURM_GPUS_ON_NODE", "")
    return int(count) if count.isdigit() else 0


def _scontrol(what: str, name: str) -> str:
    command = ["scontrol", "show", what, name]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise LaunchError(f"{' '.join(command)}: {error.strerror}; it comes with Slurm") from error
    if shown.returncode or not shown.stdout.strip():
        raise LaunchError(f"{' '.join(command)}: {(shown.stderr or shown.stdout).strip()}")
    return shown.stdout
