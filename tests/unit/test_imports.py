"""Imports go one way, and what a login node needs is importable without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "calm_dist"

# A part imports from its own group and from the groups before it.
LAYERS = (
    {"errors"},
    {"redact", "compat"},
    {"cli", "files", "pickles", "randomness", "scores"},
    {"recipe", "heads"},
    {"flops", "stages"},
    {"data", "models", "losses", "interop"},
    {"parallel"},
    {"training"},
    {"evaluation"},
    {"planner"},
    {"reports"},
    {"benchmark"},
    {"command", "preflight", "run_list"},
)
# What these need lies above their part: whole models, of which the data knows only autoencoders.
# The first imports it when it is called.
HIGHER = {"interop/huggingface.py": "evaluation", "interop/convert.py": "evaluation"}
# Plans and reports are made of recipes and metrics, where no training library need be.
PLAIN = {
    *("errors", "redact", "cli", "files", "scores", "heads", "recipe", "flops", "stages", "planner")
}
ONLY = {"planner": PLAIN, "reports": PLAIN | {"reports"}}
# Models get their process groups handed in.
NOT_IN_MODELS = ("torch.distributed", "deepspeed", "megatron.core.parallel_state")
# The package index's torchvision does not load beside CPU torch.
NOWHERE = ("torchvision", "tools")

WITHOUT_TORCH = (
    "calm_dist",
    "calm_dist.cli",
    "calm_dist.recipe",
    "calm_dist.flops",
    "calm_dist.planner.report",
    "calm_dist.planner.scaling",
    "calm_dist.reports.plan",
    "calm_dist.reports.report",
    "calm_dist.run_list",
    "calm_dist.scores",
)
HEAVY = ("torch", "megatron", "deepspeed", "streaming")


def imported_modules(file: Path) -> Iterator[str]:
    """Absolute names of all that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            # `from a import b`: b may be a module or a name in one.
            yield from (f"{node.module}.{name.name}" for name in node.names)


def part_of(module: str) -> str:
    """The part of the package that a module name such as ``calm_dist.recipe_checks.x`` is in."""
    name = module.split(".")[1]
    return "recipe" if name.startswith("recipe_") else name


def allowed_parts(part: str) -> set[str]:
    if part in ONLY:
        return ONLY[part]
    position = next(i for i, layer in enumerate(LAYERS) if part in layer)
    return set().union(*LAYERS[: position + 1])


FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_one_way(file: Path) -> None:
    place = file.relative_to(PACKAGE)
    part = part_of("calm_dist." + place.parts[0].removesuffix(".py"))
    part = HIGHER.get(place.as_posix(), part)
    imported = set(imported_modules(file))
    own = {name for name in imported if name.startswith("calm_dist.")} - {"calm_dist.__version__"}
    wrong = {name for name in own if part_of(name) not in allowed_parts(part)}
    assert not wrong, f"{part} may import {sorted(allowed_parts(part))} only"

    forbidden = NOWHERE + (NOT_IN_MODELS if part == "models" else ())
    assert not [
        name for name in imported if f"{name}.".startswith(tuple(f"{f}." for f in forbidden))
    ]


def test_every_part_has_a_place() -> None:
    parts = {part_of("calm_dist." + file.relative_to(PACKAGE).parts[0].removesuffix(".py"))
             for file in FILES}  # fmt: skip
    assert parts == set().union(*LAYERS)


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_imports_without_torch(module: str) -> None:
    """In a fresh interpreter; the test's own process has torch loaded by other tests."""
    code = f"import sys, {module}; print(*(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("tool", sorted(PACKAGE.parent.glob("tools/*.py")), ids=lambda t: t.name)
def test_tools_explain_themselves(tool: Path) -> None:
    """``--help`` names what the tool does, with an example, and loads nothing that takes
    seconds."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{tool.name!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(tool)!r}, run_name='__main__')\n"
        "finally:\n"
        f"    print(*(m for m in {HEAVY!r} if m in sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == ""
    summary = ast.get_docstring(ast.parse(tool.read_text(encoding="utf-8")))
    assert summary is not None
    # argparse wraps lines, so only the first words are looked for.
    assert " ".join(summary.split()[:4]) in " ".join(done.stdout.split())
    assert f"tools/{tool.name} " in done.stdout.split("\n\n", 1)[1], "no example"
    assert max(map(len, done.stdout.splitlines())) <= 100
