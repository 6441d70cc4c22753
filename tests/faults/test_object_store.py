"""Two ranks that train from an object store that has faults: they wait and continue to the same
numbers, or end with a code that says whether another start may help."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faulty_store import Fault, FaultyStore, faulty_store
from launches import (
    TIMEOUT_SECONDS,
    data_parallel,
    free_port,
    start_rank,
    training_records,
)

BAD_INPUT, UNREACHABLE = 2, 6
STEPS = 10
SHARD = "shard.00007.mds"
Tiny = Callable[..., list[str]]


@pytest.fixture(scope="module")
def shards(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of `launches`, in shards of four blocks."""
    from calm_dist.data.latents import plan_store, write_store
    from calm_dist.interop.huggingface import load_autoencoder
    from calm_dist.text.tokenizer import load_tokenizer

    corpus, autoencoder = [str(store.parent / "corpus.txt")], store.parent / "autoencoder"
    tokenizer = load_tokenizer(store.parent / "t.json")
    plan = plan_store(
        corpus, tokenizer, variant="fp16", block_size=64, patch_size=None,
        autoencoder=autoencoder, seed=0,
    )  # fmt: skip
    out = tmp_path_factory.mktemp("shards") / "store"
    model = load_autoencoder(autoencoder)
    size = 4 * plan.sample_bytes
    write_store(out, corpus, tokenizer, plan, autoencoder=model, shard_bytes=size)
    assert (out / SHARD).is_file()
    return out


@pytest.fixture(scope="module")
def expected(shards: Path, tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> list[float]:
    """Losses from the local store."""
    run_dir = tmp_path_factory.mktemp("local") / "run"
    codes, outputs = train(tiny, run_dir, str(shards), {})
    assert codes == [0, 0], outputs
    return losses(run_dir)


def losses(run_dir: Path) -> list[float]:
    records = training_records(run_dir)
    assert sorted(records) == list(range(1, STEPS + 1))
    return [records[step]["loss"] for step in sorted(records)]


def start(
    tiny: Tiny, run_dir: Path, path: str, environment: dict[str, str], **more: object
) -> list[subprocess.Popen[str]]:
    """Two ranks."""
    fields = {"training__steps": STEPS, "data__path": path, **more}
    overrides = data_parallel(tiny, run_dir, **fields)
    # Short enough for the sockets of reader processes.
    scratch = Path(tempfile.mkdtemp(dir=run_dir.parents[1]))
    port = free_port()
    more_environment: dict[str, Any] = {
        "TMPDIR": str(scratch),
        "PYTHONWARNINGS": "ignore",
        **environment,
    }
    return [start_rank(rank, 2, port, overrides, **more_environment) for rank in (0, 1)]


def ends(ranks: list[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    """Exit codes and outputs of ranks."""
    outputs = [rank.communicate(timeout=TIMEOUT_SECONDS)[0] for rank in ranks]
    return [rank.returncode for rank in ranks], outputs


def train(
    tiny: Tiny, run_dir: Path, path: str, environment: dict[str, str], **more: object
) -> tuple[list[int], list[str]]:
    return ends(start(tiny, run_dir, path, environment, **more))


def start_from(
    store: FaultyStore, tiny: Tiny, run_dir: Path, **more: object
) -> list[subprocess.Popen[str]]:
    none = str(run_dir / "none")
    environment = {
        **store.environment,
        "AWS_CONFIG_FILE": none,
        "AWS_SHARED_CREDENTIALS_FILE": none,
    }
    more = {"data__download_timeout_seconds": 5, **more}
    return start(tiny, run_dir, store.url, environment, **more)


def train_from(
    store: FaultyStore, tiny: Tiny, run_dir: Path, **more: object
) -> tuple[list[int], list[str]]:
    return ends(start_from(store, tiny, run_dir, **more))


Recovered = dict[int, tuple[Path, list[int], str, int]]


@pytest.fixture(scope="module")
def recovered(shards: Path, tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Recovered:
    """Run directory, exit codes, output and requests for `SHARD` by number of reader processes.

    From stores that recover, the last time after longer than the watchdog's limit. The runs wait
    most of the time: they do it together.
    """
    runs = {}
    with contextlib.ExitStack() as stores:
        for num_workers in (0, 1):
            store = stores.enter_context(faulty_store(shards, *passing_faults()))
            run_dir = tmp_path_factory.mktemp("recovered") / "run"
            ranks = start_from(
                store, tiny, run_dir,
                data__num_workers=num_workers, data__download_timeout_seconds=2,
                health__timeout_seconds=10,
            )  # fmt: skip
            runs[num_workers] = store, run_dir, ranks
        found = {}
        for num_workers, (store, run_dir, ranks) in runs.items():
            codes, outputs = ends(ranks)
            found[num_workers] = run_dir, codes, "".join(outputs), store.count(SHARD)
    return found


def passing_faults() -> list[Fault]:
    return [
        Fault("meta.json", "SlowDown", times=2),
        Fault("index.json", "reset", times=2),
        Fault("shard.00001.mds", "InternalError", times=2),
        Fault("shard.00002.mds", "truncate", times=2),
        Fault("shard.00003.mds", "reset", times=2),
        Fault("shard.00004.mds", "stall", times=2),
        Fault("shard.00005.mds", "silence", times=1),
        Fault(SHARD, "SlowDown", seconds=16),
    ]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_store_that_recovers(
    recovered: Recovered, expected: list[float], num_workers: int
) -> None:
    """The watchdog does not mistake a rank that retries a download for one that hangs."""
    run_dir, codes, output, requests = recovered[num_workers]
    assert codes == [0, 0], output
    assert requests > 4
    assert losses(run_dir) == expected
    for text in ("503 SlowDown", "500 InternalError", "attempt 2 of 11 failed"):
        assert text in output


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_fault_that_outlasts_the_retries_is_met_again_by_the_same_command(
    shards: Path, expected: list[float], tmp_path: Path, tiny: Tiny, num_workers: int
) -> None:
    run_dir = tmp_path / "run"
    more = {"data__download_retries": 2, "data__num_workers": num_workers}
    with faulty_store(shards, Fault(SHARD, "SlowDown")) as store:
        codes, outputs = train_from(store, tiny, run_dir, **more)
        assert codes == [UNREACHABLE, UNREACHABLE], outputs
        assert store.count(SHARD) == 3
        said = outputs[0]
        assert f"{SHARD} cannot be downloaded: 503 SlowDown" in said
        assert "3 attempts failed" in said and "Traceback" not in said
        # What was trained is saved, and continues where the store answers.
        store.faults.clear()
        codes, outputs = train_from(store, tiny, run_dir, **more)
    assert codes == [0, 0], outputs
    assert losses(run_dir) == expected


@pytest.mark.parametrize("name", ["meta.json", "index.json"])
def test_a_fault_at_the_start_that_lasts(
    shards: Path, tmp_path: Path, tiny: Tiny, name: str
) -> None:
    with faulty_store(shards, Fault(name, "InternalError")) as store:
        codes, outputs = train_from(store, tiny, tmp_path / "run", data__download_retries=1)
    assert codes == [UNREACHABLE, UNREACHABLE], outputs
    assert f"{name} cannot be downloaded: 500 InternalError" in outputs[0]


@pytest.mark.parametrize("name", ["meta.json", SHARD])
def test_wrong_credentials_are_bad_input(
    shards: Path, tmp_path: Path, tiny: Tiny, name: str
) -> None:
    with faulty_store(shards, Fault(name, "SignatureDoesNotMatch")) as store:
        codes, outputs = train_from(store, tiny, tmp_path / "run")
        # Each rank looks at the description itself.
        assert store.count(name) <= 2
    assert codes == [BAD_INPUT, BAD_INPUT], outputs
    assert "refuses the credentials" in outputs[0] and "SignatureDoesNotMatch" in outputs[0]


class Watch(threading.Thread):
    """Records the largest size of the files below a directory."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory, self.most = directory, 0
        self.looks = 0
        self._end = threading.Event()

    def run(self) -> None:
        before = self._sizes()
        while not self._end.wait(0.002):
            after = self._sizes()
            # What two looks have in common was there at the same time: a single look may see a
            # file that is being deleted or renamed, and the one in its place.
            size = sum(size for file, size in after.items() if file in before)
            self.most, self.looks = max(self.most, size), self.looks + 1
            before = after

    def _sizes(self) -> dict[str, int]:
        sizes = {}
        # Unlike rglob, it passes over a directory that vanishes meanwhile. Strings, not paths: it
        # looks hundreds of times a second.
        for directory, _, names in os.walk(self.directory):
            for file in (f"{directory}/{name}" for name in names):
                with contextlib.suppress(FileNotFoundError):
                    sizes[file] = os.stat(file).st_size
        return sizes

    def stop(self) -> None:
        self._end.set()
        self.join()


def test_a_store_larger_than_the_disk(
    shards: Path,
    expected: list[float],
    tmp_path: Path,
    tiny: Tiny,
    s3: dict[str, str],
) -> None:
    """From an S3 server, through a cache of a fifth of its size: the same losses, also after a
    resume with reader processes, and never more on the disk."""
    import boto3

    sizes = {file.name: file.stat().st_size for file in shards.iterdir()}
    limit, shard_bytes = sum(sizes.values()) // 5, sizes[SHARD]

    client = boto3.client("s3", endpoint_url=s3["S3_ENDPOINT_URL"])
    for name in sizes:
        client.upload_file(str(shards / name), "bucket", f"store/{name}")
    cache, run_dir = tmp_path / "cache", tmp_path / "run"
    watch = Watch(cache)
    watch.start()
    more = {"data__cache_dir": cache, "data__cache_limit": limit}
    url = "s3://bucket/store"
    codes, outputs = train(tiny, run_dir, url, s3, **more, training__steps=6)
    assert codes == [0, 0], outputs
    assert "downloaded more than once" in outputs[0]
    # Eight reader processes for each rank need more.
    codes, outputs = train(tiny, run_dir, url, s3, **more, data__num_workers=8)
    assert codes == [BAD_INPUT, BAD_INPUT]
    assert f"data.cache_limit={limit}: the 16 reader(s)" in outputs[0]
    codes, outputs = train(tiny, run_dir, url, s3, **more, data__num_workers=1)
    assert codes == [0, 0], outputs
    watch.stop()
    assert losses(run_dir) == expected
    # A start compares a second copy of meta.json.
    most = limit + sizes["meta.json"]
    assert watch.looks > 100 and 3 * shard_bytes < watch.most <= most
