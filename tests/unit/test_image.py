"""The Dockerfile as far as it can be checked without an image: its commands, and that what they
install leaves the image's torch alone."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from launches import ROOT

SCRIPT = ROOT / "docker" / "requirements.py"
KEPT = {"torch", "torchvision", "numpy", "triton", "flash-attn"}


def commands() -> list[str]:
    """Every command of the Dockerfile's RUN lines."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    runs = re.findall(r"^RUN (.*)$", text, re.MULTILINE)
    return [command.strip() for line in runs for command in line.split("&&")]


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_every_command_is_one_that_its_program_takes() -> None:
    from pip._internal.commands import create_command

    installs = 0
    for command in commands():
        words = shlex.split(re.sub(r">.*", "", command))
        assert words[0] in ("pip", "python")
        if words[0] == "python":
            assert (ROOT / words[1]).is_file(), command
            continue
        options, arguments = create_command(words[1]).parse_args(words[2:])
        installs += 1
        # Nothing may ask for the newest torch, or for one of ours.
        assert options.ignore_dependencies or "/tmp/constraints.txt" in options.constraints
        assert not {"torch", "numpy"} & set(arguments)
    assert installs == 2


def test_what_is_copied_and_named_exists() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^FROM \$\{IMAGE\}$", text, re.MULTILINE)
    assert re.search(r"^ARG IMAGE=\S+/pytorch:\d+\.\d+-py3$", text, re.MULTILINE)
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    for needed in ("constraints.txt", "setup.py", "pyproject.toml", "docker", "recipes", "tools"):
        assert (ROOT / needed).exists() and needed not in ignored


def test_constraints_keep_the_images_torch() -> None:
    from packaging.requirements import Requirement

    lines = [Requirement(line) for line in script("--constraints").stdout.splitlines()]
    found = {line.name.lower().replace("_", "-"): str(line.specifier) for line in lines}
    assert found["torch"] == f"=={metadata.version('torch')}"
    assert found["numpy"] == f"=={metadata.version('numpy')}"
    # The build +cpu or +cu130 of this environment, not what constraints.txt asks for.
    ours = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    missing = {line for line in ours if re.match(r"[A-Za-z]", line)} - {str(line) for line in lines}
    of_torch = {re.split(r"[^\w.-]", text)[0] for text in metadata.requires("torch") or ()}
    free = {name.lower().replace("_", "-") for name in of_torch}
    left_out = {line.split("==")[0].lower().replace("_", "-") for line in missing}
    assert left_out <= KEPT | free


def test_requirements_are_those_of_the_package_and_of_streaming() -> None:
    from packaging.requirements import Requirement

    lines = [Requirement(line) for line in script().stdout.splitlines()]
    names = {line.name.lower().replace("_", "-") for line in lines}
    assert not names & (KEPT | {"mosaicml-streaming", "pytest"})
    asked = re.search(
        r"install_requires=\[(.*?)\n    \]", (ROOT / "setup.py").read_text(), re.DOTALL
    )
    assert asked is not None
    own = {re.split(r"[<>=]", text)[0] for text in re.findall(r'"([^"]+)"', asked[1])}
    assert own - KEPT - {"mosaicml-streaming"} <= names
    assert {"boto3", "xxhash"} <= names


def test_changed_torch_is_found(tmp_path: Path) -> None:
    file = tmp_path / "constraints.txt"
    file.write_text(script("--constraints").stdout)
    assert script("--check", str(file)).returncode == 0
    changed = re.sub(r"^torch==.*$", "torch==2.11.0a0+image", file.read_text(), flags=re.MULTILINE)
    file.write_text(changed)
    done = script("--check", str(file))
    assert done.returncode == 1 and "torch==2.11.0a0+image -> 2" in done.stderr


@pytest.mark.parametrize(
    ("text", "name"),
    [("Flash_Attn==2.8", "flash-attn"), ("torch>=2.6", "torch"), ("a.b-C [x]>=1; y", "a-b-c")],
)
def test_names(text: str, name: str) -> None:
    module: dict[str, Any] = runpy.run_path(str(SCRIPT))
    assert module["name_of"](text) == name
