"""Stores in S3, against moto's server on loopback: a real client, a real protocol."""

import json
import os
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import aiohttp
import boto3
import pytest

from calm_dist.data.inspection import check_store, read_block
from calm_dist.data.latents import StorePlan, plan_store, write_store
from calm_dist.data.store import read_meta
from calm_dist.data.stream import open_store, open_training_stream
from calm_dist.errors import DataError, UnreachableError
from calm_dist.text import remote_files
from calm_dist.text.corpus import iter_documents
from calm_dist.text.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture
def bucket(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return "s3://bucket/stores/one"


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[list[Path], Tokenizer, StorePlan]:
    corpus = tmp_path / "corpus.jsonl"
    texts = [f"document {i} " + "with words " * (i % 5) for i in range(30)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_tokenizer(["document with words"], 265, tmp_path / "tokenizer.json")
    plan = plan_store([corpus], tokenizer, variant="tokens", block_size=16, patch_size=4)
    return [corpus], tokenizer, plan


def objects() -> dict[str, bytes]:
    client = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])
    listed = client.list_objects_v2(Bucket="bucket")["Contents"]
    return {
        item["Key"].removeprefix("stores/one/"): client.get_object(
            Bucket="bucket", Key=item["Key"]
        )["Body"].read()
        for item in listed
    }


def test_store_in_s3_is_written_read_and_checked(
    bucket: str, inputs: tuple[list[Path], Tokenizer, StorePlan], tmp_path: Path
) -> None:
    corpus, tokenizer, plan = inputs
    meta = write_store(bucket, corpus, tokenizer, plan, shard_bytes=512)
    local = tmp_path / "local"
    assert write_store(local, corpus, tokenizer, plan, shard_bytes=512) == meta
    assert objects() == {path.name: path.read_bytes() for path in local.iterdir()}
    assert read_meta(bucket) == meta
    # Once more: it is there, and another plan is refused.
    assert write_store(bucket, corpus, tokenizer, plan) == meta
    with pytest.raises(DataError, match=r"another seed \(0 there, 1 now\)"):
        write_store(bucket, corpus, tokenizer, plan.model_copy(update={"seed": 1}))

    cache = tmp_path / "cache"
    options: dict[str, Any] = {"batch_size": 4, "cache_dir": cache}
    stream = open_training_stream([bucket], **options)
    received = [batch["index"].tolist() for batch in islice(stream, 2 * stream.steps_per_epoch)]
    same = islice(open_training_stream([local], batch_size=4), 2 * stream.steps_per_epoch)
    assert received == [batch["index"].tolist() for batch in same]
    with pytest.raises(DataError, match="needs a local copy"):
        open_store(bucket)
    # Shard by shard, without a copy of the whole store.
    check = check_store(bucket)
    assert not check.problems and check.blocks == meta.num_blocks
    block = read_block(bucket, meta.num_blocks - 1)["tokens"]
    assert block.tolist() == open_store(local)[meta.num_blocks - 1]["tokens"].tolist()

    # A damaged copy in the cache is found, and fetched again by the next run.
    shard = next(cache.rglob("shard.00001.mds"))
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + b"\xff")
    broken = open_training_stream([bucket], **options)
    with pytest.raises(DataError, match=r"shard\.00001\.mds: is damaged"):
        list(islice(broken, broken.steps_per_epoch))
    mended = open_training_stream([bucket], **options)
    list(islice(mended, mended.steps_per_epoch))
    assert shard.read_bytes() == good


def test_missing_remote_store_and_bucket_are_named(
    bucket: str, inputs: tuple[list[Path], Tokenizer, StorePlan], tmp_path: Path
) -> None:
    corpus, tokenizer, plan = inputs
    with pytest.raises(DataError, match=r"s3://bucket/none: meta\.json cannot be downloaded"):
        open_training_stream(["s3://bucket/none"], batch_size=4, cache_dir=tmp_path)
    with pytest.raises(DataError, match=r"--out s3://nowhere/x: cannot be uploaded"):
        write_store("s3://nowhere/x", corpus, tokenizer, plan)
    kept = next((tmp_path / f"calm_dist_{os.getuid()}").glob("staging_*"))
    assert read_meta(kept).num_blocks == len(open_store(kept))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_make_room_for_others(
    bucket: str, inputs: tuple[list[Path], Tokenizer, StorePlan], tmp_path: Path, num_workers: int
) -> None:
    """Beside a store on local disk, whose files stay; and what an earlier run left counts."""
    corpus, tokenizer, plan = inputs
    # The server keeps what earlier tests wrote, in shards of another size.
    bucket += f"-room-{num_workers}"
    local, other = tmp_path / "local", tmp_path / "other"
    for place in (bucket, local, other):
        write_store(place, corpus, tokenizer, plan, shard_bytes=2 * plan.sample_bytes)
    cache = tmp_path / "cache"
    options: dict[str, Any] = {
        "batch_size": 4, "cache_dir": cache, "num_workers": num_workers, "seed": 5,
    }  # fmt: skip

    def read(*paths: str | Path, **more: Any) -> list[dict[str, Any]]:
        stream = open_training_stream(paths, **{**options, **more})
        steps = stream.steps_per_epoch + 3
        return [{n: v.tolist() for n, v in batch.items()} for batch in islice(stream, steps)]

    def used() -> int:
        return sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())

    expected = read(local, other)
    assert read(bucket, other) == expected
    whole, shard = used(), max(file.stat().st_size for file in local.glob("shard.*"))
    shards = len(list(local.glob("shard.*")))
    assert shards > 20
    limit = whole - (shards - 4) * shard
    # The cache holds the whole store, and shrinks.
    assert read(bucket, other, cache_limit=limit) == expected
    assert used() <= limit and used() > limit - 2 * shard
    assert {file.name for file in other.iterdir()} == {file.name for file in local.iterdir()}
    message = rf"data.cache_limit={limit - 1}: the {max(1, num_workers)} reader\(s\) of a node need"
    with pytest.raises(DataError, match=message):
        read(bucket, other, cache_limit=limit - 1)
    if num_workers:
        return
    packed = plan.model_copy(update={"compression": "zstd"})
    write_store(f"{bucket}-2", corpus, tokenizer, packed, shard_bytes=2 * plan.sample_bytes)
    limit += limit // 2
    assert read(f"{bucket}-2", other, cache_limit=limit) == expected
    # Stores on local disk take nothing of it.
    assert read(local, other, cache_limit=1) == expected


def test_lost_connection_may_pass() -> None:
    """A file that could be opened: exit code 6, with which schedulers start again."""

    class Lost:
        def __init__(self, error: Exception) -> None:
            self.error = error

        def read(self, size: int) -> bytes:
            raise self.error

    for error, kind in (
        (ConnectionResetError(104, "reset"), UnreachableError),
        (aiohttp.ServerDisconnectedError(), UnreachableError),
        (TimeoutError("no answer"), UnreachableError),
        (PermissionError(13, "denied"), DataError),
        (ValueError("damaged"), DataError),
    ):
        with pytest.raises(DataError, match="https://host/a: cannot be read") as caught:
            remote_files._Raw("https://host/a", Lost(error)).readinto(memoryview(bytearray(8)))
        assert type(caught.value) is kind, error


def test_a_signature_is_not_part_of_a_name(tmp_path: Path) -> None:
    """Names become parts of ids and decide splits; a signature is a secret and changes."""
    for place in (tmp_path, tmp_path / "b"):
        place.mkdir(exist_ok=True)
        (place / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "a.jsonl.gz").write_bytes(b"")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.jsonl?X-Amz-Signature=AAA"
        assert [document.id for document in iter_documents([url])] == ["a.jsonl@0"]
        assert remote_files.find_urls(url) == [(url, "a.jsonl", 14, True)]
        # Files of one name are named by their whole URLs.
        host = f"http://127.0.0.1:{server.server_port}"
        signed = [url, f"{host}/b/a.jsonl?X-Amz-Signature=BBB"]
        names = [f"{host}/a.jsonl", f"{host}/b/a.jsonl"]
        assert [document.id for document in iter_documents(signed)] == [f"{n}@0" for n in names]
        again = url.replace("AAA", "CCC")
        with pytest.raises(DataError, match=r"Signature=\*\*\* and .*only the query .* differs"):
            list(iter_documents([url, again]))
        with pytest.raises(DataError, match="differ only in the compression suffix"):
            list(iter_documents([url, f"{host}/a.jsonl.gz?X-Amz-Signature=AAA"]))
        server.shutdown()


def test_containers_of_azure() -> None:
    """pyarrow names a file by its container; the URL names the account as well."""
    url = "abfs://box@account.dfs.core.windows.net/dir/*.jsonl"
    assert remote_files._file_system(url)[1] == "box/dir/*.jsonl"
