"""Training steps of the paper's models on one GPU: speed, memory, launches and waits."""

from __future__ import annotations

import statistics
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

import calm_dist
from calm_dist.benchmark.model import STEP_RANGE, by_part, one_device, profile_step
from calm_dist.benchmark.random_steps import RandomSteps
from calm_dist.benchmark.timing import seconds
from calm_dist.costs import flops
from calm_dist.costs.clusters import PRESETS, Cluster
from calm_dist.gpu_check.parts import Variant, variant_named
from calm_dist.gpu_check.worker import Check
from calm_dist.inference.load import single_process_topology
from calm_dist.planner.predict import predict
from calm_dist.recipe import LanguageModelRecipe, load_recipe
from calm_dist.rehearsal.places import line_here
from calm_dist.rehearsal.stand_in import CHIPS

ROOT = Path(calm_dist.__file__).parents[1]
REPEATS = 5
PROFILED = 4
_SMALL = ("model.hidden_size=128", "model.intermediate_size=256", "model.num_hidden_layers=2",
          "model.num_attention_heads=2", "model.vocab_size=1000",
          "data.block_size=128")  # fmt: skip
_SMALL_CALM = ("model.latent_size=32", "model.head.num_mlp_layers=1", "model.head.num_samples=2",
               "model.head.posterior_samples=4")  # fmt: skip
# Calls of the CUDA runtime and driver.
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def variant_recipe(variant: Variant, small: bool = False) -> LanguageModelRecipe:
    """The recipe of a variant on one GPU."""
    overrides = [f"training.micro_batch_size={variant.micro_batch_size}", *variant.overrides]
    # `one_device` sets the global batch; this one only has to be possible.
    overrides += ["parallel.world_size=1", "parallel.overlap_grad_reduce=false"]
    calm = "calm" in variant.recipe
    overrides += [*_SMALL, *(_SMALL_CALM if calm else ())] if small else []
    recipe = load_recipe(str(ROOT / variant.recipe), overrides)
    assert isinstance(recipe, LanguageModelRecipe)
    return one_device(recipe, min(2, variant.micro_batches) if small else variant.micro_batches)


def cluster_of(device: torch.device) -> Cluster | None:
    """The planner's assumptions about a GPU; None for one that it does not know."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((PRESETS[key] for key, chip in CHIPS.items() if chip.name == name), None)


def measure_variant(check: Check, variant: str) -> None:
    """Time steps, then look at one more, with debugging, and at another, with the profiler."""
    recipe, device = variant_recipe(variant_named(variant), check.small), check.device
    check.add(
        tokens_per_step=recipe.tokens_per_step,
        micro_batches=recipe.num_micro_batches,
        micro_batch_size=recipe.training.micro_batch_size,
        planned=_planned(recipe, device),
    )
    steps = RandomSteps(recipe, single_process_topology(recipe, device))

    def step() -> None:
        steps.step()

    check.add(first_step_seconds=seconds(step, device))
    # The second one makes the last of the optimizers' state.
    step()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    times = [seconds(step, device) for _ in range(1 if check.small else REPEATS)]
    check.add(**_speed(recipe, device, times))
    if on_gpu:
        check.add(
            peak_bytes=torch.cuda.max_memory_allocated(device),
            reserved_bytes=torch.cuda.max_memory_reserved(device),
        )
    # A profile of many micro-batches takes minutes to read.
    profiled = min(PROFILED, recipe.num_micro_batches)
    steps.resize(profiled)
    step()
    if on_gpu:
        check.add(waits=waits_of(step))
    events = profile_step(steps, device)
    check.add(profiled_micro_batches=profiled, parts=by_part(events, on_gpu))
    if on_gpu:
        check.add(**launches(events))
    steps.close()


def _speed(recipe: LanguageModelRecipe, device: torch.device, times: list[float]) -> dict[str, Any]:
    step = statistics.median(times)
    rate = recipe.tokens_per_step / step
    peak = None
    if device.type == "cuda":
        peak = flops.peak_flops(torch.cuda.get_device_name(device), recipe.precision)
    full, causal = (
        flops.count(recipe, tokens=0, causal=causal).train_flops_per_token_ours
        for causal in (False, True)
    )
    return {
        "step_seconds": step,
        "all_step_seconds": times,
        "tokens_per_second": rate,
        "mfu": rate * full / peak if peak else None,
        "mfu_causal": rate * causal / peak if peak else None,
    }


def _planned(recipe: LanguageModelRecipe, device: torch.device) -> dict[str, float] | None:
    """What the planner says of the same step; None for a device that it has no numbers of."""
    cluster = cluster_of(device)
    if cluster is None:
        return None
    prediction = predict(recipe, cluster)
    return {"step_seconds": prediction.time.seconds, "peak_bytes": prediction.peak_memory}


def waits_of(step: Any) -> list[dict[str, Any]]:
    """Places at which torch lets the host wait for the device in a step, by its own debugging; it
    knows copies and numbers that are read, but not explicit synchronisation."""
    with _warnings_by_place() as places:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [{"where": place, "count": count} for place, count in places.most_common()]


@contextmanager
def _warnings_by_place() -> Iterator[Counter[str]]:
    """Counts of synchronisation warnings by line of code."""
    places: Counter[str] = Counter()
    show = warnings.showwarning

    def count(message: Any, *args: Any, **kwargs: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            places[line_here("calm_dist/gpu_check/")] += 1

    with warnings.catch_warnings():
        # Not once for each line.
        warnings.simplefilter("always")
        warnings.showwarning = count
        try:
            yield places
        finally:
            warnings.showwarning = show


def launches(events: list[FunctionEvent]) -> dict[str, Any]:
    """Counts of a profile: what the host launched and where it waited, and what the device ran and
    for how long."""
    (whole,) = (
        event.time_range
        for event in events
        if event.name == STEP_RANGE and event.device_type == DeviceType.CPU
    )
    calls: Counter[str] = Counter()
    kernels, busy = 0, []
    for event in events:
        if event.device_type == DeviceType.CPU:
            if whole.start <= event.time_range.start <= whole.end:
                calls[event.name] += 1
        elif not getattr(event, "is_user_annotation", False) and event.name != STEP_RANGE:
            busy.append((event.time_range.start, event.time_range.end))
            kernels += not event.name.startswith(("Memcpy", "Memset"))
    return {
        "kernels": kernels,
        "launches": sum(calls[name] for name in _LAUNCHES),
        "copies": calls["cudaMemcpyAsync"] + calls["cudaMemsetAsync"],
        "host_waits": {name: calls[name] for name in _WAITS if calls[name]},
        "profiled_seconds": (whole.end - whole.start) / 1e6,
        "device_busy_seconds": covered(busy) / 1e6,
    }


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
