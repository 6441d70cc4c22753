"""Which torch tools/_venv.sh leaves in .venv, on a machine without a GPU and with a pip that only
notes what it is asked."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIP = """#!/bin/sh
echo "$@" >> {log}
exit {code}
"""


def checkout(tmp_path: Path, torch_version: str, *, pip_code: int = 0) -> Path:
    """A checkout with a .venv made by hand."""
    root = tmp_path / "checkout"
    (root / "tools").mkdir(parents=True)
    for name in ("setup.py", "constraints.txt", "tools/_venv.sh"):
        shutil.copy(ROOT / name, root / name)
    venv = root / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    described = packages / f"torch-{torch_version}.dist-info" / "METADATA"
    described.parent.mkdir()
    described.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {torch_version}\n")
    pip = venv / "bin" / "pip"
    pip.write_text(PIP.format(log=tmp_path / "pip.log", code=pip_code))
    pip.chmod(0o755)
    return root


def ensure_venv(root: Path) -> subprocess.CompletedProcess[str]:
    script = f"set -euo pipefail; . {root}/tools/_venv.sh; has_gpu && exit 77; ensure_venv"
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True)


@pytest.fixture(autouse=True)
def no_gpu() -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine may have a GPU")


def test_a_cuda_build_is_kept(tmp_path: Path) -> None:
    root = checkout(tmp_path, "2.11.0+cu130")
    done = ensure_venv(root)
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "pip.log").read_text()
    assert "[dev]" in asked and "torch" not in asked.replace("constraints.txt", "")
    # Nothing is left to do at the next start.
    assert ensure_venv(root).stdout == ""


def test_a_cuda_build_is_kept_when_pip_fails(tmp_path: Path) -> None:
    root = checkout(tmp_path, "2.11.0+cu130", pip_code=1)
    (root / ".venv" / "calm_dist.state").write_text("made from other requirements\n")
    packages = next((root / ".venv").glob("lib/python*/site-packages"))
    for _ in range(2):
        done = ensure_venv(root)
        assert done.returncode != 0 and "pip could not install calm_dist" in done.stderr
        assert any(packages.glob("torch-2.11.0+cu130*")), "removed under the jobs that use it"


def test_a_cpu_build_is_asked_for_otherwise(tmp_path: Path) -> None:
    root = checkout(tmp_path, "2.13.0+cpu")
    ensure_venv(root)
    version = next(
        line.removeprefix("torch==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.startswith("torch==")
    )
    assert f"torch=={version}+cpu" in (tmp_path / "pip.log").read_text()
