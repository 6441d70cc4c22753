"""A lock on a directory for file systems without `flock`, such as Lustre mounted without it.

The holder creates a file that only one process can create, and touches it every few seconds. The
lease is stale if its process is known to be dead or, if that cannot be determined from here, if the
file has not been touched for `LEASE_SECONDS`.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import threading
import time
from pathlib import Path
from typing import Any

from calm_dist.files import process_started

LEASE_FILE = ".lock.held"
BEAT_SECONDS = 5.0
LEASE_SECONDS = 45.0


class HeldError(Exception):
    """Another process holds the lease; the message names it."""


class Lease:
    """The lease on a directory, held until `release` or the end of this process.

    Raises:
        HeldError: another process holds it.
    """

    def __init__(self, directory: Path) -> None:
        self._file = directory / LEASE_FILE
        self._text = json.dumps({**_identity(), "token": secrets.token_hex(8)}) + "\n"
        self._ended = threading.Event()
        while not self._make():
            self._remove_if_gone()
        threading.Thread(target=self._beat, name="lease", daemon=True).start()

    def release(self) -> None:
        """Release the directory."""
        self._ended.set()
        if _read(self._file) == self._text:
            with contextlib.suppress(OSError):
                self._file.unlink()

    def _make(self) -> bool:
        # Complete from the start: written under another name, then linked, which fails if a lease
        # exists.
        aside = self._file.with_name(f"{LEASE_FILE}.{secrets.token_hex(4)}")
        aside.write_text(self._text, encoding="utf-8")
        try:
            os.link(aside, self._file)
        except FileExistsError:
            return False
        finally:
            aside.unlink()
        return True

    def _remove_if_gone(self) -> None:
        """Remove the lease of a dead process; HeldError if the process is alive."""
        text = _read(self._file)
        if text is None:
            return
        touched, began = _touched(self._file), time.monotonic()
        while (lives := _lives(text)) is None and time.monotonic() - began < LEASE_SECONDS:
            # A process of another machine, whose clock may be wrong: wait for the next touch.
            time.sleep(BEAT_SECONDS / 5)
            if _read(self._file) != text:
                return
            if _touched(self._file) != touched:
                lives = True
                break
        if lives:
            raise HeldError(_owner(text))
        stale = self._file.with_name(f"{LEASE_FILE}.{secrets.token_hex(4)}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._file, stale)
            if _read(stale) != text:
                # Another start was faster: this is its lease, so put it back.
                with contextlib.suppress(FileExistsError):
                    os.link(stale, self._file)
            stale.unlink()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._file)


def is_leased(directory: Path) -> bool:
    """Whether a living process holds the lease; for other machines, judged by the clock."""
    file = directory / LEASE_FILE
    text, touched = _read(file), _touched(file)
    if text is None or touched is None:
        return False
    lives = _lives(text)
    return abs(time.time() - touched / 1e9) < LEASE_SECONDS if lives is None else lives


def _identity() -> dict[str, Any]:
    """Identifies this process, so that others can tell whether it is alive."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    return {
        "pid": os.getpid(),
        "host": platform.node(),
        "boot": boot.read_text().strip() if boot.exists() else "",
        "namespace": os.readlink(namespace) if namespace.is_symlink() else "",
        "started": process_started(os.getpid()),
    }


def _lives(text: str) -> bool | None:
    """Whether the process of a lease is alive; None if that cannot be determined from here."""
    try:
        owner, ours = json.loads(text), _identity()
        if any(owner[key] != ours[key] for key in ("host", "boot", "namespace")):
            return None
        started = process_started(int(owner["pid"]))
        return started is not None and started == owner["started"]
    except (ValueError, LookupError, TypeError):
        return None


def _owner(text: str) -> str:
    try:
        owner = json.loads(text)
        return f"process {owner['pid']} on {owner['host']}"
    except (ValueError, LookupError, TypeError):
        return "an unknown process"


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _touched(file: Path) -> int | None:
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return None
