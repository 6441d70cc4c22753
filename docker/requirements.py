"""Requirements and constraints for an image that has its own torch; see the Dockerfile.

pip install --no-deps -c constraints.txt mosaicml-streaming -e .
python docker/requirements.py > requirements.txt
python docker/requirements.py --constraints > image_constraints.txt
pip install -c image_constraints.txt -r requirements.txt
python docker/requirements.py --check image_constraints.txt
"""

from __future__ import annotations

import argparse
import re
import sys
from importlib import metadata
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
# Built for each other and for the image's CUDA. torchvision is needed by Streaming's image formats
# only, which are not used.
KEPT = ("torch", "torchvision", "numpy", "triton", "flash-attn")
INSTALLED = ("calm-dist", "mosaicml-streaming")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--constraints", action="store_true", help="print constraints instead")
    parser.add_argument("--check", metavar="F", help="check that the kept packages are as in F")
    arguments = parser.parse_args()
    if arguments.check:
        check(Path(arguments.check))
        return
    print("\n".join(constraints() if arguments.constraints else requirements()))


def name_of(requirement: str) -> str:
    """The normalised name of a requirement or constraint."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    return re.sub(r"[-_.]+", "-", match[0]).lower() if match else ""


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def requirements() -> list[str]:
    """What `INSTALLED` require, without extras and without `KEPT`."""
    asked = [text for package in INSTALLED for text in metadata.requires(package) or ()]
    plain = {text for text in asked if not re.search(r";.*\bextra\b", text)}
    return sorted(text for text in plain if name_of(text) not in (*KEPT, *INSTALLED))


def constraints() -> list[str]:
    """The versions of constraints.txt, but those of this environment for `KEPT`.

    What torch itself requires is left free: torch 2.11 refuses the setuptools of constraints.txt.
    """
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    ours = [line for line in lines if line and not line.startswith("#")]
    here = [f"{package}=={version}" for package in KEPT if (version := version_of(package))]
    free = {name_of(text) for text in metadata.requires("torch") or ()}
    return [line for line in ours if name_of(line) not in {*KEPT, *free}] + here


def check(file: Path) -> None:
    """End with an error if the installation has replaced one of `KEPT`."""
    lines = file.read_text(encoding="utf-8").splitlines()
    before = {name_of(line): line for line in lines if name_of(line) in KEPT}
    now = {package: version_of(package) for package in KEPT}
    changed = [
        f"{before.get(package, f'no {package}')} -> {version}"
        for package, version in now.items()
        if before.get(package) != (version and f"{package}=={version}")
    ]
    if changed:
        sys.exit(f"error: the installation changed the image: {', '.join(changed)}")


if __name__ == "__main__":
    main()
