"""A corpus is split by any number of processes into the same files, and by none that was killed."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calm_dist.errors import DataError, UnreachableError
from calm_dist.text import units
from calm_dist.text.formats import Reading
from calm_dist.text.prepare import prepare_corpus
from calm_dist.text.splitting import in_processes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of several kinds with bad lines and repetitions, of about 40 units of 16 kB."""
    root = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": f"line {i % 900} " * 20}) for i in range(1000)]
    lines[100] = lines[777] = "{not json"
    (root / "a.jsonl").write_text("\n".join(lines) + "\n")
    with gzip.open(root / "b.jsonl.gz", "wt") as stream:
        stream.write("\n".join(json.dumps({"text": f"b {i} " * 9, "id": i}) for i in range(99)))
    texts = [f"row {i} " * 20 for i in range(1000)]
    pq.write_table(pa.table({"text": texts}), root / "c.parquet", row_group_size=100)
    for i in range(30):
        (root / f"d{i:02}.txt").write_text(f"a small text, number {i}\n" * 40)
    return root


def contents(out: Path) -> dict[str, bytes]:
    files = (file for file in out.rglob("*") if file.is_file())
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def test_any_number_of_processes_writes_the_same_files(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "CHUNK_BYTES", 16 << 10)
    written = []
    for processes in (1, 3):
        out = tmp_path / str(processes)
        options: dict[str, Any] = {
            "vocab_size": 280,
            "reading": Reading(dedup=True),
            "processes": processes,
        }
        with pytest.raises(DataError, match=r"a.jsonl:101: is not a line of JSON"):
            prepare_corpus(out, [corpus], **options)
        assert not list(out.rglob("*.jsonl"))
        assert prepare_corpus(out, [corpus], **options, skip_faults=True)
        written.append(contents(out))
        assert not prepare_corpus(out, [corpus], **options, skip_faults=True)
    assert written[0] == written[1]
    report = json.loads(written[0]["corpus/report.json"])
    assert report["faults"] == 2 and report["duplicates"] == 100
    assert [fault["line"] for fault in report["first_faults"]] == [101, 778]
    ids = [
        json.loads(line)["id"]
        for split in ("train", "valid", "test")
        for line in written[0][f"corpus/{split}.jsonl"].splitlines()
    ]
    assert len(set(ids)) == len(ids) == report["documents"] == 898 + 99 + 1000 + 30


def kill_own_process(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_process_is_an_error() -> None:
    with pytest.raises(UnreachableError, match=r"was killed.*--processes"):
        list(in_processes(kill_own_process, range(9), 2))


def test_processes_end_with_their_parent(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import os, sys, time\n"
        "from calm_dist.text.splitting import in_processes\n"
        "def job(number):\n"
        "    open(f'{sys.argv[1]}/{os.getpid()}', 'w').close()\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    list(in_processes(job, range(4), 2))\n"
    )
    (tmp_path / "started").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, script, tmp_path / "started"], env=environment)

    def wait_until(count: int) -> list[int]:
        deadline = time.monotonic() + 120
        while True:
            running = [int(name) for name in os.listdir(tmp_path / "started")]
            running = [pid for pid in running if Path(f"/proc/{pid}/root").exists()]
            if len(running) == count:
                return running
            assert time.monotonic() < deadline, running
            time.sleep(0.1)

    wait_until(2)
    parent.kill()
    parent.wait()
    wait_until(0)
