"""Training steps of a recipe on one device: tokens per second, MFU, memory, and time by part."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from calm_dist.benchmark.compare import peak_mib
from calm_dist.benchmark.random_steps import RandomSteps
from calm_dist.benchmark.timing import environment, seconds
from calm_dist.costs import flops
from calm_dist.inference.loading import single_process_topology
from calm_dist.models.heads import Head
from calm_dist.recipe import LanguageModelRecipe

OTHER, ENERGY_SCORE = "other", "energy score"
STEP_RANGE = "training step"
_RANGE = "part: "
_MODULES = {
    "PatchEmbedding": "embedding",
    "TokenEmbedding": "embedding",
    "CachedSelfAttention": "attention",
    "MLP": "MLP",
    "OutputLayer": "output layer",
}
"""Modules that are timed separately; nested ones count with the outermost."""
_SCORES = ("_ChunkedEnergyScore", "_FusedEnergyScore")
_BACKWARD = "autograd::engine::evaluate_function: "


def one_device(recipe: LanguageModelRecipe, micro_batches: int) -> LanguageModelRecipe:
    """The recipe on one device, with ``micro_batches`` micro-batches per step."""
    values = recipe.to_dict()
    values["parallel"] |= {
        "world_size": 1,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "context_parallel_size": 1,
        "virtual_pipeline_size": None,
        "stage_layers": None,
        "sequence_parallel": False,
        "overlap_p2p": False,
    }
    training = values["training"]
    training["global_batch_size"] = training["micro_batch_size"] * micro_batches
    return LanguageModelRecipe.from_dict(values)


def measure_model(
    recipe: LanguageModelRecipe,
    device: torch.device,
    repeats: int,
    peak_tflops: float | None = None,
) -> dict[str, Any]:
    """Time steps of a recipe for `one_device` on random blocks, then profile one more.

    Args:
        peak_tflops: peak of the device, for MFU; default: from `calm_dist.costs.flops`, by name.

    Returns:
        A JSON-able dict: tokens_per_second and step_seconds (median), mfu and mfu_causal (None
        without a peak; as this package executes the model, without recomputation), peak_mib of a
        step beyond weights and optimizer, and ``parts``: forward and backward seconds of each part
        in the profiled step (on a GPU, those of its kernels).
    """
    flops.known_size(recipe.model, "vocab_size")
    steps = RandomSteps(recipe, single_process_topology(recipe, device))

    def step() -> None:
        steps.step()

    step()
    peak, _ = peak_mib(step, device)
    times = [seconds(step, device) for _ in range(repeats)]
    parts = by_part(profile_step(steps, device), device.type == "cuda")
    steps.close()
    around = environment(device)
    rate = recipe.tokens_per_step / median(times)
    peak_flops = flops.peak_flops(str(around["device"]), recipe.precision)
    if peak_tflops is not None:
        peak_flops = peak_tflops * 1e12
    full, causal = (
        flops.count(recipe, tokens=0, causal=causal).train_flops_per_token_ours
        for causal in (False, True)
    )
    return {
        **around,
        "name": recipe.run.display_name,
        "parameters": flops.count(recipe, tokens=0).parameters,
        "precision": recipe.precision,
        "tokens_per_step": recipe.tokens_per_step,
        "micro_batches": recipe.num_micro_batches,
        "step_seconds": median(times),
        "all_step_seconds": times,
        "tokens_per_second": rate,
        "flops_per_token": full,
        "mfu": rate * full / peak_flops if peak_flops else None,
        "mfu_causal": rate * causal / peak_flops if peak_flops else None,
        "peak_mib": peak,
        "parts": parts,
    }


def profile_step(steps: RandomSteps, device: torch.device) -> list[FunctionEvent]:
    """Events of one step, with ranges around the forward passes of the model's parts, in a range
    `STEP_RANGE`."""
    modules = [chunk.module for chunk in steps.parts.chunks]
    if steps.parts.head is not None:
        modules.append(steps.parts.head.module)
    handles = [handle for module in modules for handle in _annotate(module)]
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    try:
        with profile(activities=activities) as profiler:
            with record_function(STEP_RANGE):
                steps.step()
            if on_gpu:
                torch.cuda.synchronize(device)
    finally:
        for handle in handles:
            handle.remove()
    return list(profiler.events() or [])


def _annotate(module: nn.Module) -> list[Any]:
    """Ranges in the profile around the forward passes of the parts of ``module``."""
    handles: list[Any] = []
    part = "head" if isinstance(module, Head) else _MODULES.get(type(module).__name__)
    if part is None:
        for child in module.children():
            handles += _annotate(child)
        return handles
    opened: list[Any] = []

    def begin(*_: Any) -> None:
        opened.append(record_function(_RANGE + part))
        opened[-1].__enter__()

    def end(*_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]


def by_part(events: list[FunctionEvent], on_gpu: bool) -> dict[str, dict[str, float]]:
    """Forward and backward seconds of each part in a profile: sums of the ops inside its range and
    of their backward passes, which have the same sequence numbers."""
    # Kernels are also separate events; they count with the op that launched them.
    top = [
        event
        for event in events
        if event.cpu_parent is None and event.device_type == DeviceType.CPU
    ]
    part_of: dict[int, str] = {}

    def remember(event: FunctionEvent, part: str) -> None:
        part = _entered(event) or part
        if part != OTHER and event.sequence_nr >= 0 and not event.name.startswith(_BACKWARD):
            part_of.setdefault(event.sequence_nr, part)
        for child in event.cpu_children:
            remember(child, part)

    parts: dict[str, dict[str, float]] = {}

    def add(event: FunctionEvent, part: str, direction: str) -> None:
        """Add an event's own time, without its children's; recomputation counts as forward."""
        if entered := _entered(event):
            part, direction = entered, "forward"
        elif event.name.startswith(_BACKWARD):
            part, direction = part_of.get(event.sequence_nr, OTHER), "backward"
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        parts.setdefault(part, {"forward": 0.0, "backward": 0.0})[direction] += own / 1e6
        for child in event.cpu_children:
            add(child, part, direction)

    for event in top:
        remember(event, OTHER)
    for event in top:
        add(event, OTHER, "forward")
    return parts


def _entered(event: FunctionEvent) -> str | None:
    """The part that begins with this event."""
    if event.name.startswith(_RANGE):
        return event.name.removeprefix(_RANGE)
    return ENERGY_SCORE if event.name in _SCORES else None


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    mfu = "MFU unknown (set --peak-tflops)"
    if result["mfu"] is not None:
        mfu = f"MFU {result['mfu']:.1%} ({result['mfu_causal']:.1%} with causal attention)"
    peak = "?" if result["peak_mib"] is None else f"{result['peak_mib']:,.0f} MiB"
    lines = [
        f"{result['name']}, {result['parameters']:,} parameters, {result['precision']}, "
        f"{result['device']}: {result['tokens_per_second']:,.0f} tokens/s "
        f"({result['step_seconds']:.3g} s for {result['tokens_per_step']:,} tokens in "
        f"{result['micro_batches']} micro-batches), {mfu}, {peak} for a step",
        "",
        "| part | forward | backward | share of the profiled step |",
        "|---|---|---|---|",
    ]
    parts = {name: (part["forward"], part["backward"]) for name, part in result["parts"].items()}
    everything = sum(map(sum, parts.values()))
    for name, (forward, backward) in sorted(parts.items(), key=lambda item: -sum(item[1])):
        share = (forward + backward) / everything
        lines.append(
            f"| {name} | {forward * 1e3:,.1f} ms | {backward * 1e3:,.1f} ms | {share:.1%} |"
        )
    return "\n".join(lines)
