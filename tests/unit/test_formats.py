"""Files of a corpus: every format, files that end early, limits, and the one list of formats."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import resource
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from calm_dist.errors import DataError
from calm_dist.text import compressed, formats
from calm_dist.text.compressed import CODECS
from calm_dist.text.corpus import ShuffledDocuments, iter_documents
from calm_dist.text.formats import PARSERS, SUPPORTED, Reading, format_of

ROOT = Path(__file__).parents[2]
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zstandard.compress,
}
SKIPPABLE = 0x184D2A53.to_bytes(4, "little") + (5).to_bytes(4, "little") + b"hello"


def lines_of(start: int, count: int) -> bytes:
    """JSON lines of numbered documents."""
    return b"".join(b'{"text": "document %d"}\n' % i for i in range(start, start + count))


# Of each kind of text: contents of a file, and its documents.
CONTENT: dict[str, tuple[bytes, list[str]]] = {
    ".txt": (b"one text\n", ["one text\n"]),
    ".jsonl": (lines_of(0, 2), ["document 0", "document 1"]),
    ".json": (lines_of(0, 2), ["document 0", "document 1"]),
}


def texts(path: Path) -> list[str]:
    """Read in both ways, which agree."""
    in_order = [document.text for document in iter_documents([path])]
    shuffled = [document.text for document in ShuffledDocuments([path], seed=0)]
    assert sorted(shuffled) == sorted(in_order)
    return in_order


def refusal(path: Path) -> str:
    """The message of both ways of reading."""
    messages = set()
    for read in (iter_documents, lambda paths: ShuffledDocuments(paths, seed=0)):
        with pytest.raises(DataError) as caught:
            list(read([path]))
        messages.add(str(caught.value))
    (message,) = messages
    assert path.name in message
    return message


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize("kind", PARSERS)
@pytest.mark.parametrize("change_case", [str, str.upper])
def test_every_format_is_read(
    tmp_path: Path, kind: str, compression: str, change_case: Callable[[str], str]
) -> None:
    assert set(PACK) == {"", *CODECS}
    content, expected = CONTENT[kind]
    path = tmp_path / change_case(f"a{kind}{compression}")
    path.write_bytes(PACK[compression](content))
    assert texts(path) == expected == [document.text for document in iter_documents([tmp_path])]


@pytest.mark.parametrize("compression", CODECS)
def test_file_that_was_cut_is_refused_at_every_byte(tmp_path: Path, compression: str) -> None:
    frames = [PACK[compression](lines_of(4 * i, 4)) for i in range(3)]
    whole = b"".join(frames)
    borders = {len(frames[0]): 4, len(frames[0]) + len(frames[1]): 8, len(whole): 12}
    path = tmp_path / f"a.jsonl{compression}"
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        if size in borders:
            assert texts(path) == [f"document {i}" for i in range(borders[size])]
        elif size:
            assert f"is cut off: it ends after byte {size}, inside" in refusal(path)
        else:
            assert "is empty" in refusal(path)


@pytest.mark.parametrize("compression", CODECS)
@pytest.mark.parametrize("tail", [b"garbage after the end", b"\x01", b"\0" * 8])
def test_what_follows_the_last_frame(tmp_path: Path, compression: str, tail: bytes) -> None:
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(PACK[compression](lines_of(0, 3)) + tail)
    if CODECS[compression].padding and not tail.strip(b"\0"):
        # gzip and xz allow zero bytes there.
        assert len(texts(path)) == 3
    else:
        assert re.search("follow its frame 1|is cut off", refusal(path))


@pytest.mark.parametrize("compression", CODECS)
def test_flipped_bytes_never_lose_a_document_in_silence(tmp_path: Path, compression: str) -> None:
    """But for zstd, whose files may have no checksum, and headers, such as gzip's file name."""
    packed = PACK[compression](lines_of(0, 30))
    if compression == ".zst":
        packed = zstandard.ZstdCompressor(write_checksum=True).compress(lines_of(0, 30))
    path = tmp_path / f"a.jsonl{compression}"
    for at in range(len(packed)):
        path.write_bytes(packed[:at] + bytes([packed[at] ^ 0x20]) + packed[at + 1 :])
        try:
            found = texts(path)
        except DataError as error:
            assert "a.jsonl" in str(error)
        else:
            assert found == [f"document {i}" for i in range(30)]


@pytest.mark.parametrize("compression", CODECS)
def test_frames_may_be_many_and_cut_anywhere(tmp_path: Path, compression: str) -> None:
    text = lines_of(0, 200)
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(b"".join(PACK[compression](text[i : i + 7]) for i in range(0, len(text), 7)))
    assert texts(path) == [f"document {i}" for i in range(200)]


def test_skippable_frames_of_zstd_hold_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(
        SKIPPABLE + PACK[".zst"](lines_of(0, 2)) + SKIPPABLE + PACK[".zst"](lines_of(2, 2))
        + SKIPPABLE
    )  # fmt: skip
    assert texts(path) == [f"document {i}" for i in range(4)]


@pytest.mark.parametrize("window_log", [27, 30, 31])
def test_zst_of_large_windows(tmp_path: Path, window_log: int) -> None:
    """As ``zstd --long`` writes them; a file beyond the limit is not called damaged."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        3, window_log=window_log, write_content_size=False
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = tmp_path / "a.txt.zst"
    path.write_bytes(compressor.compress(b"text") + compressor.flush())
    if window_log <= 30:
        assert texts(path) == ["text"]
        return
    with pytest.raises(DataError, match="needs more memory than the limit of 1024 MiB") as caught:
        texts(path)
    assert "damaged" not in str(caught.value) and "zstd --long=27" in str(caught.value)


def test_xz_that_wants_too_much_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt.xz"
    path.write_bytes(lzma.compress(b"text", preset=6))
    assert texts(path) == ["text"]
    monkeypatch.setattr(compressed, "_MEMORY_BYTES", 4 << 20)
    assert "Memory usage limit" in refusal(path)


def test_line_of_json_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "JSON_LINE_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl"
    longest = b'{"text": "%s"}\n' % (b"x" * ((1 << 20) - 13))
    assert len(longest) == 1 << 20
    path.write_bytes(lines_of(0, 1) + longest)
    assert len(texts(path)[1]) == (1 << 20) - 13
    path.write_bytes(lines_of(0, 1) + b" " + longest)
    assert "a.jsonl:2: is longer than 1 MiB" in refusal(path)


def test_mark_of_utf8_before_an_empty_line_is_no_fault(tmp_path: Path) -> None:
    """As some editors write it; elsewhere it is none of JSON."""
    path = tmp_path / "a.jsonl"
    for start in (b"", b"\n", b" \r\n"):
        path.write_bytes(b"\xef\xbb\xbf" + start + lines_of(0, 2))
        assert len(texts(path)) == 2
    path.write_bytes(b"\xef\xbb\xbf\n")
    assert "holds no text" in refusal(path)
    path.write_bytes(lines_of(0, 1) + b"\xef\xbb\xbf\n")
    assert "a.jsonl:2: is not a line of JSON" in refusal(path)


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.txt.zst", "a.jsonl.gz", "a.jsonl.xz"])
def test_file_that_unpacks_to_gigabytes_takes_little_memory(tmp_path: Path, name: str) -> None:
    """An endless line, of which no more than the limit is held; or documents of characters."""
    suffix = Path(name).suffix
    piece = PACK[suffix](b'{"text": "' + b"a" * (16 << 20))
    path = tmp_path / name
    path.write_bytes(piece * 40)
    code = f"""
        import resource
        from itertools import islice
        from calm_dist.text import formats
        from calm_dist.text.corpus import iter_documents
        from calm_dist.errors import DataError
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        formats.JSON_LINE_BYTES = 16 << 20
        try:
            print(sum(len(d.text) for d in islice(iter_documents([{str(path)!r}]), 1000)))
        except DataError as error:
            print(error)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    said, grown = done.stdout.splitlines()
    if name.startswith("a.txt"):
        assert int(said) == 1000 * 2 * formats.TEXT_DOCUMENT_CHARACTERS
    else:
        assert f"{name}:1: is longer than 16 MiB" in said
    assert int(grown) < 200


def test_text_of_nothing_but_continuation_bytes_ends_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * 99_999 + b"\x80" * (32 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    assert "is not UTF-8 text (byte 99999)" in refusal(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 2


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ('[{"text": "a"}, {"text": "b"}]', "one JSON array"),
        ('\n[\n {"text": "a"}\n]', "one JSON array"),
        ('{\n  "text": "a"\n}', "one JSON object over several lines"),
        ('{"documents": [\n  "a"\n]}', "one JSON object over several lines"),
        ('\ufeff{"name": "a",\n  "text": "a"}', "one JSON object over several lines"),
    ],
)
def test_json_document_is_refused_or_left_out(tmp_path: Path, content: str, found: str) -> None:
    """What one file is, said where it is named; in a directory it is counted."""
    path = tmp_path / "a.json"
    path.write_text(content)
    assert f"holds {found}, but must hold lines of JSON" in refusal(path)
    (tmp_path / "b.jsonl").write_bytes(lines_of(0, 1))
    assert len(texts(tmp_path)) == 1


@pytest.mark.parametrize(
    ("key", "example"), [("body", '{"body": "..."}'), ("m.t", '{"m": {"t": "..."}}')]
)
def test_example_of_a_line_has_the_key_that_was_given(
    tmp_path: Path, key: str, example: str
) -> None:
    path = tmp_path / "a.json"
    for content in ('{"text": "found under another key"}', "[1]"):
        path.write_text(content)
        with pytest.raises(DataError, match="object like " + re.escape(example)):
            list(iter_documents([path], Reading(text_key=key)))


def test_formats_stand_in_one_place() -> None:
    """Every list of them outside `formats` says `SUPPORTED` to the letter."""
    assert format_of("a.txt.zst.bak") is format_of("a.tar.gz") is format_of("txt") is None
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for part in ("calm_dist", "tools", "slurm"):
        files += [*(ROOT / part).rglob("*.py"), *(ROOT / part).rglob("*.sh")]
    kinds, packed = ("|".join(map(re.escape, names)) for names in (PARSERS, CODECS))
    tables = re.compile(r"\.parquet\b[^.\n]{0,8}\.arrow\b")
    compressed_name = re.compile(rf"(?<!\d )(?:{kinds})(?:{packed})\b")  # but counts
    listed = re.compile(r"\.txt\b[^.\n]{0,8}\.jsonl?\b")
    saying = []
    for file in files:
        if file.name in ("formats.py", "compressed.py", "tables.py"):
            continue
        text = re.sub(r"[\s#]+", " ", file.read_text(encoding="utf-8").replace("`", ""))
        saying += [file.name] * (SUPPORTED in text)
        rest = text.replace(SUPPORTED, "")
        wrong = compressed_name.search(rest) or listed.search(rest) or tables.search(rest)
        assert wrong is None, f"{file}: {rest[wrong.start() - 60 : wrong.end() + 60]}"
    assert {"README.md", "data.md", "quickstart.sh"} <= set(saying)


def test_ids_that_are_no_text_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"id": "\\ud800", "text": "b"}\n')
    assert 'a.jsonl:2: "id" holds half of a surrogate pair' in refusal(path)
    path.write_text(json.dumps({f"key {i}": "x" * 1000 for i in range(1000)}))
    assert len(refusal(path)) < 500


@pytest.mark.parametrize("piece", ["a, ", "a[ ", "a{ ", "ab "])
def test_long_first_line_of_json_in_a_directory_is_read(tmp_path: Path, piece: str) -> None:
    """Only its beginning is read to decide, wherever that ends."""
    line = json.dumps({"text": piece * (1_300_000 // len(piece))}) + "\n"
    for shift in range(len(piece)):
        (tmp_path / f"{shift}.json").write_text(" " * shift + line)
    assert len(texts(tmp_path)) == len(piece)


def test_the_remedy_for_one_array_is_a_command_that_works(tmp_path: Path) -> None:
    for name, packed in (("an array.json", bytes), ("b.json.gz", gzip.compress)):
        (tmp_path / name).write_bytes(packed(b'[{"text": "a"}]'))
    assert "jq -c '.[]' 'an array.json' > documents.jsonl" in refusal(tmp_path / "an array.json")
    assert "zcat b.json.gz | jq -c '.[]' > documents.jsonl" in refusal(tmp_path / "b.json.gz")
