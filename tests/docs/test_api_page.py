"""Every snippet of docs/api.md runs, in order, on a real run, store and released checkpoint."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from launches import ALONE, ROOT, TIMEOUT_SECONDS, environment, recipe

PAGE = ROOT / "docs" / "api.md"


def test_snippets_run(tmp_path: Path, tiny: Callable[..., list[str]], store: Path) -> None:
    overrides = tiny(tmp_path / "runs" / "calm", "calm", training__steps=2, **ALONE)
    call([sys.executable, str(ROOT / "tools" / "train.py"), recipe("calm"), *overrides], tmp_path)
    (tmp_path / "data" / "latents").mkdir(parents=True)
    (tmp_path / "data" / "latents" / "test").symlink_to(store)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    shutil.copytree(ROOT / "tests" / "golden" / "calm_k4", tmp_path / "released")
    shutil.copytree(ROOT / "tests" / "golden" / "ae_k4", tmp_path / "ae_k4")
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) >= 7
    script = tmp_path / "snippets.py"
    script.write_text("\n".join(snippets), encoding="utf-8")
    printed = call([sys.executable, str(script)], tmp_path)
    assert "371,731,584 parameters" in printed


def call(command: list[str], directory: Path) -> str:
    done = subprocess.run(
        command,
        cwd=directory,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout
