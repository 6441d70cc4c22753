"""The format of docs/howto/add_a_corpus_format.md, put into a copy of the package as it says."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from launches import ROOT, call

PAGE = ROOT / "docs" / "howto" / "add_a_corpus_format.md"
READ = """
import sys
from calm_dist.text import formats, units
# So that each of the files below is a large one.
units.CHUNK_BYTES = 4
formats.JSON_LINE_BYTES = 1 << 20
from calm_dist.text.corpus import ShuffledDocuments, iter_documents
print(formats.SUPPORTED)
for read in (iter_documents, lambda paths: ShuffledDocuments(paths, seed=0)):
    for document in sorted(read([sys.argv[1]]), key=lambda document: document.id):
        print(document.id, repr(document.text))
"""


def test_the_page_adds_a_format(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "calm_dist", tmp_path / "calm_dist")
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    page = PAGE.read_text(encoding="utf-8")
    (parser,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (entry,) = re.findall(r"`(\"\.md\": \w+)`", page)
    file = tmp_path / "calm_dist" / "text" / "formats.py"
    before, table, after = file.read_text(encoding="utf-8").partition("PARSERS: dict")
    head, brace, rest = after.partition("{\n")
    (whole,) = re.findall(r"`(WHOLE: .*?)`", page)
    rest, found = re.subn(r"^WHOLE: .*$", whole, rest, flags=re.MULTILINE)
    assert found == 1
    file.write_text(f"{before}{parser}\n\n{table}{head}{brace}    {entry},\n{rest}")

    corpus = tmp_path / "corpus"
    corpus.mkdir()
    text = b"---\ntitle: x\n---\n# Words\n"
    (corpus / "a.md").write_bytes(text)
    (corpus / "B.MD.gz").write_bytes(gzip.compress(text * 2))
    (corpus / "c.txt").write_text("plain\n")
    path = f"{tmp_path}:{ROOT}"
    out = call([sys.executable, "-c", READ, str(corpus)], cwd=tmp_path, PYTHONPATH=path).stdout
    supported, *documents = out.splitlines()
    assert ".md" in supported
    twice = "# Words\n" + text.decode()
    assert documents == 2 * [f"B.MD.gz {twice!r}", "a.md '# Words\\n'", "c.txt 'plain\\n'"]

    tool = [sys.executable, str(tmp_path / "tools" / "prepare_corpus.py")]
    given = ["--corpus", str(corpus), "--out", str(tmp_path / "out"), "--vocab-size", "270"]
    said = call([*tool, *given], PYTHONPATH=path).stderr
    assert "1 .md" in said and "1 .md.gz" in said and "1 .txt" in said
    splits = [
        json.loads(line)
        for name in ("train", "valid", "test")
        for line in (tmp_path / "out" / "corpus" / f"{name}.jsonl").read_text().splitlines()
    ]
    assert len(splits) == 3
    (corpus / "bad.md").write_bytes(b"\xff")
    refused = call([*tool, *given[:3], str(tmp_path / "other")], code=2, PYTHONPATH=path).stderr
    assert "bad.md: is not UTF-8 text (byte 0)" in refused

    long = tmp_path / "long.md"
    long.write_bytes(b"#" * ((1 << 20) + 1))
    done = subprocess.run(
        [sys.executable, "-c", READ, str(long)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 1
    assert "long.md: is longer than 1 MiB, the limit of a document" in done.stderr
