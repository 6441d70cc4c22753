"""Lifetimes of processes: this process dies with its launcher, and its children die with it.

A killed launcher cannot end its ranks, and a killed rank cannot end the processes that it forked
to read data and write checkpoints. Such leftovers would block the restart by holding the port, the
GPUs and the run directory, so on Linux the kernel is asked to end them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.5
# Niceness of the lowest priority.
_LAST = 19
_TRIES = 100


def die_with_launcher() -> None:
    """If torchrun or deepspeed started this process, do not outlive it.

    A single process, a process of srun and one started by hand have no such parent: a user who
    starts one with nohup and logs out wants it to continue.
    """
    by_deepspeed = "CROSS_RANK" in os.environ and "LOCAL_SIZE" in os.environ
    if not sys.platform.startswith("linux"):
        return
    if "TORCHELASTIC_RUN_ID" not in os.environ and not by_deepspeed:
        return
    launcher = os.getppid()
    _die_with_parent(launcher, ctypes.CDLL(None).prctl)
    # `deepspeed` starts a launcher on the node, which starts the ranks and outlives `deepspeed`.
    runner = _parent(launcher)
    if by_deepspeed and runner and b"deepspeed" in _read(f"/proc/{runner}/cmdline"):
        threading.Thread(
            target=_die_when_orphaned, args=(launcher, runner), name="launcher", daemon=True
        ).start()


def children_die_with_us() -> None:
    """Make processes that this one forks from its main thread die with it, however it ends."""
    if sys.platform.startswith("linux") and not _Fork.registered:
        _Fork.registered = True
        _Fork.prctl = ctypes.CDLL(None).prctl
        os.register_at_fork(before=_Fork.before, after_in_child=_Fork.after_in_child)


def stand_back() -> None:
    """Give a forked child without urgency the lowest priority, so that the training gets its cores.

    The child gets its own session, because Linux divides a core equally between sessions (unless a
    control group says otherwise) and applies niceness only within a session.
    """
    os.nice(_LAST)
    os.setsid()
    # Without privileges, only one process of a machine may write this every 0.1 s, and all ranks
    # try at once. Until it succeeds, this process has the full share of a session.
    for _ in range(_TRIES):
        try:
            Path("/proc/self/autogroup").write_text(str(_LAST))
        except BlockingIOError:
            time.sleep(random.uniform(0.05, 0.3))
        except OSError:
            return
        else:
            return


def hurry(pid: int) -> None:
    """Restore the session priority of a child that called `stand_back`, if allowed, because it is
    now waited for."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text("0")


class _Fork:
    """Facts about a fork that the child needs."""

    registered = False
    parent = 0
    # Loaded before the fork: a child of a process with threads should not load libraries.
    prctl: Any = None

    @classmethod
    def before(cls) -> None:
        # The kernel sends the signal when the forking thread ends, so a short-lived thread must
        # not request it.
        in_main = threading.current_thread() is threading.main_thread()
        cls.parent = os.getpid() if in_main else 0

    @classmethod
    def after_in_child(cls) -> None:
        if cls.parent:
            _die_with_parent(cls.parent, cls.prctl)


def _die_with_parent(parent: int, prctl: Any) -> None:
    prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        # The parent died before the request.
        os.kill(os.getpid(), signal.SIGKILL)


def _die_when_orphaned(launcher: int, runner: int) -> None:
    while _parent(launcher) == runner:
        time.sleep(_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def identity() -> str:
    """A unique identity of this process: boot of the machine, PID namespace, PID, start time."""
    if not sys.platform.startswith("linux"):
        return ""
    pid = os.getpid()
    boot = _read("/proc/sys/kernel/random/boot_id").decode().strip()
    return f"{boot} {os.stat('/proc/self/ns/pid').st_ino} {pid} {_start_time(pid)}"


def kill_if_here(process: str) -> None:
    """SIGKILL the process of an `identity` if it is still running on this machine."""
    if (here := _number_and_start(process)) is None:
        return
    pid, start = here
    with contextlib.suppress(OSError):
        if _start_time(pid) == start:
            os.kill(pid, signal.SIGKILL)


def is_gone(process: str) -> bool:
    """Whether the process of an `identity` ran on this machine and has ended."""
    if (here := _number_and_start(process)) is None:
        return False
    pid, start = here
    return _start_time(pid) != start or _stat(pid)[:1] in (["Z"], ["X"])


def _number_and_start(process: str) -> tuple[int, str] | None:
    """PID and start time of an `identity` of this machine; None for other machines."""
    words, own = process.split(), identity().split()
    return (int(words[2]), words[3]) if len(words) == 4 and words[:2] == own[:2] else None


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, which may hold any character; [] if there is no
    such process."""
    return _read(f"/proc/{pid}/stat").decode(errors="replace").rpartition(")")[2].split()


def _parent(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def _start_time(pid: int) -> str:
    fields = _stat(pid)
    return fields[19] if fields else ""


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""
