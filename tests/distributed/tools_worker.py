"""Runs tools one after the other in the ranks of one launch (imports cost most of it).

Usage: tools_worker.py JOBS.json, a list of {"tool": path, "arguments": [...]}.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        sys.argv = [job["tool"], *job["arguments"]]
        try:
            runpy.run_path(job["tool"], run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                raise
