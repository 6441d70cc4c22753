#!/usr/bin/env python3
"""A large corpus of published layouts with bad lines in it: memory, kills, time to a first token.

    python tests/scale.py /scratch --mib 5000

Writes the corpus and stores below the directory given, prints what was measured as JSON, and ends
with an error if a document was lost or doubled: each begins with its number, by which it is found
in the store. The text is Python's standard library, repeated.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from calm_dist.data.stream import open_store
from calm_dist.text.corpus import standard_library_documents
from calm_dist.text.tokenizer import load_tokenizer, train_tokenizer

ROOT = Path(__file__).parents[1]
WORKERS = 64
PARTS = 8
BAD_EVERY = 500
_LONG_LINE = 20 << 20
_FILE_BYTES = 96 << 20
_FRAME_LINES = 1000
# Enough for "document", any number and the end of the line.
_HEAD_TOKENS = 24
_SCHEMA = pa.schema({"text": pa.string(), "id": pa.string()})
# Ends the process at its first block, which a worker would write later.
_FIRST_TOKEN = """
import json, os, resource, runpy, sys, time
started = time.time()
from calm_dist.data import latents
from calm_dist.text import corpus
original = latents.pack_blocks
def first(*args, **kwargs):
    for block in original(*args, **kwargs):
        used = resource.getrusage(resource.RUSAGE_SELF)
        print(json.dumps({"cpu_s": round(used.ru_utime + used.ru_stime, 2),
                          "wall_s": round(time.time() - started, 2),
                          "rss_mib": used.ru_maxrss >> 10}), flush=True)
        os._exit(0)
latents.pack_blocks = first
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Corpus:
    """Writes files in turn, each in another layout, until there is enough text.

    Attributes:
        documents, bad: their numbers.
        times: in how many files each numbered document is.
    """

    def __init__(self, root: Path, mib: int) -> None:
        self.documents = self.bad = 0
        self.times: Counter[int] = Counter()
        self._texts = itertools.cycle([found.text for found in standard_library_documents()])
        layouts = [self._lines_gz, self._parquet, self._lines_zst, self._arrow, self._lines]
        size = min(_FILE_BYTES, (mib << 20) // len(layouts))
        root.mkdir(parents=True)
        made = []
        for number, layout in enumerate(layouts):
            before = self.documents, self.bad
            path = layout(root / f"{number:05}", size)
            numbers = range(before[0], self.documents)
            self.times.update(numbers)
            made.append((path, numbers, self.bad - before[1]))
        # The other files are copies, which have the same documents.
        for number in range(len(layouts), (mib << 20) // size):
            path, numbers, bad = made[number % len(made)]
            shutil.copyfile(path, root / f"{number:05}{''.join(path.suffixes)}")
            self.times.update(numbers)
            self.documents += len(numbers)
            self.bad += bad
        with (root / "long.jsonl").open("w") as stream:
            text = "".join(itertools.islice(self._some(min(_LONG_LINE, mib << 18)), 10_000))
            stream.write(json.dumps({"text": text, "id": "long"}) + "\n")
        self.documents += 1

    def _some(self, size: int) -> Iterator[str]:
        while size > 0:
            text = next(self._texts)
            size -= len(text)
            yield text

    def _records(self, size: int) -> Iterator[dict[str, Any]]:
        for text in self._some(size):
            number, self.documents = self.documents, self.documents + 1
            yield {"text": f"document {number}\n{text}", "id": f"d{number}", "meta": {"n": number}}

    def _json_lines(self, size: int) -> Iterator[bytes]:
        for record in self._records(size):
            if record["meta"]["n"] % BAD_EVERY == 7:
                self.bad += 2
                yield b'{"text": "cut off\n{"no": "text"}\n'
            yield json.dumps(record).encode() + b"\n"

    def _lines(self, path: Path, size: int) -> Path:
        path = path.with_suffix(".jsonl")
        with path.open("wb") as stream:
            stream.writelines(self._json_lines(size))
        return path

    def _lines_gz(self, path: Path, size: int) -> Path:
        """C4, Dolma."""
        path = path.with_suffix(".json.gz")
        with gzip.open(path, "wb", 1) as stream:
            stream.writelines(self._json_lines(size))
        return path

    def _lines_zst(self, path: Path, size: int) -> Path:
        """SlimPajama, the Pile: several frames."""
        lines, path = self._json_lines(size), path.with_suffix(".jsonl.zst")
        with path.open("wb") as stream:
            while frame := b"".join(itertools.islice(lines, _FRAME_LINES)):
                stream.write(zstandard.compress(frame, 1))
        return path

    def _tables(self, size: int) -> Iterator[pa.Table]:
        records = self._records(size)
        while rows := list(itertools.islice(records, 200)):
            # A row without text.
            self.bad += 1
            yield pa.table(
                {
                    "text": [*(row["text"] for row in rows), None],
                    "id": [*(row["id"] for row in rows), "none"],
                }
            )

    def _parquet(self, path: Path, size: int) -> Path:
        """FineWeb, Wikipedia."""
        path = path.with_suffix(".parquet")
        with pq.ParquetWriter(path, _SCHEMA) as writer:
            for table in self._tables(size):
                writer.write_table(table)
        return path

    def _arrow(self, path: Path, size: int) -> Path:
        """Datasets saved to disk."""
        path = path.with_suffix(".arrow")
        with pa.ipc.new_stream(path, _SCHEMA) as writer:
            for table in self._tables(size):
                writer.write_table(table)
        return path


def encode(corpus: Path, tokenizer: Path, out: Path, *more: str) -> list[str]:
    return [
        *(str(ROOT / "tools" / "encode_latents.py"), "--variant", "tokens", "--patch-size", "4"),
        *("--block-size", "2048", "--tokenizer", str(tokenizer), "--corpus", str(corpus)),
        *("--out", str(out), "--on-bad-line", "skip", "--shard-mib", "2"),
        *more,
    ]


def first_token(corpus: Path, tokenizer: Path, out: Path) -> dict[str, Any]:
    """What worker 0 of 64 needs until its first block, when it has to make the manifest, and when
    another did."""
    found = {}
    for name in ("with_manifest", "joining"):
        command = encode(
            corpus, tokenizer, out, "--worker", f"0/{WORKERS}", "--parts", str(WORKERS)
        )
        started = [sys.executable, "-c", _FIRST_TOKEN, *command]
        done = subprocess.run(started, env=environment(), stdout=subprocess.PIPE, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def write(corpus: Path, tokenizer: Path, out: Path, workers: int, kill_after: int | None) -> int:
    """Run workers at once, and kill them when some shards are there; the largest memory in MiB."""
    running = []
    for number in range(workers):
        command = encode(
            corpus, tokenizer, out, "--worker", f"{number}/{workers}", "--parts", str(PARTS)
        )
        running.append(
            subprocess.Popen([sys.executable, *command], env=environment(), stdout=sys.stderr)
        )
    if kill_after is not None:
        deadline = time.monotonic() + 600
        while len(list(out.glob(".parts/[0-9]*/[0-9]*"))) < kill_after:
            assert time.monotonic() < deadline and any(one.poll() is None for one in running)
            time.sleep(0.05)
        for one in running:
            one.send_signal(signal.SIGKILL)
    largest = 0
    for one in running:
        _, status, used = os.wait4(one.pid, 0)
        one.returncode = status
        assert kill_after is not None or status == 0, status
        largest = max(largest, used.ru_maxrss >> 10)
    return largest


def contents(out: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in out.iterdir()
        if file.is_file()
    }


def numbered_documents(out: Path) -> Counter[int]:
    """How often a store has each document that begins with its number."""
    store, tokenizer = open_store(out), load_tokenizer(out / "tokenizer.json")
    found: Counter[int] = Counter()
    waiting = np.empty(0, np.int64)
    for index in range(len(store) + 1):
        # Documents and their numbers continue in the next block; behind the last one there is none.
        more = store[index]["tokens"] if index < len(store) else [tokenizer.begin_id] * _HEAD_TOKENS
        waiting = np.concatenate([waiting, more])
        begins = waiting == tokenizer.begin_id
        firsts = 1 + np.flatnonzero(begins[:-1] & ~begins[1:])
        for first in firsts[firsts <= len(waiting) - _HEAD_TOKENS]:
            text = tokenizer.decode(waiting[first : first + _HEAD_TOKENS].tolist())
            if match := re.match(r"document (\d+)\n", text):
                found[int(match[1])] += 1
        waiting = waiting[-_HEAD_TOKENS:]
    return found


def measure(directory: Path, mib: int, *, stores: bool = True) -> dict[str, Any]:
    """Everything; without ``stores`` only the time until a first token."""
    started = time.monotonic()
    made = Corpus(directory / "corpus", mib)
    texts = (found.text for found in standard_library_documents()[:300])
    tokenizer = train_tokenizer(texts, 4096, directory / "tokenizer.json").path
    inputs = (directory / "corpus", tokenizer)
    files = list((directory / "corpus").iterdir())
    result: dict[str, Any] = {
        "mib_of_text": mib,
        "files": len(files),
        "mib_on_disk": sum(file.stat().st_size for file in files) >> 20,
        "documents": made.documents,
        "bad": made.bad,
        "write_corpus_s": round(time.monotonic() - started, 1),
        "first_token": first_token(*inputs, directory / "first"),
    }
    if not stores:
        return result
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    rss = [write(*inputs, directory / "unbroken", 2, None)]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    result["encode_wall_s"] = round(time.monotonic() - started, 1)
    result["encode_cpu_s"] = round(
        used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime, 1
    )
    rss.append(write(*inputs, directory / "killed", 3, 2))
    rss.append(write(*inputs, directory / "killed", 2, None))
    result["largest_rss_mib"] = rss
    assert contents(directory / "killed") == contents(directory / "unbroken")
    report = json.loads((directory / "killed" / "report.json").read_text())
    result |= {key: report[key] for key in ("bytes", "tokens", "faults_by_reason")}
    found = numbered_documents(directory / "killed")
    assert found <= made.times, (found - made.times).most_common(9)
    # Those that begin in the end of a part, which fills no block: a number alone takes more tokens.
    result["in_dropped_ends"] = (made.times - found).total()
    assert result["in_dropped_ends"] <= report["tokens_dropped"] // 4 < PARTS * 2048 // 4, result
    assert report["documents"] == made.documents, (report["documents"], made.documents)
    assert report["faults"] == made.bad, (report["faults"], made.bad)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--mib", type=int, default=200, help="text of the corpus (default 200)")
    parser.add_argument("--first-token", action="store_true", help="measure this only")
    args = parser.parse_args()
    place = args.directory / f"scale_{args.mib}"
    try:
        print(json.dumps(measure(place, args.mib, stores=not args.first_token), indent=2))
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
