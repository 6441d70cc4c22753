"""Heartbeats, so that a run that lost a process says which one."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from calm_dist.errors import PeerLostError, StoppedError, TrainingDivergedError, UserError
from calm_dist.parallel.launch import World

BEAT_SECONDS = 1.0
# A rank is taken for dead when its beat did not change for this long.
SILENCE_SECONDS = 5.0


class Peers:
    """Publishes this rank's heartbeat in the store and tells which other ranks went silent."""

    def __init__(self, store: Any, world: World) -> None:
        self._world = world
        # A connection of its own: a blocking wait of the training thread must not stop the beat.
        self._store = store.clone()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._store.set(f"host/{world.rank}", f"{socket.gethostname()}, local {world.local_rank}")
        self._thread.start()

    def _beat(self) -> None:
        beat = 0
        # A store that is gone has lost rank 0; the training thread will notice and ask.
        with contextlib.suppress(RuntimeError):
            while not self._stop.wait(BEAT_SECONDS):
                beat += 1
                self._store.set(f"beat/{self._world.rank}", str(beat))

    def close(self) -> None:
        """Stop beating; this rank ends on purpose."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(RuntimeError):
            self._store.set(f"left/{self._world.rank}", "1")

    def lost(self) -> list[str]:
        """Descriptions of the ranks that died: silent now, and gone without a word.

        Takes `SILENCE_SECONDS`, the time in which a living rank beats.
        """
        others = [rank for rank in range(self._world.size) if rank != self._world.rank]
        try:
            before = {rank: self._read("beat", rank) for rank in others}
            time.sleep(SILENCE_SECONDS)
            return [
                f"rank {rank} ({self._read('host', rank)})"
                for rank in others
                if self._read("beat", rank) == before[rank] and not self._read("left", rank)
            ]
        except RuntimeError:
            return [f"rank 0 at {self._world.address}:{self._world.port}, the rendezvous"]

    def _read(self, key: str, rank: int) -> str:
        name = f"{key}/{rank}"
        return self._store.get(name).decode() if self._store.check([name]) else ""


@contextlib.contextmanager
def name_lost_peers(store: dist.Store, world: World) -> Iterator[None]:
    """Turn a communication error inside the block into a `PeerLostError` that names who died."""
    if world.size == 1:
        yield
        return
    peers = Peers(store, world)
    try:
        yield
    except (UserError, TrainingDivergedError, StoppedError):
        raise
    except RuntimeError as error:
        lost = peers.lost()
        if not lost:
            raise
        raise PeerLostError(
            f"rank {world.rank} stops: {', '.join(lost)} died or stopped answering; "
            "see its log, then start the same command again to resume"
        ) from error
    finally:
        peers.close()
