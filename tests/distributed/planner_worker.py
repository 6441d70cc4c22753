"""Bytes and seconds of real training steps, to compare with what the planner predicts.

Usage: planner_worker.py JOBS.json, a list of {"recipe": path, "overrides": [...], "out": path} and
optionally "traffic": count the bytes of element-wise operators, and "steps": how many to time, the
machine's rates measured before each. Every rank measures itself; rank 0 writes a list of them.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from world import joined_world

from calm_dist.cli.console import run

# Operators that move no bytes, those whose bytes the planner leaves to the matrix products, and
# collectives.
NO_TRAFFIC = (
    "view", "reshape", "transpose", "permute", "aten.t.", "slice", "select", "split", "chunk",
    "squeeze", "expand", "alias", "detach", "as_strided", "unbind", "narrow", "empty", "_local_",
    "is_", "set_", "resize", "mm.", "bmm", "scaled_dot", "c10d",
)  # fmt: skip


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with joined_world() as (world, device):
        for job in jobs:
            found = measure(job, world, device)
            gathered: list[Any] = [None] * world.size
            dist.all_gather_object(gathered, found)
            if world.rank == 0:
                Path(job["out"]).write_text(json.dumps(gathered), encoding="utf-8")
            gc.collect()


def measure(job: dict[str, Any], world: Any, device: Any) -> dict[str, Any]:
    """Some steps of a training on this rank."""
    from calm_dist.parallel.topology import build_topology, destroy_topology
    from calm_dist.recipe import LanguageModelRecipe, load_recipe
    from calm_dist.training.language_model import Trainer
    from calm_dist.training.resolve import resolve

    recipe = resolve(load_recipe(job["recipe"], job["overrides"]).with_world_size(world.size))
    assert isinstance(recipe, LanguageModelRecipe)
    Path(recipe.run.dir).mkdir(parents=True, exist_ok=True)
    topology = build_topology(recipe, device)
    gc.collect()
    before = live_bytes()
    trainer = Trainer(recipe, topology)
    trainer._batches.read()
    # Adam's moments come with the first step.
    step(trainer)
    gc.collect()
    found: dict[str, Any] = {"kept": live_bytes() - before}
    if job.get("traffic"):
        with Traffic() as traffic:
            step(trainer)
        found["traffic"] = traffic.size
    else:
        found["saved"] = saved_for_backward(trainer)
        found["step"] = allocated_in_step(trainer)
    found |= timed_steps(trainer, device, job.get("steps", 0))
    if trainer.parts.head is not None:
        trainer.parts.head.close()
    destroy_topology(topology)
    return found


def step(trainer: Any) -> None:
    trainer.train_step(trainer._batches.take())
    trainer.progress.step += 1


def live_bytes() -> int:
    """Of all tensors that Python knows."""
    sizes = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type != "meta":
            storage = thing.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def saved_for_backward(trainer: Any) -> int:
    """The most bytes that autograd keeps at a time in a step, weights not counted."""
    modules = list(trainer.parts.chunks)
    if trainer.parts.head is not None:
        modules.append(trainer.parts.head.module)
    weights = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
    users: dict[int, int] = {}
    now = most = 0

    class Kept:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal now, most
            self.tensor = tensor
            storage = tensor.untyped_storage()
            self.key = storage.data_ptr()
            self.size = 0 if self.key in weights else storage.nbytes()
            users[self.key] = users.get(self.key, 0) + 1
            if users[self.key] == 1:
                now += self.size
                most = max(most, now)

        def __del__(self) -> None:
            nonlocal now
            users[self.key] -= 1
            if users[self.key] == 0:
                now -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        step(trainer)
    return most


def allocated_in_step(trainer: Any) -> int:
    """The most bytes that torch holds beyond those that it held when a step began."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step(trainer)
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


class Traffic(TorchDispatchMode):
    """Counts what element-wise operators read and write."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not any(name in str(func) for name in NO_TRAFFIC):
            tensors = (t for t in tree_iter((args, kwargs, output)) if isinstance(t, torch.Tensor))
            self.size += sum(t.numel() * t.element_size() for t in tensors)
            if "_fused_adamw_" in str(func):
                # It returns nothing of what it writes: weights and both moments.
                written = (t for group in (args[0], args[2], args[3]) for t in group)
                self.size += sum(t.numel() * t.element_size() for t in written)
        return output


def timed_steps(trainer: Any, device: Any, number: int) -> dict[str, list[Any]]:
    """Seconds of some steps, and the rates of this process just before each."""
    from calm_dist.planner.local import measure_links, measure_rates

    seconds, rates = [], []
    for _ in range(number):
        dist.barrier()
        measured = asdict(measure_rates(device))
        measured["link"], measured["latency"] = measure_links(device)
        dist.barrier()
        rates.append(measured)
        seconds.append(timed(lambda: step(trainer)))
    return {"seconds": seconds, "rates": rates}


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    run(main)
