"""Faults of an object store, by a server that has them: which pass, and what is said of others."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from faulty_store import BREAKS, Fault, FaultyStore, faulty_store

from calm_dist.data import download
from calm_dist.data.download import Downloads, MissingError, busy, fault_of
from calm_dist.data.existing import finished_store
from calm_dist.data.latents import plan_store, write_store
from calm_dist.data.store import read_meta
from calm_dist.data.stream import open_training_stream
from calm_dist.errors import DataError, UnreachableError
from calm_dist.text.tokenizer import train_tokenizer

# A busy machine answers late: only tests of silence wait for a second alone, and these allow for an
# answer that came later than that.
QUICK = Downloads(retries=3, timeout_seconds=20.0, limit_seconds=60.0)
IMPATIENT = replace(QUICK, retries=8, timeout_seconds=1.0)
ONCE = replace(QUICK, retries=0)
SHARD = "shard.00003.mds"
PASSING = ["SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "html"]
CUT = ["stall", "silence", "reset", "truncate"]
REFUSED = ["AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stored")
    corpus = root / "corpus.jsonl"
    texts = [f"document {i} " + "with words " * (i % 5) for i in range(60)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_tokenizer(["document with words"], 265, root / "tokenizer.json")
    plan = plan_store([corpus], tokenizer, variant="tokens", block_size=16, patch_size=4)
    write_store(root / "store", [corpus], tokenizer, plan, shard_bytes=512)
    assert (root / "store" / SHARD).is_file()
    return root / "store"


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    # Pauses of the size of a test.
    monkeypatch.setattr(download, "_FIRST_PAUSE", 0.05)


Use = Callable[[FaultyStore], str]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    def point_at(store: FaultyStore) -> str:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        return store.url

    return point_at


def read_all(url: str, downloads: Downloads, **more: Any) -> list[list[int]]:
    stream = open_training_stream([url], batch_size=4, downloads=downloads, **more)
    return [batch["index"].tolist() for batch in islice(stream, stream.steps_per_epoch)]


@pytest.mark.parametrize("kind", [*PASSING, *CUT])
def test_description_after_faults_that_pass(
    stored: Path, use: Use, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = kind in ("stall", "silence")
    downloads = IMPATIENT if silent else QUICK
    with faulty_store(stored, Fault("meta.json", kind, times=2)) as store:
        assert read_meta(use(store), downloads) == read_meta(stored)
        count = store.count("meta.json")
    assert count >= 3 if silent else count == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == count - 1
    assert all(
        line.startswith("data store s3://bucket/store: meta.json: attempt") for line in lines
    )
    first = f"attempt 1 of {downloads.retries + 1} failed ("
    assert first in lines[0] and "; retrying in 0." in lines[0]
    if kind in PASSING[:-1]:
        assert kind in lines[0]


def test_a_second_client_reads_no_files_of_botocore(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have some MB of JSON, and each attempt to download a description has a new client."""
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    downloader: Any = download.downloader_for("s3://bucket/store")
    first = downloader._create_s3_client()
    monkeypatch.setattr("botocore.loaders.JSONFileLoader.load_file", None)
    assert downloader._create_s3_client() is not first


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_shard_after_another_fault(
    stored: Path, use: Use, num_workers: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shards = sorted(path.name for path in stored.glob("shard.*"))
    kinds = [*PASSING, *CUT, "other"]
    assert len(shards) >= len(kinds)
    faults = [Fault(name, kind, times=1) for name, kind in zip(shards, kinds, strict=False)]
    with faulty_store(stored, *faults) as store:
        url = use(store)
        more = {"num_workers": num_workers, "cache_dir": tmp_path / "cache"}
        assert read_all(url, IMPATIENT, **more) == read_all(str(stored), IMPATIENT)
        assert all(store.count(name) >= 2 for name in shards[: len(kinds)])
    err = capfd.readouterr().err
    for name, kind in zip(shards, kinds, strict=False):
        assert (f"{name}: attempt 1 of 9 failed" in err) or kind == "other"
    assert err.count("is damaged") == err.count("downloading it again") == 1
    assert not list((tmp_path / "cache").rglob("*.tmp"))


@pytest.mark.parametrize("name", ["meta.json", "index.json", SHARD])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_faults_that_outlast_the_retries(
    stored: Path, use: Use, name: str, num_workers: int, tmp_path: Path
) -> None:
    with faulty_store(stored, Fault(name, "SlowDown")) as store:
        with pytest.raises(UnreachableError) as caught:
            read_all(use(store), QUICK, num_workers=num_workers, cache_dir=tmp_path / "cache")
        assert store.count(name) == QUICK.retries + 1
    message = str(caught.value)
    assert f"data store s3://bucket/store: {name} cannot be downloaded: 503 SlowDown" in message
    assert "4 attempts failed" in message and "data.download_retries=3" in message
    assert "Traceback" not in message


def test_the_limit_of_time_and_none_of_retries(stored: Path, use: Use) -> None:
    limited = replace(QUICK, retries=1000, limit_seconds=5.0)
    with faulty_store(stored, Fault("meta.json", "SlowDown")) as store:
        with pytest.raises(UnreachableError, match="1 attempts failed"):
            read_meta(use(store), ONCE)
        with pytest.raises(UnreachableError, match=r"download_limit_seconds=5\)"):
            read_meta(store.url, limited)
        # One of the read before; a slow machine makes few more, and none makes a thousand.
        assert 2 <= store.count("meta.json") < 100


def test_a_stall_ends_after_the_timeout(stored: Path, use: Use) -> None:
    with faulty_store(stored, Fault("meta.json", "stall")) as store:
        began = time.monotonic()
        with pytest.raises(UnreachableError, match=r"timed out|Timeout"):
            read_meta(use(store), replace(ONCE, timeout_seconds=1.0))
        # It would last for ever.
        assert 1.0 <= time.monotonic() - began < 60


def test_a_server_that_is_not_there(stored: Path, use: Use) -> None:
    with faulty_store(stored) as store:
        url = use(store)
    with pytest.raises(UnreachableError, match="Could not connect"):
        read_meta(url, QUICK)


def test_a_slow_server_is_no_fault(stored: Path, use: Use) -> None:
    """Longer than the timeout in all, never silent for as long."""
    with faulty_store(stored, Fault("meta.json", "trickle")) as store:
        began = time.monotonic()
        assert read_meta(use(store), replace(ONCE, timeout_seconds=4.0)) == read_meta(stored)
        assert time.monotonic() - began > 4
        assert store.count("meta.json") == 1
        assert busy.until() > time.monotonic()


@pytest.mark.parametrize("name", ["meta.json", SHARD])
@pytest.mark.parametrize("code", REFUSED)
def test_wrong_credentials_are_named_at_once(
    stored: Path, use: Use, name: str, code: str, tmp_path: Path
) -> None:
    with faulty_store(stored, Fault(name, code)) as store:
        with pytest.raises(DataError) as caught:
            read_all(use(store), QUICK, cache_dir=tmp_path / "cache")
        assert not isinstance(caught.value, UnreachableError | MissingError)
        assert store.count(name) == 1
    assert "refuses the credentials" in str(caught.value)
    assert code in str(caught.value) and "AWS_ACCESS_KEY_ID" in str(caught.value)


def test_no_credentials(stored: Path, use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty_store(stored, Fault("meta.json", "AccessDenied")) as store:
        url = use(store)
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(DataError, match="or none are set"):
            read_meta(url, QUICK)
        # A public bucket needs none.
        store.faults.clear()
        assert read_meta(url, QUICK) == read_meta(stored)


@pytest.mark.parametrize("name", ["meta.json", "index.json", SHARD])
@pytest.mark.parametrize("code", ["NoSuchKey", "NoSuchBucket", "InvalidRequest"])
def test_what_is_not_there_is_not_asked_for_again(
    stored: Path, use: Use, name: str, code: str, tmp_path: Path
) -> None:
    with faulty_store(stored, Fault(name, code)) as store:
        with pytest.raises(DataError, match=f"{name} cannot be downloaded") as caught:
            read_all(use(store), QUICK, cache_dir=tmp_path / "cache")
        assert not isinstance(caught.value, UnreachableError)
        assert store.count(name) == 1
    assert code in str(caught.value)


def test_a_shard_that_stays_damaged(stored: Path, use: Use, tmp_path: Path) -> None:
    with faulty_store(stored, Fault(SHARD, "other")) as store:
        with pytest.raises(DataError, match=f"{SHARD}: is damaged") as caught:
            read_all(use(store), QUICK, cache_dir=tmp_path / "cache")
        assert not isinstance(caught.value, UnreachableError)
        assert store.count(SHARD) == 2


def test_a_store_that_does_not_answer_is_not_taken_for_none(
    stored: Path, use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a corpus would be encoded again, for hours."""
    monkeypatch.setattr(download, "DEFAULT", ONCE)
    meta = read_meta(stored)
    with faulty_store(stored, Fault("meta.json", "NoSuchKey", times=1)) as store:
        assert finished_store(use(store), meta) is None
        store.faults[:] = [Fault("meta.json", "SlowDown", times=1)]
        with pytest.raises(UnreachableError):
            finished_store(store.url, meta)
        store.faults[:] = [Fault("meta.json", "AccessDenied", times=1)]
        with pytest.raises(DataError, match="credentials"):
            finished_store(store.url, meta)


def test_a_masked_password_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="its password was masked"):
        read_meta("sftp://me:***@127.0.0.1/store", QUICK)


def test_pauses_grow_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_FIRST_PAUSE", 1.0)
    first, second = ([download.pause_after(number + 1) for number in range(2000)] for _ in "12")
    for number, pause in enumerate(first):
        middle = min(30.0, 2.0 ** min(number, 5))
        assert 0.5 * middle <= pause <= 1.5 * middle
    assert first != second


def test_errors_of_other_clouds() -> None:
    """By the exceptions that their libraries really raise."""
    from azure.core.exceptions import ClientAuthenticationError, ResourceNotFoundError
    from azure.core.exceptions import ServiceRequestError as AzureRequestError
    from google.api_core.exceptions import Forbidden, NotFound, ServiceUnavailable, TooManyRequests
    from google.auth.exceptions import DefaultCredentialsError, TransportError
    from oci.exceptions import ConfigFileNotFound, ServiceError
    from paramiko import AuthenticationException, SSHException
    from requests.exceptions import ConnectionError as RequestsConnectionError

    kinds = {
        download.Fault.PASSING: [
            ServiceUnavailable("x"), TooManyRequests("x"), TransportError("x"),
            AzureRequestError("x"), ServiceError(503, "x", {}, "x"), SSHException("x"),
            ServiceError(429, "TooManyRequests", {}, "x"), RequestsConnectionError("x"),
            ConnectionResetError(), TimeoutError(), EOFError(),
        ],
        download.Fault.CREDENTIALS: [
            Forbidden("x"), DefaultCredentialsError("x"), ClientAuthenticationError("x"),
            ServiceError(401, "NotAuthenticated", {}, "x"), AuthenticationException("x"),
            ConfigFileNotFound("x"),
        ],
        download.Fault.MISSING: [
            NotFound("x"), FileNotFoundError("x"), ServiceError(404, "x", {}, "x"),
        ],
        download.Fault.LASTING: [
            OSError(28, "No space left on device"), ValueError("x"), PermissionError(13, "x"),
            ImportError("x"),
        ],
    }  # fmt: skip
    for kind, errors in kinds.items():
        assert {repr(error): fault_of(error) for error in errors} == {
            repr(error): kind for error in errors
        }
    missing = ResourceNotFoundError("x")
    missing.status_code = 404
    assert fault_of(missing) is download.Fault.MISSING


def test_every_break_of_the_server_is_used() -> None:
    assert {*CUT, "html", "other", "trickle"} == set(BREAKS)
