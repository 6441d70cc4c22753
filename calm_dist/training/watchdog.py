"""Ends a run that does not go on, and names the rank that holds it up.

Every rank has a thread that publishes once a second what its main thread is doing. When a rank has
made no progress for `health.timeout_seconds`, this thread compares all ranks and says which of them
the others wait for: one that gives no sign of life (stopped, or its interpreter is held), else one
that is at work on something of its own, else the one that is furthest behind.
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
# What a main thread is doing, by how surely it is itself what takes so long.
WORKING, BACKWARD, WAITING = range(3)
# A backward pass of torch may wait for the exchange of gradients, which Python does not see.
_BACKWARD_FILES = ("torch/autograd/graph.py",)
_WAITING_FILES = (
    "torch/distributed/distributed_c10d.py",
    "torch/distributed/c10d_logger.py",
    "megatron/core/pipeline_parallel/p2p_communication.py",
    "streaming/base/shared/barrier.py",
)
# Frames, from the innermost, in which a file above says what a thread is doing.
_FRAMES = 3
_TELL_SECONDS = 2.0


@contextlib.contextmanager
def watched(
    store: dist.Store, world: World, phases: Phases, timeout_seconds: float
) -> Iterator[None]:
    """Watch over the block, which the main thread runs: name who died or hangs.

    A rank that hangs ends this process with code 5 (`errors.EXIT_HUNG`) from another thread.

    Raises:
        PeerLostError: communication failed, because another rank died.
        HungError: communication failed, because another rank found that one hangs, and ended.
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
    """What a rank says that ends because others did."""
    return (
        f"rank {rank} stops: {', '.join(lost)} {reason}; see its log, then start the same command "
        "again to resume"
    )


class Watchdog:
    """Publishes what this rank does and, when it does not go on, finds out which rank is why."""

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
        """Watch no longer; this rank ends on purpose."""
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
                # Without the store only this rank is known. The main thread will notice, too,
                # and has the better explanation where it is not stuck itself.
                if self._status.idle >= self._limit(self._status):
                    self._leave(
                        f"the run hangs: {self._peers.store_name}, the rendezvous, does not "
                        f"answer; {_describe(self._peers.world.rank, self._status)}",
                        {0} if self._peers.world.rank and not agent_serves_store() else None,
                    )

    def _look_for_the_dead(self, now: float) -> None:
        """Leave where a rank died and the main thread does not notice: forming process groups it
        would wait for half an hour."""
        if not (dead := self._peers.dead()):
            self._dead_since = now
        elif now - self._dead_since >= SILENCE_SECONDS:
            self._leave(lost_message(self._peers.world.rank, dead), code=EXIT_PEER_LOST)

    def _limit(self, status: Status) -> float:
        """Seconds that a rank may go without progress: more while libraries and data are loaded."""
        return patience(self._timeout) if status.step is None else self._timeout

    def _observe(self, passed: float) -> Status:
        """What the main thread does; ``passed`` seconds after the last time."""
        phases, last = self._phases, self._status
        # On a busy machine the libraries alone take minutes to load.
        progress = (phases.since, len(sys.modules))
        if progress != self._progress:
            self._progress = progress
            idle = min(passed, time.monotonic() - phases.since)
        else:
            # A job that was suspended as a whole has not been idle.
            idle = last.idle + min(passed, 2 * BEAT_SECONDS)
        if phases.is_reading and busy.until() > time.monotonic():
            # A slow download, or one that is tried again: no hang, and with limits of its own.
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
            # What it did between its last beat and now is known from where it is missing.
            names += f"; the others wait for it in {_position(self._status)}"
        verdict = (
            f"the run hangs, all ranks end: {names} (health.timeout_seconds={self._timeout:g})"
        )
        is_first = self._peers.ask(lambda: self._peers.declare(verdict))
        self._leave(verdict if is_first else None, silent)

    def _leave(
        self, message: str | None, silent: set[int] | None = None, code: int = EXIT_HUNG
    ) -> NoReturn:
        """End this process, whatever its main thread is stuck in."""

        def tell() -> None:
            if message is not None:
                os.write(2, f"error: {message}\n".encode())
            for rank in silent or ():
                self._peers.kill(rank)
            sys.stdout.flush()

        # All of these can block: whoever reads our output may be what hangs.
        teller = threading.Thread(target=tell, name="last words", daemon=True)
        teller.start()
        teller.join(_TELL_SECONDS)
        if self._peers.serves_store:
            # The others must be able to read the verdict.
            time.sleep(3 * BEAT_SECONDS)
        os._exit(code)


def find_culprits(statuses: dict[int, Status], silent: set[int], stuck: set[int]) -> list[int]:
    """The ranks for which the others wait, or none while it may still go on.

    Args:
        statuses: of all ranks that said anything.
        silent: those of them whose status did not change for several beats.
        stuck: those of them that made no progress for too long.
    """
    present = {rank: status for rank, status in statuses.items() if not status.left}
    if mute := silent & present.keys():
        return sorted(mute)
    late = {rank: (present[rank].doing, present[rank].entered) for rank in stuck & present.keys()}
    if not late:
        return []
    doing, entered = first = min(late.values())
    for rank in present.keys() - late.keys():
        # One that goes on may be slow, and the others wait for it.
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
    """What a thread is doing, and where: its innermost frame, and the innermost of our own."""
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
