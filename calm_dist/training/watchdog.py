"""Ends a run that hangs, and names the rank that causes it.

Every rank has a thread that publishes once a second what its main thread is doing. When a rank has
made no progress for `health.timeout_seconds`, this thread compares all ranks and names the one that
the others wait for: a rank that gives no sign of life (stopped, or its interpreter is blocked),
otherwise one that is working and not waiting, otherwise the one furthest behind.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from types import FrameType
from typing import NoReturn

import torch.distributed as dist

from calm_dist.data.download import busy
from calm_dist.errors import (
    EXIT_HUNG,
    EXIT_PEER_LOST,
    HungError,
    PeerLostError,
    StoppedError,
    TrainingDivergedError,
    UserError,
)
from calm_dist.parallel.launch import World, patience
from calm_dist.parallel.peers import (
    BEAT_SECONDS,
    SILENCE_SECONDS,
    Peers,
    Status,
    agent_serves_store,
)
from calm_dist.training.phases import Phases

DIED = "died or stopped answering"
# What a main thread is doing, ordered by how likely the thread itself causes the delay.
WORKING, BACKWARD, WAITING = range(3)
# A torch backward pass may be waiting for the exchange of gradients, which Python does not see.
_BACKWARD_FILES = ("torch/autograd/graph.py",)
_WAITING_FILES = (
    "torch/distributed/distributed_c10d.py",
    "torch/distributed/c10d_logger.py",
    "megatron/core/pipeline_parallel/p2p_communication.py",
    "streaming/base/shared/barrier.py",
)
# Innermost frames that are searched for one of these files.
_FRAMES = 3
_TELL_SECONDS = 2.0


@contextlib.contextmanager
def watched(
    store: dist.Store, world: World, phases: Phases, timeout_seconds: float
) -> Iterator[None]:
    """Watch over the context, which the main thread runs, and name ranks that die or hang.

    If a rank hangs, another thread ends this process with code 5 (`errors.EXIT_HUNG`).

    Raises:
        PeerLostError: communication failed because another rank died.
        HungError: communication failed because another rank detected a hanging rank and ended.
    """
    peers = Peers(store, world)
    watchdog = Watchdog(peers, phases, timeout_seconds)
    try:
        yield
    except (UserError, TrainingDivergedError, StoppedError):
        raise
    except RuntimeError as error:
        if world.size == 1:
            raise
        # The verdict may come a moment after the connection broke.
        lost = peers.lost()
        verdict = ""
        with contextlib.suppress(RuntimeError):
            verdict = peers.ask(peers.verdict)
        if verdict:
            raise HungError(verdict) from error
        reason = DIED
        if not lost:
            lost, reason = peers.left(), "ended with an error"
        if not lost:
            raise
        raise PeerLostError(lost_message(world.rank, lost, reason)) from error
    finally:
        watchdog.close()


def lost_message(rank: int, lost: list[str], reason: str = DIED) -> str:
    """The message of a rank that ends because others did."""
    return (
        f"rank {rank} stops: {', '.join(lost)} {reason}; see its log, then start the same command "
        "again to resume"
    )


class Watchdog:
    """Publishes what this rank does and, if it makes no progress, determines which rank causes
    it."""

    def __init__(self, peers: Peers, phases: Phases, timeout_seconds: float) -> None:
        self._peers, self._phases = peers, phases
        self._timeout = timeout_seconds
        self._status = Status(peers.host)
        self._main = threading.main_thread().ident
        self._progress = (0.0, 0)
        self._before: dict[int, Status] = {}
        self._looked = 0.0
        self._dead_since = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching, because this rank ends on purpose."""
        self._stop.set()
        self._thread.join(2 * SILENCE_SECONDS)
        with contextlib.suppress(RuntimeError):
            self._peers.publish(replace(self._status, left=True))

    def _watch(self) -> None:
        beaten = time.monotonic()
        while not self._stop.wait(BEAT_SECONDS):
            now = time.monotonic()
            self._status = self._observe(now - beaten)
            beaten = now
            try:
                if self._status.idle >= SILENCE_SECONDS:
                    self._look_for_the_dead(now)
                self._peers.publish(self._status)
                if self._status.idle >= min(SILENCE_SECONDS, self._timeout):
                    self._look(now)
            except RuntimeError:
                # Without the store, only this rank's status is known. The main thread will notice
                # too, and has a better explanation unless it is stuck itself.
                if self._status.idle >= self._limit(self._status):
                    self._leave(
                        f"the run hangs: {self._peers.store_name}, the rendezvous, does not "
                        f"answer; {_describe(self._peers.world.rank, self._status)}",
                        {0} if self._peers.world.rank and not agent_serves_store() else None,
                    )

    def _look_for_the_dead(self, now: float) -> None:
        """Leave if a rank died and the main thread does not notice: while forming process groups,
        it would wait for half an hour."""
        if not (dead := self._peers.dead()):
            self._dead_since = now
        elif now - self._dead_since >= SILENCE_SECONDS:
            self._leave(lost_message(self._peers.world.rank, dead), code=EXIT_PEER_LOST)

    def _limit(self, status: Status) -> float:
        """Seconds that a rank may go without progress; more while libraries and data are loaded."""
        return patience(self._timeout) if status.step is None else self._timeout

    def _observe(self, passed: float) -> Status:
        """The status of the main thread, ``passed`` seconds after the last observation."""
        phases, last = self._phases, self._status
        # On a busy machine, loading the libraries alone takes minutes.
        progress = (phases.since, len(sys.modules))
        if progress != self._progress:
            self._progress = progress
            idle = min(passed, time.monotonic() - phases.since)
        else:
            # Time in which the whole job was suspended does not count as idle.
            idle = last.idle + min(passed, 2 * BEAT_SECONDS)
        if phases.is_reading and busy.until() > time.monotonic():
            # A slow or retried download is not a hang, and has its own time limits.
            idle = 0.0
        doing, place = _main_thread(sys._current_frames()[self._main])  # type: ignore[index]
        return Status(
            last.host, last.beat + 1, phases.entered, phases.step, phases.name, idle, doing, place
        )

    def _look(self, now: float) -> None:
        """Compare the ranks twice within `SILENCE_SECONDS`, and decide."""
        if self._peers.ask(self._peers.verdict):
            self._leave(None)
        idle, limit = self._status.idle, self._limit(self._status)
        if idle < limit - SILENCE_SECONDS - BEAT_SECONDS:
            self._before = {}
            return
        if self._before and (idle < limit or now - self._looked < SILENCE_SECONDS):
            return
        before, statuses = self._before, self._peers.ask(self._peers.statuses)
        self._before, self._looked = statuses, now
        if not before or idle < limit:
            return
        silent = {rank for rank, status in statuses.items() if status == before.get(rank)}
        silent -= {self._peers.world.rank}
        stuck = {rank for rank, status in statuses.items() if status.idle >= self._limit(status)}
        culprits = find_culprits(statuses, silent, stuck)
        if not culprits:
            return
        names = "; ".join(_describe(rank, statuses[rank], rank in silent) for rank in culprits)
        if silent:
            # Where the others wait shows how far it came after its last beat.
            names += f"; the others wait for it in {_position(self._status)}"
        verdict = (
            f"the run hangs, all ranks end: {names} (health.timeout_seconds={self._timeout:g})"
        )
        is_first = self._peers.ask(lambda: self._peers.declare(verdict))
        self._leave(verdict if is_first else None, silent)

    def _leave(
        self, message: str | None, silent: set[int] | None = None, code: int = EXIT_HUNG
    ) -> NoReturn:
        """End this process, even if its main thread is stuck."""

        def tell() -> None:
            if message is not None:
                # The console may be gone, or its disk full.
                with contextlib.suppress(OSError):
                    os.write(2, f"error: {message}\n".encode())
            for rank in silent or ():
                self._peers.kill(rank)
            sys.stdout.flush()

        # All of these may block: the reader of our output may be what hangs.
        teller = threading.Thread(target=tell, name="last words", daemon=True)
        teller.start()
        teller.join(_TELL_SECONDS)
        if self._peers.serves_store:
            # Give the others time to read the verdict.
            time.sleep(3 * BEAT_SECONDS)
        os._exit(code)


def find_culprits(statuses: dict[int, Status], silent: set[int], stuck: set[int]) -> list[int]:
    """The ranks that the others wait for; empty while the run may still make progress.

    Args:
        statuses: statuses of all ranks that published one.
        silent: those ranks whose status has not changed for several beats.
        stuck: those ranks that have made no progress for too long.
    """
    present = {rank: status for rank, status in statuses.items() if not status.left}
    if mute := silent & present.keys():
        return sorted(mute)
    late = {rank: (present[rank].doing, present[rank].entered) for rank in stuck & present.keys()}
    if not late:
        return []
    doing, entered = first = min(late.values())
    for rank in present.keys() - late.keys():
        # A rank that still makes progress may be slow, and the others wait for it.
        if doing == WAITING or present[rank].entered < entered:
            return []
    return sorted(rank for rank, position in late.items() if position == first)


def _describe(rank: int, status: Status, is_silent: bool = False) -> str:
    what = (
        "gives no sign of life, last seen in"
        if is_silent
        else f"made no progress for {status.idle:.0f} s in"
    )
    return f"rank {rank} ({status.host}) {what} {_position(status)}, at {status.place}"


def _position(status: Status) -> str:
    step = "the start" if status.step is None else f"step {status.step + 1}"
    return f"{step}, phase '{status.phase}'"


def _main_thread(frame: FrameType) -> tuple[int, str]:
    """What a thread is doing, and where: its innermost frame, and the innermost of our code."""
    doing, place = WORKING, _place(frame)
    current: FrameType | None = frame
    for depth in range(1000):
        if current is None:
            break
        file = current.f_code.co_filename
        if depth < _FRAMES and doing == WORKING:
            if file.endswith(_WAITING_FILES):
                doing = WAITING
            elif file.endswith(_BACKWARD_FILES):
                doing = BACKWARD
        if f"{os.sep}calm_dist{os.sep}" in file:
            if current is not frame:
                place += f", called at {_place(current)}"
            break
        current = current.f_back
    return doing, place


def _place(frame: FrameType) -> str:
    file = os.sep.join(frame.f_code.co_filename.split(os.sep)[-2:])
    return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
