"""Imports go one way, and what a login node needs is importable without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "calm_dist"

# A room imports from itself and from the rooms before it. One module alone, such as ``errors``, is
# in the room of that name at the top of the list.
BASE = (
    *("errors", "redact", "log", "files", "pickles", "progress", "randomness", "registry"),
    *("schema", "scores"),
)
ROOMS = (
    *("compat", "heads", "optimizers", "recipe", "costs", "flops", "planner", "runs", "losses"),
    *(
        "models",
        "text",
        "data",
        "released",
        "parallel",
        "training",
        "inference",
        "interop",
        "evaluation",
        "reports",
    ),
    *("benchmark", "rehearsal", "study", "cli", "gpu_check"),
)
# Plans and reports are made of recipes and metrics, where no training library need be.
PLAIN = {*BASE, "heads", "optimizers", "recipe", "costs", "planner"}
ONLY = {"planner": PLAIN, "reports": PLAIN | {"runs", "reports"}}
# Models get their process groups handed in.
NOT_IN_MODELS = ("torch.distributed", "deepspeed", "megatron.core.parallel_state")
# The package index's torchvision does not load beside CPU torch.
NOWHERE = ("torchvision", "tools")

WITHOUT_TORCH = (
    "calm_dist",
    "calm_dist.cli.console",
    "calm_dist.recipe",
    "calm_dist.costs.flops",
    "calm_dist.planner.full_plan",
    "calm_dist.planner.scaling",
    "calm_dist.planner.dry_run",
    "calm_dist.gpu_check.goals",
    "calm_dist.gpu_check.page",
    "calm_dist.gpu_check.runner",
    "calm_dist.rehearsal.rehearse",
    "calm_dist.rehearsal.terminal",
    "calm_dist.reports.report",
    "calm_dist.runs.listing",
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


def room_of(module: str) -> str:
    """The room of a module such as ``calm_dist.recipe.checks``."""
    return module.split(".")[1]


def allowed_rooms(room: str) -> set[str]:
    if room in ONLY:
        return ONLY[room]
    if room in BASE:
        return set(BASE)
    return {*BASE, *ROOMS[: ROOMS.index(room) + 1]}


FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_one_way(file: Path) -> None:
    room = room_of("calm_dist." + file.relative_to(PACKAGE).parts[0].removesuffix(".py"))
    imported = set(imported_modules(file))
    own = {name for name in imported if name.startswith("calm_dist.")} - {"calm_dist.__version__"}
    wrong = {name for name in own if room_of(name) not in allowed_rooms(room)}
    assert not wrong, f"{room} may import {sorted(allowed_rooms(room))} only"

    forbidden = NOWHERE + (NOT_IN_MODELS if room == "models" else ())
    assert not [
        name for name in imported if f"{name}.".startswith(tuple(f"{f}." for f in forbidden))
    ]


def test_every_room_has_a_place() -> None:
    rooms = {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in FILES}
    assert rooms == {*BASE, *ROOMS}


def test_public_classes_have_names_of_their_own() -> None:
    """Two things with one name are told apart by nothing but an import at the top of a file."""
    homes: dict[str, list[str]] = {}
    for file in FILES:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(str(file.relative_to(PACKAGE)))
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}


def test_no_circles_between_modules() -> None:
    """Neither at run time nor for types; a package stands for what its ``__init__`` imports."""
    names = {
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for file in FILES
    }
    edges = {}
    for file in FILES:
        name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
        found = (imported if imported in names else imported.rpartition(".")[0]
                 for imported in imported_modules(file))  # fmt: skip
        edges[name.removesuffix(".__init__")] = {other for other in found if other in names}
    # Whatever imports nothing that is left goes, until nothing can go.
    while leaves := {name for name, found in edges.items() if not found & edges.keys() - {name}}:
        edges = {name: found for name, found in edges.items() if name not in leaves}
    assert not edges


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_imports_without_torch(module: str) -> None:
    """In a fresh interpreter; the test's own process has torch loaded by other tests."""
    code = f"import sys, {module}; print(*(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == ""


def test_an_autoencoder_needs_no_training_framework() -> None:
    """Its training and encoding load torch and Streaming alone; there may be many workers."""
    modules = (
        "calm_dist.training.autoencoder, calm_dist.data.latents, calm_dist.interop.huggingface"
    )
    others = ("megatron", "deepspeed", "wandb", "torch._inductor.compile_fx")
    code = f"import sys, {modules}; print(*(m for m in {others!r} if m in sys.modules))"
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
