"""Simulate two models on 8 to 16,384 GPUs, each number of GPUs in its best layout."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from calm_dist.costs.clusters import Cluster
from calm_dist.errors import UserError
from calm_dist.planner.full_plan import layout_overrides
from calm_dist.planner.predict import training_cost
from calm_dist.planner.search import search
from calm_dist.planner.storage import Reliability
from calm_dist.recipe import LanguageModelRecipe

GPUS = tuple(2**power for power in range(3, 15))
BLOCK_SIZE = 8192
_SHARED = {"kind": "calm", "vocab_size": 128256, "patch_size": 4, "latent_size": 128}
# name: model, blocks of a global batch, steps.
MODELS: dict[str, tuple[dict[str, Any], int, int]] = {
    # recipes/calm_xl.yaml: 2^21 tokens a step, 5.2e11 in all.
    "CALM-XL": (
        {
            "hidden_size": 2560,
            "intermediate_size": 6880,
            "num_hidden_layers": 16,
            "num_attention_heads": 20,
        },
        256,
        250_000,
    ),
    # Llama's 70B backbone: 2^23 tokens a step, 1.5e12 in all, about 20 per parameter.
    "CALM 70B": (
        {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
        1024,
        180_000,
    ),
}


def scaling_recipe(name: str) -> LanguageModelRecipe:
    """The recipe of one of `MODELS`, on one GPU; the search finds its layout on more."""
    model, blocks, steps = MODELS[name]
    return LanguageModelRecipe.from_dict(
        {
            "run": {"dir": f"runs/{name.lower().replace(' ', '_')}", "name": name},
            "model": _SHARED | model,
            "data": {"path": "data/latents/train", "block_size": BLOCK_SIZE},
            "parallel": {
                "distributed_optimizer": True,
                "overlap_grad_reduce": True,
                "overlap_param_gather": True,
            },
            "training": {"steps": steps, "micro_batch_size": 1, "global_batch_size": blocks},
            "precision": "bf16",
        }
    )


def scaling(cluster: Cluster, reliability: Reliability) -> dict[str, Any]:
    """The best layout of each model on each number of GPUs, as plain values."""
    models = {name: [_point(name, gpus, cluster, reliability) for gpus in GPUS] for name in MODELS}
    return {"cluster": asdict(cluster), "reliability": asdict(reliability), "models": models}


def _point(name: str, gpus: int, cluster: Cluster, reliability: Reliability) -> dict[str, Any]:
    found = search(scaling_recipe(name), cluster, gpus)
    if not found.fitting:
        return {"gpus": gpus, "fits": False}
    best = found.fitting[0]
    run = training_cost(best, reliability, best_interval=True)
    return {
        "gpus": gpus,
        "fits": True,
        "overrides": layout_overrides(best.recipe),
        "step_seconds": best.time.seconds,
        "step_terms": best.time.terms,
        "mfu": best.mfu(),
        "goodput": run["failures"]["best"]["goodput"],
        "checkpoint_interval_steps": run["failures"]["best"]["interval_steps"],
        "days": run["hours"] / 24,
        "gpu_hours": run["gpu_hours"],
        "price": run["price"],
        "read_bytes_per_second": run["data"]["read_bytes_per_second"],
        "layout": {
            "tensor": best.recipe.parallel.tensor_parallel_size,
            "pipeline": best.recipe.parallel.pipeline_parallel_size,
            "virtual": best.recipe.parallel.chunks_per_stage,
            "context": best.recipe.parallel.context_parallel_size,
            "data": best.recipe.data_parallel_size,
            "micro_batch_size": best.recipe.training.micro_batch_size,
            "recompute": best.recipe.parallel.recompute,
        },
    }


def format_scaling(values: dict[str, Any]) -> str:
    """`scaling` as tables."""
    lines = []
    for name, points in values["models"].items():
        lines += [
            f"{name} on {values['cluster']['name']}",
            f"{'GPUs':>7}  {'layout':<42}{'step':>9}{'MFU':>7}{'goodput':>9}{'days':>9}"
            f"{'GPU-hours':>12}",
        ]
        for point in points:
            if not point["fits"]:
                lines.append(f"{point['gpus']:>7,}  does not fit")
                continue
            layout = point["layout"]
            text = f"TP {layout['tensor']} PP {layout['pipeline']}"
            text += f"x{layout['virtual']}" if layout["virtual"] > 1 else ""
            text += f" CP {layout['context']}" if layout["context"] > 1 else ""
            text += f" DP {layout['data']}, {layout['micro_batch_size']} a micro-batch"
            text += ", r" if layout["recompute"] else ""
            lines.append(
                f"{point['gpus']:>7,}  {text:<42}{point['step_seconds']:>8.2f}s{point['mfu']:>7.1%}"
                f"{point['goodput']:>9.2%}{point['days']:>9.1f}{point['gpu_hours']:>12,.0f}"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def plot_scaling(values: dict[str, Any], target: str) -> None:
    """Plot `scaling` to an image file; its suffix selects the format.

    Raises:
        UserError: matplotlib does not support the format, or the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = (
        ("step_seconds", "time of a step, s", "log"),
        ("mfu", "MFU", "linear"),
        ("goodput", "goodput", "linear"),
        ("gpu_hours", "GPU-hours to train", "log"),
    )
    # Avoid ids and dates that change with each run, since the file is committed.
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "scaling", "font.size": 10}
    with plt.rc_context(style):
        figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), sharex=True, layout="constrained")
        for axis, (key, label, scale) in zip(axes.flat, panels, strict=True):
            for marker, (name, points) in zip("os", values["models"].items(), strict=True):
                fitting = [point for point in points if point["fits"]]
                axis.plot(
                    [point["gpus"] for point in fitting],
                    [point[key] for point in fitting],
                    marker=marker,
                    label=name,
                )
            axis.set_xscale("log", base=2)
            axis.set_xticks(GPUS[::2], [f"{gpus:,}" for gpus in GPUS[::2]])
            axis.set_yscale(scale)
            if scale == "linear":
                axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
            axis.set_title(label, loc="left")
            axis.grid(alpha=0.3)
        axes[0, 0].legend(frameon=False)
        for axis in axes[1]:
            axis.set_xlabel(f"GPUs ({values['cluster']['name']})")
        try:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            metadata = {"Date": None} if target.endswith(".svg") else None
            figure.savefig(target, dpi=120, metadata=metadata)
        except (ValueError, OSError) as error:
            raise UserError(
                f"--scaling {target}: {error}; give a writable file that ends in .svg or .png"
            ) from error
        finally:
            plt.close(figure)
