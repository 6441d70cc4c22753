"""Reader processes that lack shared memory, or die: the cause, and at once."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from warm import warm_python

from calm_dist.data.latents import plan_store, write_store
from calm_dist.data.stream import open_training_stream
from calm_dist.errors import DataError, UnreachableError
from calm_dist.text.tokenizer import train_tokenizer

# Reads in a world of one process, and says in how many seconds it ended, and of what.
READ = """
import sys, time
from pathlib import Path
from calm_dist.data.stream import open_training_stream
from calm_dist.errors import DataError
store, num_workers, fill = sys.argv[1], int(sys.argv[2]), sys.argv[3]
try:
    stream = open_training_stream([store], batch_size=16, num_workers=num_workers)
    began = time.monotonic()
    batches = iter(stream)
    if fill == "later":
        next(batches)
    for number in range(12):
        if fill != "-":
            # Another process of the machine takes whatever becomes free.
            with open("/dev/shm/other", "ab", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(1 << 16))
                except OSError:
                    pass
        next(batches)
    print("read")
except DataError as error:
    print("ended", error)
    if "began" in globals():
        print("within", time.monotonic() - began)
"""


@pytest.fixture(scope="module")
def big_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Batches of 16 blocks are half a MiB each."""
    root = tmp_path_factory.mktemp("big")
    (root / "c.txt").write_text("some words here " * 100_000)
    tokenizer = train_tokenizer(["some words here"], 265, root / "t.json")
    plan = plan_store([root / "c.txt"], tokenizer, variant="tokens", block_size=4096, patch_size=4)
    write_store(root / "store", [root / "c.txt"], tokenizer, plan)
    return root / "store"


def in_small_memory(size: str, *arguments: str) -> str:
    """The output of `READ` where /dev/shm has so much room."""
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    # With a user namespace, too, for who is not root.
    for unshare in (["unshare", "-m"], ["unshare", "-rm"]):
        if not subprocess.run([*unshare, "sh", "-c", mount], capture_output=True).returncode:
            break
    else:
        pytest.skip("this machine allows no mount namespaces (unshare -m, unshare -rm)")
    command = f'{mount} && exec "$0" -c "$@"'
    done = subprocess.run(
        [*unshare, "sh", "-c", command, sys.executable, READ, *arguments],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_too_little_shared_memory_is_refused_before_reading(big_blocks: Path) -> None:
    said = in_small_memory("1m", str(big_blocks), "2", "-")
    assert "ended data.num_workers=2: the 4 batches" in said and "--shm-size" in said
    assert "2.1 MB in /dev/shm, which has 1.0 MB free" in said
    assert in_small_memory("1m", str(big_blocks), "0", "-") == "read\n"
    assert in_small_memory("16m", str(big_blocks), "2", "-") == "read\n"


def test_a_path_too_long_for_readers_is_refused_before_reading(big_blocks: Path) -> None:
    """One that just fits reads, one longer by a character does not; without readers any does."""
    base = tempfile.mkdtemp(dir="/tmp")
    fits = f"{base}/".ljust(75, "x")
    for directory, num_workers in ((fits, 1), (f"{fits}x", 1), (f"{fits}x", 0)):
        Path(directory).mkdir(exist_ok=True)
        done = subprocess.run(
            [warm_python(), "-c", READ, str(big_blocks), str(num_workers), "-"],
            env={**os.environ, "TMPDIR": directory},
            capture_output=True, text=True, timeout=300, check=True,
        )  # fmt: skip
        refused = "ended TMPDIR=" in done.stdout and "has 76 characters" in done.stdout
        assert refused == (len(directory) > 75 and num_workers > 0)
        assert refused or done.stdout == "read\n"
    shutil.rmtree(base)


@pytest.mark.parametrize(
    ("when", "what"), [("first", "the queues of reader processes"), ("later", "a batch of 0.5 MB")]
)
def test_shared_memory_that_others_fill(big_blocks: Path, when: str, what: str) -> None:
    said = in_small_memory("16m", str(big_blocks), "2", when)
    assert f"ended /dev/shm: no room for {what}" in said and "data.num_workers" in said
    assert float(said.split("within ")[1]) < 30


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (signal.SIGKILL, UnreachableError, "SIGKILL"),
        (signal.SIGSEGV, UnreachableError, "SIGSEGV"),
        (signal.SIGBUS, DataError, "/dev/shm is full"),
    ],
)
def test_a_reader_that_dies_while_its_batch_is_waited_for(
    big_blocks: Path, number: signal.Signals, kind: type[DataError], message: str
) -> None:
    stream = open_training_stream([big_blocks], batch_size=1, num_workers=2)
    batches = iter(stream)
    next(batches)
    handler = signal.getsignal(signal.SIGCHLD)
    iterator: Any = stream._loader._iterator
    workers = iterator._workers
    os.kill(workers[1].pid, signal.SIGSTOP)
    os.kill(workers[1].pid, number)
    os.kill(workers[1].pid, signal.SIGCONT)
    # Nothing happens to what the main thread computes meanwhile.
    time.sleep(1)
    began = time.monotonic()
    with pytest.raises(DataError, match=r"a reader process died .*" + message) as caught:
        for _ in range(200):
            next(batches)
    assert time.monotonic() - began < 20
    assert type(caught.value) is kind
    assert signal.getsignal(signal.SIGCHLD) is handler


def test_a_reader_that_does_nothing(big_blocks: Path) -> None:
    stream = open_training_stream([big_blocks], batch_size=1, num_workers=1, timeout_seconds=3.0)
    # Readers take it before each shard.
    held = FileLock(stream._dataset._cache_filelock_path)
    with held, pytest.raises(DataError, match="gave nothing in 3 s"):
        next(iter(stream))
