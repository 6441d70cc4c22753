"""What is seen of operations on fake tensors of a GPU; forward passes need no CUDA build."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from calm_dist.rehearsal.accounting import KernelOrigin
from calm_dist.rehearsal.observer import Observer
from calm_dist.rehearsal.places import relative

KB = 1 << 10


@pytest.fixture
def observer() -> Iterator[Observer]:
    observer = Observer(lambda group: group.group_name)
    with FakeTensorMode(), observer:
        yield observer


def in_file(path: str, body: str, **names: Any) -> Callable[[], Any]:
    """A function whose body seems to stand in a file."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    code = compile(f"def function():\n{lines}\n", f"/anywhere/{path}", "exec")
    namespace: dict[str, Any] = {"torch": torch, **names}
    exec(code, namespace)
    return namespace["function"]


def test_memory_is_that_of_storages(observer: Observer) -> None:
    memory = observer.memory
    x = torch.empty(256, 4, device="cuda")
    view = x.t()
    assert memory.now == 4 * KB
    y = x + 1
    assert memory.now == 8 * KB
    x.add_(1)
    host = torch.empty(1000)
    assert memory.now == 8 * KB
    del x
    # The view keeps the storage.
    assert memory.now == 8 * KB
    del view
    assert memory.now == 4 * KB
    assert memory.peak == 8 * KB
    del y, host
    assert memory.now == 0


def test_kernels_are_counted_by_part(observer: Observer) -> None:
    x = torch.empty(8, 8, device="cuda")
    observer.restart()
    in_file("calm_dist/models/heads/energy.py", "y = x @ x\ny.t().add_(1)", x=x)()
    in_file("calm_dist/losses/energy.py", "x.relu()", x=x)()
    # Who calls a library decides.
    library = in_file("site-packages/anything.py", "x.relu()", x=x)
    in_file("calm_dist/models/backbone.py", "library()", library=library)()
    # Not on the device.
    in_file("calm_dist/models/backbone.py", "torch.ones(3) + 1")()
    assert observer.restart().kernels == {
        KernelOrigin("head"): 2,
        KernelOrigin("energy score"): 1,
        KernelOrigin("backbone"): 1,
    }


def test_the_optimizers_part_of_deepspeed(observer: Observer) -> None:
    x = torch.empty(8, device="cuda")
    observer.restart()
    update = in_file("site-packages/deepspeed/runtime/zero.py", "x.mul_(2)", x=x)
    in_file("calm_dist/training/optimizer.py", "update()", update=update)()
    in_file("calm_dist/parallel/pipeline.py", "update()", update=update)()
    assert observer.restart().kernels == {
        KernelOrigin("optimizer"): 1,
        KernelOrigin("head's ZeRO engine"): 1,
    }


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("x.sum().item()", ["a number is read"]),
        ("bool(x.any())", ["a number is read"]),
        ("x.cpu()", ["copy to the host"]),
        ("x.to('cpu', non_blocking=True)", []),
        ("torch.empty(4).copy_(x, non_blocking=True)", ["copy to the host"]),
        ("torch.empty(4).pin_memory().copy_(x, non_blocking=True)", []),
        ("aten.copy_(x, torch.empty(4))", ["copy to the device"]),
        ("aten.copy_(x, torch.empty(4), True)", ["copy to the device"]),
        ("aten.copy_(x, torch.empty(4).pin_memory(), True)", []),
        ("aten._to_copy(torch.empty(4), device='cuda', non_blocking=True)", ["copy to the device"]),
        ("aten._to_copy(torch.empty(4).pin_memory(), device='cuda')", ["copy to the device"]),
        ("aten._to_copy(torch.empty(4).pin_memory(), device='cuda', non_blocking=True)", []),
        ("aten._to_copy(torch.empty(4).pin_memory()[1:], device='cuda', non_blocking=True)", []),
        (
            "y = torch.empty(4); y.pin_memory(); aten.copy_(x, y, True)",
            ["copy to the device"],
        ),
        (
            "aten.copy_(x, x.to('cpu', non_blocking=True), True)",
            [],
        ),
        ("torch.tensor([1.0, 2.0], device='cuda')", ["copy to the device"]),
        ("x.to(torch.float64)", []),
        ("torch.ones(4).sum().item()", []),
    ],
)
def test_waits_have_their_line(observer: Observer, body: str, what: list[str]) -> None:
    x = torch.empty(4, device="cuda")
    observer.restart()
    # torch's own operations: those of a CPU build refuse a GPU as the target of a copy.
    in_file("calm_dist/training/optimizer.py", body, x=x, aten=torch.ops.aten)()
    waits = observer.restart().waits
    assert [wait.what for wait in waits] == what
    assert {wait.where for wait in waits} <= {"calm_dist/training/optimizer.py:2"}


def test_a_library_is_named_with_its_caller(observer: Observer) -> None:
    x = torch.empty(4, device="cuda")
    observer.restart()
    library = in_file("site-packages/megatron/core/utils.py", "x.cpu()", x=x)
    in_file("calm_dist/training/optimizer.py", "\n\nlibrary()", library=library)()
    (wait,) = observer.restart().waits
    assert wait.where == "megatron/core/utils.py:2 < calm_dist/training/optimizer.py:4"


def test_a_device_mismatch_is_an_error(observer: Observer) -> None:
    with pytest.raises(RuntimeError, match="device"):
        torch.empty(4, device="cuda") + torch.empty(4)


def test_only_tensors_on_the_host_are_pinned(observer: Observer) -> None:
    assert torch.empty(4).pin_memory().device.type == "cpu"
    with pytest.raises(RuntimeError, match="pinned"):
        torch.empty(4, device="cuda").pin_memory()


def test_no_room_for_normal_runs_imports_the_rehearsal() -> None:
    """A normal run has nothing of it."""
    package = Path(__file__).parents[2] / "calm_dist"
    users = {
        file.relative_to(package).parts[0]
        for file in package.rglob("*.py")
        if "calm_dist.rehearsal" in file.read_text(encoding="utf-8")
    }
    assert users == {"rehearsal", "gpu_check"}


def test_a_checkout_called_as_the_package() -> None:
    """It holds a virtual environment, whose files are not ours."""
    installed = "/home/me/calm_dist/.venv/lib/python3.11/site-packages"
    assert relative(f"{installed}/torch/_dynamo/eval_frame.py") is None
    assert relative(f"{installed}/megatron/core/utils.py") == "megatron/core/utils.py"
    assert relative("/usr/lib/python3.12/dist-packages/calm_dist/log.py") == "calm_dist/log.py"
    assert relative("/home/me/calm_dist/calm_dist/log.py") == "calm_dist/log.py"
