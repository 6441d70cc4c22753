"""Corpora as they are published: FineWeb, C4, Dolma, SlimPajama, the Pile, Wikipedia, WikiText; on
disk, in S3 and from standard input; and tables that are damaged."""

from __future__ import annotations

import gzip
import io
import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from calm_dist.errors import DataError
from calm_dist.text import tables, units
from calm_dist.text.corpus import ShuffledDocuments, find_files, iter_documents
from calm_dist.text.formats import Reading
from calm_dist.text.prepare import prepare_corpus

ROOT = Path(__file__).parents[2]
TEXTS = [f"Document {i} of a corpus.\n\nIts second paragraph, ü.\n" for i in range(7)]


def lines(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def fineweb(root: Path) -> list[str]:
    rows = [
        {
            "text": text,
            "id": f"<urn:uuid:{i:08}-0e5c-4a5e-9a5d-1d2c3b4a5f60>",
            "dump": "CC-MAIN-2024-10",
            "url": f"http://example.org/{i}",
            "date": "2024-02-21T00:13:40Z",
            "file_path": "s3://commoncrawl/crawl-data/CC-MAIN-2024-10/segments/0.warc.gz",
            "language": "en",
            "language_score": 0.97,
            "token_count": 12,
        }
        for i, text in enumerate(TEXTS)
    ]
    place = root / "data" / "CC-MAIN-2024-10"
    place.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), place / "000_00000.parquet", row_group_size=3)
    return [str(row["id"]) for row in rows]


def c4(root: Path) -> list[str]:
    records = [
        {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": f"https://example.org/{i}"}
        for i, text in enumerate(TEXTS)
    ]
    (root / "en").mkdir()
    name = "en/c4-train.00000-of-01024.json.gz"
    (root / name).write_bytes(gzip.compress(lines(records)))
    return [f"{name}@{offset(records, i)}" for i in range(len(TEXTS))]


def dolma(root: Path) -> list[str]:
    records = [
        {
            "id": f"books-{i}",
            "text": text,
            "source": "gutenberg",
            "added": "2023-04-11T09:57:03.044571+00:00",
            "created": "1906-01-01T00:00:00.000Z",
            "metadata": {"length": len(text)},
        }
        for i, text in enumerate(TEXTS)
    ]
    (root / "books-0000.json.gz").write_bytes(gzip.compress(lines(records)))
    return [f"books-{i}" for i in range(len(TEXTS))]


def slimpajama(root: Path) -> list[str]:
    records = [
        {"text": text, "meta": {"redpajama_set_name": "RedPajamaCommonCrawl"}} for text in TEXTS
    ]
    (root / "train" / "chunk1").mkdir(parents=True)
    name = "train/chunk1/example_train_0.jsonl.zst"
    (root / name).write_bytes(zstandard.compress(lines(records)))
    return [f"{name}@{offset(records, i)}" for i in range(len(TEXTS))]


def the_pile(root: Path) -> list[str]:
    """Its files have many frames."""
    records = [{"text": text, "meta": {"pile_set_name": "Pile-CC"}} for text in TEXTS]
    whole = lines(records)
    frames = [zstandard.compress(whole[i : i + 100]) for i in range(0, len(whole), 100)]
    (root / "00.jsonl.zst").write_bytes(b"".join(frames))
    return [f"00.jsonl.zst@{offset(records, i)}" for i in range(len(TEXTS))]


def wikipedia(root: Path) -> list[str]:
    pq.write_table(wikipedia_table(), root / "train-00000-of-00001.parquet")
    return [str(12 + i) for i in range(len(TEXTS))]


def wikipedia_table() -> pa.Table:
    return pa.table(
        {
            "id": [str(12 + i) for i in range(len(TEXTS))],
            "url": [f"https://en.wikipedia.org/wiki/{i}" for i in range(len(TEXTS))],
            "title": [f"Title {i}" for i in range(len(TEXTS))],
            "text": TEXTS,
        }
    )


def saved_to_disk(root: Path) -> list[str]:
    """`datasets.Dataset.save_to_disk`: streams of record batches, and descriptions in JSON."""
    table = wikipedia_table()
    for i, part in enumerate((table[:4], table[4:])):
        with pa.ipc.new_stream(root / f"data-{i:05}-of-00002.arrow", table.schema) as writer:
            writer.write_table(part, max_chunksize=2)
    state = {"_data_files": [{"filename": "data-00000-of-00002.arrow"}], "_split": "train"}
    (root / "state.json").write_text(json.dumps(state, indent=2))
    (root / "dataset_info.json").write_text(json.dumps({"features": {"text": "…"}}, indent=2))
    return [str(12 + i) for i in range(len(TEXTS))]


def ipc_file(root: Path) -> list[str]:
    """Arrow's other container, without ids and with another name of the text."""
    table = wikipedia_table().drop_columns(["id"]).rename_columns(["url", "title", "content"])
    with pa.ipc.new_file(root / "wiki.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return [f"wiki.arrow@{i}" for i in range(len(TEXTS))]


def wikitext(root: Path) -> list[str]:
    records = [{"page": text} for text in TEXTS]
    (root / "wiki.train.json").write_bytes(lines(records))
    return [f"wiki.train.json@{offset(records, i)}" for i in range(len(TEXTS))]


def nested(root: Path) -> list[str]:
    """Text and id in nested objects, as in dumps of conversations."""
    records = [
        {"body": {"raw": text}, "meta": {"id": 100 + i, "lang": "en"}}
        for i, text in enumerate(TEXTS)
    ]
    (root / "a.jsonl.zst").write_bytes(zstandard.compress(lines(records[:4])))
    pq.write_table(pa.Table.from_pylist(records[4:]), root / "b.parquet")
    return [str(100 + i) for i in range(len(TEXTS))]


def offset(records: list[dict[str, Any]], i: int) -> int:
    return len(lines(records[:i]))


LAYOUTS: dict[Any, Reading] = {
    fineweb: Reading(),
    c4: Reading(),
    dolma: Reading(),
    slimpajama: Reading(),
    the_pile: Reading(),
    wikipedia: Reading(),
    saved_to_disk: Reading(),
    ipc_file: Reading(text_key="content"),
    wikitext: Reading(text_key="page"),
    nested: Reading(text_key="body.raw", id_key="meta.id"),
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_published_layout_is_read_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Any
) -> None:
    ids, reading = layout(tmp_path), LAYOUTS[layout]
    files = find_files([tmp_path], reading)
    documents = list(iter_documents(files, reading))
    assert [document.text for document in documents] == TEXTS
    assert [document.id for document in documents] == ids
    assert set(ShuffledDocuments(files, 0, reading)) == set(documents)
    # The same in many units, of which some start in the middle of files.
    monkeypatch.setattr(units, "CHUNK_BYTES", 150)
    assert list(iter_documents(files, reading)) == documents
    can_be_cut = layout in (fineweb, saved_to_disk, ipc_file, wikitext)
    found = units.units_of(files, reading)
    assert any(span.start for unit in found for span in unit.spans) == can_be_cut


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket at a real S3 server on loopback."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        endpoint = f"http://{host}:{port}"
        patch.setenv("S3_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
        client.create_bucket(Bucket="corpora")
        from calm_dist.text import remote_files

        remote_files._arrow_file_system.cache_clear()
        yield "s3://corpora"
        remote_files._arrow_file_system.cache_clear()
    server.stop()


def upload(root: Path, prefix: str) -> None:
    import os

    import boto3

    client = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"], region_name="us-east-1")
    for path in root.rglob("*"):
        if path.is_file():
            name = path.relative_to(root).as_posix()
            client.upload_file(str(path), "corpora", f"{prefix}/{name}")


def test_corpus_in_s3_is_the_one_on_disk(bucket: str, tmp_path: Path) -> None:
    for layout in (fineweb, c4, slimpajama, saved_to_disk):
        place = tmp_path / layout.__name__
        place.mkdir()
        layout(place)
        (place / ".hidden.txt").write_text("not this")
        (place / "README.md").write_text("nor this")
        upload(place, layout.__name__)
        local = list(iter_documents([place]))
        assert list(iter_documents([f"{bucket}/{layout.__name__}"])) == local
        assert list(iter_documents([f"{bucket}/{layout.__name__}/"])) == local
        assert set(ShuffledDocuments([f"{bucket}/{layout.__name__}"], 3)) == set(local)
    summary = find_files([f"{bucket}/saved_to_disk"]).summary()
    assert summary == (
        "corpus: 2 .arrow; left out: 2 .json (not lines of documents), 1 .md, 1 hidden"
    )
    found = find_files(
        [f"{bucket}/*/train/*/*.zst", f"{bucket}/c4/en/c4-train.00000-of-01024.json.gz"]
    )
    assert [file.name for file in found] == [
        "example_train_0.jsonl.zst",
        "c4-train.00000-of-01024.json.gz",
    ]
    for missing in ("nothing", "nothing/*.jsonl", "saved_to_disk/README.md"):
        with pytest.raises(DataError, match=f"corpus {bucket}/.*(cannot be read|no|unknown)"):
            find_files([f"{bucket}/{missing}"])
    with pytest.raises(DataError, match=r"corpus nowhere://x/a.jsonl: cannot be read|no client"):
        find_files(["nowhere://x/a.jsonl"])


def test_other_urls_are_read_by_fsspec(tmp_path: Path) -> None:
    ids = dolma(tmp_path)
    (file,) = find_files([f"file://{tmp_path}/books-0000.json.gz"])
    assert [document.id for document in iter_documents([file.path])] == ids


def test_standard_input_is_a_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Input:
        buffer = io.BytesIO(lines([{"text": text} for text in TEXTS]))

    monkeypatch.setattr(sys, "stdin", Input)
    arguments = ["--corpus", "-", "--vocab-size", "280", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["prepare_corpus", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "tools" / "prepare_corpus.py"), run_name="__main__")
    assert caught.value.code == 0, capsys.readouterr().err
    found = [
        document.text
        for split in ("train", "valid", "test")
        for document in iter_documents([tmp_path / "out" / "corpus" / f"{split}.jsonl"])
    ]
    assert sorted(found) == sorted(TEXTS)
    with pytest.raises(DataError, match="is given twice"):
        find_files(["-", "-"])
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(DataError, match="standard input is closed"):
        find_files(["-"])


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (b'{"text": "a"}\nno JSON\n', r"corpus standard input, line 2: is not a line of JSON"),
        (b"\n", r"corpus standard input: holds no text"),
        (
            b'{"id": 1, "text": "a"}\n\n{"id": 1, "text": "b"}\n{"text": "c"}\n',
            r"corpus: standard input, line 1 and standard input, line 3 have the same id",
        ),
    ],
)
def test_faults_of_standard_input_do_not_name_its_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: bytes, message: str
) -> None:
    class Input:
        buffer = io.BytesIO(sent)

    monkeypatch.setattr(sys, "stdin", Input)
    with pytest.raises(DataError, match=message) as caught:
        prepare_corpus(tmp_path / "out", ["-"], vocab_size=280)
    assert "stdin" not in str(caught.value)


@pytest.mark.parametrize("name", ["text", "id"])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_table_with_two_columns_of_one_name_is_refused(
    tmp_path: Path, name: str, suffix: str
) -> None:
    names = [*dict.fromkeys(["text", name]), name]
    table = pa.table([pa.array(["a"])] * len(names), names=names)
    path = write_table(tmp_path / f"twice{suffix}", table)
    with pytest.raises(DataError, match=f'has several columns "{name}"'):
        list(iter_documents([path]))


def damaged(root: Path, name: str, change: Any) -> Path:
    whole = (root / name).read_bytes()
    (root / name).write_bytes(change(whole))
    return root / name


def test_damaged_tables_are_named(tmp_path: Path) -> None:
    for i, change in enumerate(
        (lambda whole: whole[:-20], lambda whole: whole[: len(whole) // 2], lambda _: b"PAR1")
    ):
        for layout, name in (
            (wikipedia, "train-00000-of-00001.parquet"),
            (saved_to_disk, "data-00000-of-00002.arrow"),
            (ipc_file, "wiki.arrow"),
        ):
            root = tmp_path / f"{layout.__name__}{i}"
            root.mkdir()
            layout(root)
            path = damaged(root, name, change)
            reading = LAYOUTS[layout]
            with pytest.raises(DataError, match=rf"{name}: is (damaged or )?cut off"):
                list(iter_documents([path], reading))


def test_stream_cut_between_two_batches_is_refused(tmp_path: Path) -> None:
    """pyarrow itself takes it for complete."""
    saved_to_disk(tmp_path)
    path = damaged(tmp_path, "data-00000-of-00002.arrow", lambda whole: whole[:-8])
    assert pa.ipc.open_stream(path.read_bytes()).read_all().num_rows == 4
    with pytest.raises(DataError, match="is cut off: it has no end mark of an Arrow stream"):
        list(iter_documents([path]))


def test_column_that_is_missing_or_no_text_is_named(tmp_path: Path) -> None:
    wikipedia(tmp_path)
    with pytest.raises(DataError, match=r'"body" is missing \(columns \[\'id\', .*--text-key'):
        list(iter_documents([tmp_path], Reading(text_key="body")))
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    with pytest.raises(DataError, match=r'numbers.parquet: its column "text" is of type int64'):
        list(iter_documents([tmp_path / "numbers.parquet"]))


def test_rows_without_text_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None, " "]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r'a.parquet: row 1: its "text" is null'):
        list(iter_documents([tmp_path]))
    text = pa.array([b"caf\xe9", b"ok"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r'a.parquet: row 0: its "text" is not UTF-8 \(byte 3\)'):
        list(iter_documents([tmp_path]))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("key", ["meta.id", "meta.id.x", "meta.text.x", "text.id", "none.id"])
def test_missing_nested_id_is_made_from_the_place(tmp_path: Path, suffix: str, key: str) -> None:
    """Also where the object that would hold it is there, and holds the text."""
    table = pa.table({"text": ["a", "b"], "meta": [{"text": "a", "n": 1}, {"text": "b", "n": 2}]})
    path = write_table(tmp_path / f"a{suffix}", table)
    for text_key in ("text", "meta.text"):
        found = list(iter_documents([path], Reading(text_key=text_key, id_key=key)))
        assert [(one.id, one.text) for one in found] == [
            (f"{path.name}@0", "a"),
            (f"{path.name}@1", "b"),
        ]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_times_that_python_cannot_hold_are_ids(tmp_path: Path, suffix: str) -> None:
    expected = {
        pa.timestamp("ns"): ["1970-01-01 00:00:00.000000005", "1970-01-01 00:00:01", None],
        pa.timestamp("us"): ["1970-01-01 00:00:00.000005", "1970-01-01 00:16:40", None],
        pa.duration("ns"): ["5", "0:00:01", None],
    }
    for kind, ids in expected.items():
        given = pa.array([5, 1_000_000_000, None], pa.int64()).cast(kind)
        table = pa.table({"text": ["a", "b", "c"], "id": given})
        path = write_table(tmp_path / f"a{suffix}", table)
        found = [document.id for document in iter_documents([path])]
        assert found == [one or f"{path.name}@2" for one in ids], kind


def write_table(path: Path, table: pa.Table) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    return path


def test_dictionary_columns_are_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array(TEXTS).dictionary_encode()}), tmp_path / "a.parquet")
    assert [document.text for document in iter_documents([tmp_path])] == TEXTS


def test_large_row_group_takes_little_memory(tmp_path: Path) -> None:
    """Pages are read one after another, not a group of rows at once."""
    text = "x" * (1 << 20)
    table = pa.table({"text": [f"{i}{text}" for i in range(100)]})
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False, write_batch_size=1)
    del table
    before = pa.total_allocated_bytes()
    most = 0
    for document in iter_documents([tmp_path]):
        most = max(most, pa.total_allocated_bytes() - before)
        assert len(document.text) > 1 << 20
    assert 0 < most < 24 << 20
    groups = tables.groups(find_files([tmp_path])[0], ".parquet", Reading())
    assert groups is not None and [rows for rows, _ in groups] == [100]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_large_rows_are_decoded_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """By their size, also where a row is larger than the limit, and small ones lie between."""
    rows = [str(i) * (1 << 20 if i % 10 < 8 else 1 << 24 if i == 8 else 1) for i in range(60)]
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        table = pa.table({"text": rows, "id": list(map(str, range(60)))})
        pq.write_table(table, path, use_dictionary=False, write_batch_size=1)
    else:
        write_table(path, pa.table({"text": rows, "id": list(map(str, range(60)))}))
    sizes = []
    original = tables._values

    def watched(column: Any, length: int = 0) -> Any:
        sizes.append((len(column), column.nbytes))
        return original(column, length)

    monkeypatch.setattr(tables, "_values", watched)
    found = list(iter_documents([path]))
    assert [(one.id, one.text) for one in found] == [(str(i), row) for i, row in enumerate(rows)]
    assert all(number == 1 or size <= tables._BATCH_BYTES for number, size in sizes)
    assert len(sizes) < 2 * len(rows)


def test_stream_that_is_cut_after_zeros_is_refused(tmp_path: Path) -> None:
    """The last bytes of a batch of small numbers are zeros, as the old end mark is."""
    table = pa.table({"text": ["a", "b"], "number": [1, 2]})
    whole, half = tmp_path / "whole.arrow", tmp_path / "half.arrow"
    for file, batches in ((whole, 2), (half, 1)):
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            for _ in range(batches):
                writer.write_table(table)
    cut = tmp_path / "cut.arrow"
    cut.write_bytes(whole.read_bytes()[: half.stat().st_size - 8])
    assert cut.read_bytes().endswith(bytes(4))
    with pytest.raises(DataError, match="is cut off: it has no end mark of an Arrow stream"):
        list(iter_documents([cut]))
    # The format from before Arrow 0.15 has no other mark.
    old = pa.ipc.IpcWriteOptions(use_legacy_format=True)
    with (
        pa.OSFile(str(half), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema, options=old) as w,
    ):
        w.write_table(table)
    assert [document.text for document in iter_documents([half])] == ["a", "b"]
