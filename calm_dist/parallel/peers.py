"""Signs of life of all ranks, in their shared store."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

from calm_dist.parallel.launch import World
from calm_dist.parallel.processes import is_gone, kill_if_here

BEAT_SECONDS = 1.0
# A rank counts as dead if its beat has not changed for this long, and the store if it has not
# answered for this long.
SILENCE_SECONDS = 5.0
_POLL_SECONDS = 0.1

T = TypeVar("T")


class StoreSilentError(RuntimeError):
    """The process that serves the store is dead, stopped or unreachable."""


@dataclass(frozen=True)
class Status:
    """The state of a rank at its last beat."""

    host: str
    beat: int = 0
    entered: int = 0
    """Phases entered so far. All ranks enter the same phases, so the rank with the lowest number is
    furthest behind."""
    step: int | None = None
    phase: str = "start"
    idle: float = 0.0
    """Seconds without progress."""
    doing: int = 0
    """See `training.watchdog`."""
    place: str = ""
    """The place in the code where its main thread is."""
    left: bool = False
    """Whether it ended on purpose."""


class Peers:
    """Publishes this rank's status in the store and reads those of the others."""

    def __init__(self, store: Any, world: World) -> None:
        self.world = world
        # A separate connection, so that a blocking wait of the training thread cannot stop the
        # beat.
        self._store = store.clone()
        self._asking: threading.Thread | None = None
        # Both the watchdog and, after failed communication, the main thread ask. They take turns;
        # otherwise one would take the other's pending request for one without an answer.
        self._turn = threading.RLock()
        self.host = f"{socket.gethostname()}, local {world.local_rank}"
        # Read now, while the store answers: rank 0 may serve it.
        self._processes = {0: self._process(0)}
        self.publish(Status(self.host))

    def publish(self, status: Status) -> None:
        """Publish this rank's status; raises RuntimeError if the store is gone or silent."""
        with self._turn:
            self._check_silence()
        self._store.set(f"status/{self.world.rank}", json.dumps(asdict(status)))

    def statuses(self) -> dict[int, Status]:
        """The last status of every rank that has published one."""
        names = [f"status/{rank}" for rank in range(self.world.size)]
        if not self._store.check(names):
            return {
                rank: _read_status(self._store.get(name))
                for rank, name in enumerate(names)
                if self._store.check([name])
            }
        return {rank: _read_status(s) for rank, s in enumerate(self._store.multi_get(names))}

    def verdict(self) -> str:
        """The reason why all ranks must end, or an empty text."""
        return self._store.get("verdict").decode() if self._store.check(["verdict"]) else ""

    def declare(self, verdict: str) -> bool:
        """Publish ``verdict`` to all ranks; returns False if another rank was first."""
        return bool(self._store.compare_set("verdict", "", verdict).decode() == verdict)

    def ask(self, work: Callable[[], T]) -> T:
        """The result of ``work``, which uses the store; the store's process may not be running.

        Raises:
            StoreSilentError: there was no answer within `SILENCE_SECONDS`.
        """
        answers: list[T] = []

        def wait() -> None:
            with contextlib.suppress(RuntimeError):
                answers.append(work())

        with self._turn:
            self._check_silence()
            self._asking = thread = threading.Thread(target=wait, name="ask the store", daemon=True)
            thread.start()
            thread.join(SILENCE_SECONDS)
        if not answers:
            raise StoreSilentError(f"{self.store_name} does not answer")
        return answers[0]

    def _check_silence(self) -> None:
        """Raises StoreSilentError if a request is unanswered: it blocks all later ones on the
        connection."""
        if self._asking is not None and self._asking.is_alive():
            raise StoreSilentError(f"{self.store_name} does not answer")

    def lost(self) -> list[str]:
        """Descriptions of the ranks that died: they left no message and are silent now.

        Takes up to `SILENCE_SECONDS`, in which a living rank would beat; less for ranks of this
        machine, whose death is seen at once.
        """
        try:
            before = self.ask(self.statuses)
            began = time.monotonic()
            while time.monotonic() < began + SILENCE_SECONDS:
                if dead := self.dead():
                    return dead
                time.sleep(_POLL_SECONDS)
            return [
                f"rank {rank} ({status.host})"
                for rank, status in self.ask(self.statuses).items()
                if rank != self.world.rank and status == before.get(rank) and not status.left
            ]
        except RuntimeError:
            return [f"{self.store_name}, the rendezvous,"]

    def dead(self) -> list[str]:
        """Descriptions of the ranks of this machine that ended unexpectedly."""
        if self.serving_rank is not None and is_gone(self._processes[self.serving_rank]):
            return [f"{self.store_name}, the rendezvous,"]
        statuses = self.ask(self.statuses)
        for rank in statuses.keys() - self._processes.keys():
            self._processes[rank] = self.ask(partial(self._process, rank))
        gone = [rank for rank in sorted(statuses) if is_gone(self._processes[rank])]
        return [f"rank {r} ({statuses[r].host})" for r in gone if not statuses[r].left]

    @property
    def serving_rank(self) -> int | None:
        """The rank that serves the store; None if that is this rank or torchrun's agent."""
        return 0 if self.world.rank != 0 and not agent_serves_store() else None

    def left(self) -> list[str]:
        """Descriptions of the other ranks that ended with an error and reported it themselves."""
        with contextlib.suppress(RuntimeError):
            statuses = self.ask(self.statuses)
            return [
                f"rank {rank} ({status.host})" for rank, status in statuses.items() if status.left
            ]
        return []

    def kill(self, rank: int) -> None:
        """Kill a rank of this machine that cannot end itself and would hold port and directory."""
        kill_if_here(self._processes.get(rank) or self._process(rank))

    def _process(self, rank: int) -> str:
        name = f"roll/{rank}"
        return self._store.get(name).decode() if self._store.check([name]) else ""

    @property
    def serves_store(self) -> bool:
        """Whether the others lose the store when this rank ends."""
        return self.world.size > 1 and self.world.rank == 0 and not agent_serves_store()

    @property
    def store_name(self) -> str:
        """Name of the process that serves the store."""
        where = f"{self.world.address}:{self.world.port}"
        return f"torchrun's agent at {where}" if agent_serves_store() else f"rank 0 at {where}"


def agent_serves_store() -> bool:
    """Whether torchrun's agent serves the store, not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _read_status(text: bytes) -> Status:
    return Status(**json.loads(text))
