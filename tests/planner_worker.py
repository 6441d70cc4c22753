"""Bytes and seconds of real training steps on this machine, for comparison with the planner.

Usage: planner_worker.py JOBS.json OUT.json, jobs as of `train_worker`. Every rank measures itself.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "distributed"))

from world import joined_world

from calm_dist.cli import run


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with joined_world() as (world, device):
        results = []
        for job in jobs:
            results.append(measure(job, world, device))
            gc.collect()
        import torch.distributed as dist

        gathered: list[Any] = [None] * world.size
        dist.all_gather_object(gathered, results)
    if world.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(gathered), encoding="utf-8")


def measure(job: dict[str, Any], world: Any, device: Any) -> dict[str, Any]:
    """A few steps of a training: bytes on this rank, and the time of each."""
    from calm_dist.parallel.topology import build_topology, destroy_topology
    from calm_dist.recipe import load_recipe
    from calm_dist.training.loop import Trainer
    from calm_dist.training.resolve import resolve

    recipe = load_recipe(job["recipe"], job["overrides"]).with_world_size(world.size)
    recipe = resolve(recipe)
    Path(recipe.run.dir).mkdir(parents=True, exist_ok=True)
    topology = build_topology(recipe, device)
    gc.collect()
    before, rss = live_tensors(), resident("VmRSS")
    trainer = Trainer(recipe, topology)
    trainer._batches.read()
    step_once(trainer)
    gc.collect()
    kept = live_tensors() - before
    saved = saved_for_backward(trainer)
    allocated = allocated_in_step(trainer)
    Path("/proc/self/clear_refs").write_text("5")
    seconds, rates = timed_steps(trainer, device, job.get("steps", 0))
    result = {
        "kept": kept, "saved": saved, "step_peak": allocated,
        "rss": resident("VmHWM") - rss, "seconds": seconds, "rates": rates,
        "parts": by_kind(trainer),
    }
    if trainer.parts.head is not None:
        trainer.parts.head.close()
    destroy_topology(topology)
    return result


def step_once(trainer: Any) -> None:
    trainer.train_step(trainer._batches.take())
    trainer.progress.step += 1


def timed_steps(trainer: Any, device: Any, steps: int) -> tuple[list[float], list[Any]]:
    """Seconds of each step, and the machine's rates just before it."""
    import torch.distributed as dist
    from dataclasses import asdict
    from calm_dist.planner.local import measure_links, measure_rates

    seconds, rates = [], []
    for _ in range(steps):
        dist.barrier()
        rate = asdict(measure_rates(device))
        dist.barrier()
        rate["link"], rate["latency"] = measure_links(device)
        rates.append(rate)
        dist.barrier()
        seconds.append(timed(lambda: step_once(trainer)))
    return seconds, rates


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def storages() -> dict[int, int]:
    import torch

    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type != "meta":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def live_tensors() -> int:
    """Bytes of all tensors that Python knows."""
    return sum(storages().values())


def by_kind(trainer: Any) -> dict[str, int]:
    def size(tensors: Any) -> int:
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    parts = trainer.parts
    kinds = {
        "body_weights": size(p for c in parts.chunks for p in c.parameters()),
        "body_gradients": size(p.main_grad for c in parts.chunks for p in c.parameters()),
    }
    return kinds


def resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def saved_for_backward(trainer: Any) -> int:
    """The most bytes that autograd keeps at a time in a step, weights not counted."""
    import torch

    weights = {p.untyped_storage().data_ptr() for c in trainer.parts.chunks for p in c.parameters()}
    if trainer.parts.head is not None:
        weights |= {p.untyped_storage().data_ptr() for p in trainer.parts.head.module.parameters()}
    users: dict[int, int] = {}
    live = {"now": 0, "most": 0}

    class Kept:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor
            storage = tensor.untyped_storage()
            self.key, self.size = storage.data_ptr(), storage.nbytes()
            if self.key in weights:
                self.size = 0
            users[self.key] = users.get(self.key, 0) + 1
            if users[self.key] == 1:
                live["now"] += self.size
                live["most"] = max(live["most"], live["now"])

        def __del__(self) -> None:
            users[self.key] -= 1
            if users[self.key] == 0:
                live["now"] -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        step_once(trainer)
    return live["most"]


def allocated_in_step(trainer: Any) -> int:
    """The most bytes that torch allocates beyond those that live when a step begins."""
    import torch

    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step_once(trainer)
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


if __name__ == "__main__":
    run(main)
