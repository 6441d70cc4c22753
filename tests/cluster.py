"""A private Slurm of several nodes on this machine, for one test session.

Real daemons of the distribution's packages (slurmctld, slurmd, munged) with all files in one
directory and no system service. GPUs are fake: device files that Slurm hands out and nobody opens.
All nodes share the machine's host name, and their own names do not resolve.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
PACKAGES = "slurmctld slurmd slurm-client munge"
START_SECONDS = 60

_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={dir}/munge/socket,cred_expire=5
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile={dir}/pid/slurmctld
SlurmdPidFile={dir}/pid/%n
SlurmctldLogFile={dir}/log/slurmctld
SlurmdLogFile={dir}/log/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
ReturnToService=1
SlurmctldTimeout=10
SlurmdTimeout=10
InactiveLimit=0
KillWait=5
Waittime=0
BatchStartTimeout=10
MessageTimeout=10
CompleteWait=0
TCPTimeout=2
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=0,batch_sched_delay=0,requeue_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PriorityType=priority/basic
GresTypes=gpu
"""
_NODE = (
    "NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} Boards=1 "
    "SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=20000 Gres=gpu:{gpus} "
    "State=UNKNOWN\n"
)
_PARTITIONS = """\
PartitionName=main Nodes=n[1-{nodes}] Default=YES MaxTime=INFINITE DefaultTime=10 State=UP \
PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=n[1-{nodes}] MaxTime=INFINITE DefaultTime=10 State=UP PriorityTier=10 \
PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """What this machine lacks of Slurm; empty where a `Cluster` can be started."""
    return [name for name in PROGRAMS if _program(name) is None]


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


class Cluster:
    """Starts the daemons when entered, and ends them and their jobs when left."""

    def __init__(self, directory: Path, nodes: int, *, cpus: int, gpus: int) -> None:
        self.directory, self.nodes = directory, nodes
        self._cpus, self._gpus = cpus, gpus
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """This process's, without a job it may itself run in, and with the cluster."""
        mine = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        return mine | {"SLURM_CONF": str(self.directory / "slurm.conf")}

    def __enter__(self) -> Cluster:
        for name in ("munge", "state", "spool", "pid", "log", "dev"):
            (self.directory / name).mkdir(parents=True)
        self._write_configuration()
        (self.directory / "munge" / "key").write_bytes(os.urandom(128))
        (self.directory / "munge" / "key").chmod(0o600)
        (self.directory / "munge").chmod(0o755)
        munge = self.directory / "munge"
        try:
            self._start(
                "munged",
                *("--foreground", "--force", f"--key-file={munge}/key"),
                *(f"--socket={munge}/socket", f"--pid-file={munge}/pid"),
                *(f"--log-file={munge}/log", f"--seed-file={munge}/seed"),
            )
            self._wait_for((munge / "socket").exists)
            self._start("slurmctld", "-D")
            for number in range(1, self.nodes + 1):
                self.start_node(f"n{number}")
            self._wait_for(lambda: self.states().count("idle") == self.nodes)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._command("scancel", "--user", getpass.getuser(), check=False)
        deadline = time.monotonic() + 15
        while self._command("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.2)
        for name, daemon in reversed(self._daemons.items()):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
            if name.startswith("n"):
                self._kill_jobs_of(name)

    def start_node(self, name: str) -> None:
        """Start a node's daemon, also after `kill_node`."""
        (self.directory / "spool" / name).mkdir(exist_ok=True)
        self._start("slurmd", "-D", "-N", name, name=name)

    def kill_node(self, name: str) -> None:
        """The sudden death of a node: its daemon, its job steps, its tasks."""
        daemon = self._daemons.pop(name)
        daemon.kill()
        daemon.wait()
        self._kill_jobs_of(name)

    def states(self) -> list[str]:
        """The state of each node, such as idle, mix or down."""
        return self._command("sinfo", "-hN", "-p", "main", "-o", "%t", check=False).split()

    def _write_configuration(self) -> None:
        host, first = socket.gethostname().split(".")[0], _free_ports(self.nodes + 1)
        text = _CONF.format(host=host, port=first, user=getpass.getuser(), dir=self.directory)
        for number in range(1, self.nodes + 1):
            text += _NODE.format(
                number=number, host=host, port=first + number, cpus=self._cpus, gpus=self._gpus
            )
        text += _PARTITIONS.format(nodes=self.nodes)
        (self.directory / "slurm.conf").write_text(text)
        (self.directory / "cgroup.conf").write_text("CgroupAutomount=no\nConstrainCores=no\n")
        gres = ""
        if self._gpus:
            for number in range(self._gpus):
                (self.directory / "dev" / f"nvidia{number}").symlink_to("/dev/null")
            files = f"{self.directory}/dev/nvidia[0-{self._gpus - 1}]"
            gres = f"NodeName=n[1-{self.nodes}] Name=gpu File={files}\n"
        (self.directory / "gres.conf").write_text(gres)

    def _start(self, program: str, *arguments: str, name: str | None = None) -> None:
        path = _program(program)
        assert path is not None
        with (self.directory / "log" / f"{name or program}.out").open("ab") as log:
            self._daemons[name or program] = subprocess.Popen(
                [path, *arguments], env=self.environment, stdout=log, stderr=log
            )

    def _wait_for(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            for name, daemon in self._daemons.items():
                assert daemon.poll() is None, f"{name} ended; see {self.directory / 'log'}"
            assert time.monotonic() < deadline, f"Slurm does not start; see {self.directory}"
            time.sleep(0.1)

    def _command(self, *words: str, check: bool = True) -> str:
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, check=check, timeout=60
        )
        return done.stdout

    def _kill_jobs_of(self, node: str) -> None:
        """End what a killed slurmd leaves running: first the step's keeper, then its tasks."""
        tasks, keepers = [], []
        for pid in (int(path.name) for path in Path("/proc").glob("[0-9]*")):
            env = _environment_of(pid)
            if env.get("SLURMD_NODENAME") == node and env.get("SLURM_CONF", "").startswith(
                str(self.directory)
            ):
                tasks.append(pid)
                parent = _parent_of(pid)
                if _name_of(parent) == "slurmstepd":
                    keepers.append(parent)
        for pid in (*keepers, *tasks):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def _free_ports(count: int) -> int:
    """The first of ``count`` ports in a row that nobody uses."""
    for first in range(17000, 19000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports between 17000 and 19000")


def _environment_of(pid: int) -> Mapping[str, str]:
    try:
        text = Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry)


def _parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
