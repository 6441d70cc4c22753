"""A plan as plain values, and as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from calm_dist.costs import flops
from calm_dist.costs.clusters import Cluster
from calm_dist.errors import RecipeError
from calm_dist.planner.predict import Prediction, predict, training_cost
from calm_dist.planner.search import Search, search
from calm_dist.planner.storage import Reliability, size_text
from calm_dist.recipe import LanguageModelRecipe

BEST = 5
# Terms of a step are shown if they are above this share.
_WORTH_A_LINE = 0.002


def full_plan(
    recipe: LanguageModelRecipe, cluster: Cluster, reliability: Reliability, world_size: int
) -> dict[str, Any]:
    """The recipe's own layout on ``world_size`` GPUs, the best layouts, and why the others are
    worse, as plain values.

    Raises:
        UserError: see `predict`.
    """
    own, refusal = None, None
    try:
        own = predict(recipe.with_world_size(world_size), cluster)
    except RecipeError as error:
        refusal = str(error)
    found = search(recipe, cluster, world_size)
    best = found.fitting[0] if found.fitting else None
    return {
        "name": recipe.run.display_name,
        "parameters": flops.count(recipe, tokens=0).parameters,
        "steps": recipe.training.steps,
        "tokens_per_step": recipe.tokens_per_step,
        "gpus": world_size,
        "cluster": {**asdict(cluster), "usable_memory": cluster.usable_memory},
        "fits": own is not None and own.fits,
        "refused": refusal,
        "recipe": own and _layout(own) | {"run": training_cost(own, reliability)},
        "best": [_layout(prediction) for prediction in found.best(BEST)],
        "best_run": best and training_cost(best, reliability),
        "search": _search(found),
    }


def _layout(prediction: Prediction) -> dict[str, Any]:
    recipe, stage = prediction.recipe, prediction.largest_stage
    parallel = recipe.parallel
    return {
        "overrides": layout_overrides(recipe),
        "tensor": parallel.tensor_parallel_size,
        "pipeline": parallel.pipeline_parallel_size,
        "virtual": parallel.chunks_per_stage,
        "context": parallel.context_parallel_size,
        "data": recipe.data_parallel_size,
        "micro_batch_size": recipe.training.micro_batch_size,
        "num_micro_batches": recipe.num_micro_batches,
        "recompute": parallel.recompute,
        "zero_stage": parallel.zero_stage,
        "distributed_optimizer": parallel.distributed_optimizer,
        "fits": prediction.fits,
        "memory_bytes": [asdict(memory) | {"total": memory.total} for memory in prediction.memory],
        "largest_stage": stage,
        "step_seconds": prediction.time.seconds,
        "step_terms": prediction.time.terms,
        "stage_terms": list(prediction.time.stages),
        "tokens_per_second": prediction.tokens_per_second,
        "mfu": prediction.mfu(),
        "mfu_causal": prediction.mfu(causal=True),
    }


def layout_overrides(recipe: LanguageModelRecipe) -> list[str]:
    """The command-line overrides that select a recipe's layout."""
    parallel = recipe.parallel
    values = {
        "parallel.world_size": recipe.world_size,
        "parallel.tensor_parallel_size": parallel.tensor_parallel_size,
        "parallel.pipeline_parallel_size": parallel.pipeline_parallel_size,
        "parallel.virtual_pipeline_size": parallel.virtual_pipeline_size,
        "parallel.stage_layers": parallel.stage_layers and list(parallel.stage_layers),
        "parallel.sequence_parallel": parallel.sequence_parallel,
        "parallel.context_parallel_size": parallel.context_parallel_size,
        "parallel.zero_stage": parallel.zero_stage,
        "parallel.distributed_optimizer": parallel.distributed_optimizer,
        "parallel.overlap_grad_reduce": parallel.overlap_grad_reduce,
        "parallel.overlap_param_gather": parallel.overlap_param_gather,
        "parallel.overlap_p2p": parallel.overlap_p2p,
        "parallel.recompute": parallel.recompute,
        "training.micro_batch_size": recipe.training.micro_batch_size,
    }
    return [
        f"{name}={'null' if value is None else str(value).lower().replace(' ', '')}"
        for name, value in values.items()
    ]


def _search(found: Search) -> dict[str, Any]:
    return {
        "tried": found.tried,
        "fit": len(found.fitting),
        "slower_by": dict(found.slower_by().most_common()),
        "out_of_memory": len(found.out_of_memory),
        "largest_part": dict(found.lacking().most_common()),
        "refused": {
            name: {"layouts": len(messages), "such_as": messages[0]}
            for name, messages in sorted(found.refused.items())
        },
    }


def format_full_plan(values: dict[str, Any]) -> str:
    """`full_plan` as text of at most 100 columns."""
    cluster = values["cluster"]
    nodes = -(-values["gpus"] // cluster["gpus_per_node"])
    lines = [
        f"{values['name']}: {values['parameters']:,} parameters on {values['gpus']:,} x "
        f"{cluster['name']} ({nodes:,} {'node' if nodes == 1 else 'nodes'}), "
        f"{values['tokens_per_step']:,} tokens a step",
        "",
        *_own_lines(values),
        "",
        *_best_lines(values),
        "",
        *_lost_lines(values["search"], cluster),
    ]
    return "\n".join(lines)


def _own_lines(values: dict[str, Any]) -> list[str]:
    """The recipe's own layout; if it cannot be used, the cost of the best one."""
    own, cluster, run = values["recipe"], values["cluster"], values["best_run"]
    if own is None:
        lines = ["The recipe's own layout is refused on this number of GPUs:"]
        for problem in values["refused"].splitlines():
            lines += _wrapped(problem.split(), separator=" ")
    else:
        lines = [*_memory_lines(own, cluster), "", *_time_lines(own)]
        if own["fits"]:
            run = own["run"]
    if run is None:
        return lines
    title = [] if values["fits"] else ["With the best layout below:"]
    device = "process" if cluster["on_cpu"] else "GPU"
    return [*lines, "", *title, *_run_lines(run, values["steps"], device)]


def _memory_lines(own: dict[str, Any], cluster: dict[str, Any]) -> list[str]:
    parts = own["memory_bytes"][own["largest_stage"]]
    usable = cluster["usable_memory"]
    verdict = "fits" if own["fits"] else "DOES NOT FIT: out of memory"
    stages = len(own["memory_bytes"])
    where = f" of stage {own['largest_stage']}" if stages > 1 else ""
    return [
        f"This layout: {_layout_text(own)}",
        f"Memory per rank{where}, at its peak: {size_text(parts['total'])} of "
        f"{size_text(usable)}: {verdict}",
        *_wrapped(
            f"{name.replace('_', ' ')} {size_text(size)}"
            for name, size in parts.items()
            if name != "total" and size
        ),
    ]


def _time_lines(own: dict[str, Any]) -> list[str]:
    total = own["step_seconds"]
    lines = [
        f"Step: {_duration(total)}, {own['tokens_per_second']:,.0f} tokens/s, MFU {own['mfu']:.1%} "
        f"({own['mfu_causal']:.1%} with causal attention counted as half)"
    ]
    terms = sorted(own["step_terms"].items(), key=lambda term: -term[1])
    return lines + _wrapped(
        f"{name} {seconds / total:.1%}"
        for name, seconds in terms
        if seconds > _WORTH_A_LINE * total
    )


def _run_lines(run: dict[str, Any], steps: int, device: str) -> list[str]:
    failures, checkpoint, data = run["failures"], run["checkpoint"], run["data"]
    best, own = failures["best"], failures["recipe"]
    price = "" if run["price"] is None else f", cost {_amount(run['price'])}"
    int8 = data["bytes_per_token_int8"]
    as_int8 = f" (int8 {int8:.3g})" if int8 < data["bytes_per_token"] else ""
    return [
        f"Run: {steps:,} steps in {_duration(run['hours'] * 3600)}, {_amount(run['gpu_hours'])} "
        f"{device}-hours{price}",
        f"Failures: one in {_duration(failures['mtbf_hours'] * 3600)}; goodput "
        f"{own['goodput']:.1%} with a checkpoint every {own['interval_steps']:,} steps",
        f"  (best: every {best['interval_steps']:,} steps, {best['goodput']:.1%})",
        f"Checkpoint: {size_text(checkpoint['bytes'])}, written in "
        f"{_duration(checkpoint['write_seconds'])}, training waits "
        f"{_duration(checkpoint['stall_seconds'])}",
        f"Data: {data['bytes_per_token']:.3g} bytes a token{as_int8}, "
        f"{data['bytes_of_all_tokens'] / 1e12:,.2f} TB for all steps, read at "
        f"{data['read_bytes_per_second'] / 1e6:,.1f} MB/s",
        *_other_latents_lines(data["other_latents"]),
    ]


def _other_latents_lines(other: dict[str, Any] | None) -> list[str]:
    if other is None:
        return []
    change = other["step_longer_by"]
    longer = f"{abs(change):.1%} {'longer' if change >= 0 else 'shorter'}"
    return [
        f"  (data.latents={other['latents']}: {other['bytes_per_token']:.3g} bytes a token, "
        f"steps {longer})"
    ]


def _best_lines(values: dict[str, Any]) -> list[str]:
    if not values["best"]:
        if not values["search"]["out_of_memory"]:
            return ["No layout is possible on this number of GPUs; see the refusals below."]
        return [
            "No layout fits. Use more GPUs, parallel.distributed_optimizer=true or a smaller model."
        ]
    lines = [
        f"{'Best layouts':<42}{'step':>9}{'MFU':>8}{'memory':>10}{'against this one':>19}",
    ]
    own = values["recipe"]["step_seconds"] if values["fits"] else None
    for layout in values["best"]:
        lines.append(
            f"  {_layout_text(layout):<40}{_duration(layout['step_seconds']):>9}"
            f"{layout['mfu']:>8.1%}"
            f"{size_text(max(stage['total'] for stage in layout['memory_bytes'])):>10}"
            + (f"{own / layout['step_seconds']:>18.2f}x" if own else "")
        )
    chosen = values["best"][0]["overrides"]
    lines += ["The first one, as overrides:", *_wrapped(chosen, separator=" ")]
    run = values["best_run"]
    own, best = run["failures"]["recipe"], run["failures"]["best"]
    return [
        *lines,
        f"Its checkpoints make training wait {_duration(run['checkpoint']['stall_seconds'])}: "
        f"goodput {own['goodput']:.1%} with one every {own['interval_steps']:,} steps,",
        f"  {best['goodput']:.1%} with one every {best['interval_steps']:,}",
    ]


def _lost_lines(found: dict[str, Any], cluster: dict[str, Any]) -> list[str]:
    slower = sum(found["slower_by"].values())
    lines = [f"Of {found['tried']:,} layouts tried"]
    if slower:
        lines.append(f"  {slower:,} are slower than the best, most of all by")
        lines += _wrapped(
            (f"{name} ({number})" for name, number in found["slower_by"].items()), indent=4
        )
    if found["out_of_memory"]:
        lines.append(
            f"  {found['out_of_memory']:,} need more than {size_text(cluster['usable_memory'])}, "
            "most of it for"
        )
        lines += _wrapped(
            (
                f"{name.replace('_', ' ')} ({number})"
                for name, number in found["largest_part"].items()
            ),
            indent=4,
        )
    for reason in found["refused"].values():
        lines.append(f"  {reason['layouts']:,} are refused, such as")
        lines += _wrapped(reason["such_as"].split(), indent=4, separator=" ")
    return lines


def _layout_text(layout: dict[str, Any]) -> str:
    parts = [f"TP {layout['tensor']}", f"PP {layout['pipeline']}"]
    if layout["virtual"] > 1:
        parts[-1] += f"x{layout['virtual']}"
    if layout["context"] > 1:
        parts.append(f"CP {layout['context']}")
    parts += [
        f"DP {layout['data']}",
        f"{layout['num_micro_batches']} x {layout['micro_batch_size']}",
    ]
    if layout["recompute"]:
        parts.append("recompute")
    if layout["distributed_optimizer"]:
        parts.append("shard")
    if layout["zero_stage"] != 2:
        parts.append(f"ZeRO {layout['zero_stage']}")
    return ", ".join(parts)


def _wrapped(items: Iterable[str], indent: int = 2, separator: str = ", ") -> list[str]:
    """Join items into lines of at most 100 columns."""
    lines: list[str] = []
    line = ""
    for item in items:
        if line and len(line) + len(separator) + len(item) + indent > 99:
            lines.append(" " * indent + line + separator.rstrip())
            line = ""
        line += (separator if line else "") + item
    return [*lines, " " * indent + line] if line else lines


def _amount(value: float) -> str:
    """Format hours or money: whole numbers, or two digits below ten."""
    return f"{value:,.0f}" if value >= 10 or value == 0 else f"{value:.2g}"


def _duration(seconds: float) -> str:
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"
