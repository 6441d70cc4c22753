"""Processes for which `flock` is not implemented, as on some network file systems."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

# The system call fails as the kernel lets it fail, for all that the process runs.
SHIM = """
#include <errno.h>
#include <stdlib.h>
int flock(int descriptor, int operation) { errno = atoi(getenv("NO_FLOCK_ERRNO")); return -1; }
"""
# Without a compiler: Python's own call fails, which is all that Python code sees.
PATCH = """
import fcntl, os
def flock(descriptor, operation):
    number = int(os.environ["NO_FLOCK_ERRNO"])
    raise OSError(number, os.strerror(number))
fcntl.flock = flock
"""


@pytest.fixture(scope="session")
def without_flock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of processes for which `flock` is not implemented."""
    root = tmp_path_factory.mktemp("shim")
    environment = {**os.environ, "NO_FLOCK_ERRNO": "38"}
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        (root / "sitecustomize.py").write_text(PATCH)
        environment["PYTHONPATH"] = f"{root}:{os.environ.get('PYTHONPATH', '')}"
        return environment
    (root / "shim.c").write_text(SHIM)
    command = [compiler, "-shared", "-fPIC", "-o", str(root / "shim.so"), str(root / "shim.c")]
    subprocess.run(command, check=True)
    return {**environment, "LD_PRELOAD": str(root / "shim.so")}
