"""Every snippet of docs/api.md runs, in order, on a real run, store and released checkpoint."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from launches import ALONE, ROOT, call, recipe

PAGE = ROOT / "docs" / "api.md"


def test_snippets_run(tmp_path: Path, tiny: Callable[..., list[str]], store: Path) -> None:
    overrides = tiny(tmp_path / "runs" / "calm", "calm", training__steps=2, **ALONE)
    call([sys.executable, str(ROOT / "tools" / "train.py"), recipe("calm"), *overrides])
    (tmp_path / "data" / "latents").mkdir(parents=True)
    (tmp_path / "data" / "latents" / "test").symlink_to(store)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    shutil.copytree(ROOT / "tests" / "golden" / "calm_k4", tmp_path / "released")
    shutil.copytree(ROOT / "tests" / "golden" / "ae_k4", tmp_path / "ae_k4")
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) >= 7
    script = tmp_path / "snippets.py"
    script.write_text("\n".join(snippets), encoding="utf-8")
    printed = call([sys.executable, str(script)], cwd=tmp_path).stdout
    assert "371,731,584 parameters" in printed
