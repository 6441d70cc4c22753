"""What `tools/preflight.py` finds on a node, beyond what tests/slurm shows in jobs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from calm_dist.errors import LaunchError
from calm_dist.training.preflight import check_compiler


def test_compiler_of_this_machine_works() -> None:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    assert check_compiler() in (f"compiler {shutil.which(name)}" for name in ("gcc", "clang"))


def test_headers_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"has no Python\.h.*install the headers of Python 3\.1"):
        check_compiler(str(tmp_path))


def test_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'fatal error: cannot execute cc1' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(LaunchError, match=r"compiles nothing .*cc1.*set CC to another compiler"):
        check_compiler()


def test_result_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is no library, as a file system mounted with noexec leaves none that loads."""
    strange = tmp_path / "cc"
    strange.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho text >"$2"\n')
    strange.chmod(0o755)
    monkeypatch.setenv("CC", str(strange))
    with pytest.raises(LaunchError, match=r"cannot be loaded.*TRITON_CACHE_DIR"):
        check_compiler()


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match=r"no C compiler \(gcc, clang\)"):
        check_compiler()
    monkeypatch.setenv("CC", "icc")
    with pytest.raises(LaunchError, match=r"no C compiler \(icc\)"):
        check_compiler()
