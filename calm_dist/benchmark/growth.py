"""Measure how time and memory grow with each size that a user can choose."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from calm_dist.benchmark.compare import Pair, compare
from calm_dist.benchmark.pairs import autoencoder_pair, energy_pair
from calm_dist.benchmark.random_steps import RandomSteps
from calm_dist.benchmark.reading import write_random_store
from calm_dist.benchmark.step import small_calm_recipe
from calm_dist.data.stream import open_training_stream
from calm_dist.inference.loading import single_process_topology

POSITIONS, SAMPLES, DRAWS = (512, 1024, 2048, 4096), (2, 4, 8, 16), (25, 50, 100, 200)
VOCABULARIES = (8_000, 16_000, 32_000, 64_000, 128_000)
PATCH_SIZES, SHARDS = (1, 2, 4, 8), (10, 100, 1000)
MEASURES = ("seconds", "peak_mib")


def measure_growth(device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Time and memory over each size, with the others fixed.

    Returns:
        a series for each size: ``what``, ``over``, and ``points`` with ``size`` and, for ``ours``
        and for ``plain`` if there is a plain form, ``seconds`` and ``peak_mib``.
    """
    series: list[tuple[str, str, Sequence[int], Callable[[int], Pair]]] = [
        ("energy score", "positions", POSITIONS, lambda n: energy_pair(device, positions=n)),
        (
            "energy score",
            "samples N",
            SAMPLES,
            lambda n: energy_pair(device, positions=1024, samples=n),
        ),
        ("energy score", "draws M", DRAWS, lambda n: energy_pair(device, positions=1024, draws=n)),
        (
            "autoencoder training step",
            "vocabulary",
            VOCABULARIES,
            lambda n: autoencoder_pair(device, vocab_size=n, length=256),
        ),
    ]
    return [
        {"what": what, "over": over, "points": [_point(make(n), n, repeats, device) for n in sizes]}
        for what, over, sizes, make in series
    ] + [
        {
            "what": "CALM training step",
            "over": "patch size K",
            "points": [_alone(_step(device, n), n, repeats, device) for n in PATCH_SIZES],
        },
        {
            "what": "opening a store",
            "over": "shards",
            "points": list(_opening(repeats, device)),
        },
    ]


def _point(pair: Pair, size: int, repeats: int, device: torch.device) -> dict[str, Any]:
    row = compare(pair, repeats, device)
    return {
        "size": size,
        **{side: {name: row[side][name] for name in MEASURES} for side in ("ours", "plain")},
    }


def _alone(
    call: Callable[[], None], size: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    point = _point(Pair("", call, lambda: None, 1, "", {}), size, repeats, device)
    del point["plain"]
    return point


def _step(device: torch.device, patch_size: int) -> Callable[[], None]:
    """A training step of 4 x 1,024 tokens with 32 components of a latent per token."""
    recipe = small_calm_recipe(patch_size)
    steps = RandomSteps(recipe, single_process_topology(recipe, device))

    def step() -> None:
        steps.step()

    return step


def _opening(repeats: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Time to open stores whose shards have one block each."""
    for shards in SHARDS:
        with tempfile.TemporaryDirectory(prefix="calm-shards-") as directory:
            write_random_store(Path(directory), shards, shard_bytes=1, block_size=64)

            def open_once(directory: str = directory) -> None:
                next(iter(open_training_stream([directory], batch_size=2)))

            yield _alone(open_once, shards, repeats, device)


def table(series: list[dict[str, Any]]) -> str:
    """The series as Markdown: seconds and MiB of our code, in brackets those of the plain form."""
    lines = []
    for one in series:
        lines += [f"| {one['what']} over {one['over']} | seconds | MiB |", "|---|---|---|"]
        for point in one["points"]:
            cells = [_cell(point, name) for name in MEASURES]
            lines.append(f"| {point['size']:,} | {cells[0]} | {cells[1]} |")
        lines.append("")
    return "\n".join(lines)


def _cell(point: dict[str, Any], name: str) -> str:
    values = [point[side][name] for side in ("ours", "plain") if side in point]
    shown = ["?" if value is None else f"{value:.3g}" for value in values]
    return shown[0] + (f" ({shown[1]})" if len(shown) > 1 else "")


def plot(series: list[dict[str, Any]], path: str | Path) -> None:
    """Plot the series to an image file: time above, memory below, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(series), figsize=(3.2 * len(series), 5.6), squeeze=False)
    for column, one in enumerate(series):
        sizes = [point["size"] for point in one["points"]]
        for row, (name, label) in enumerate(zip(MEASURES, ("seconds", "MiB"), strict=True)):
            panel = axes[row][column]
            for side, style in (("ours", "o-"), ("plain", "s--")):
                values = [point.get(side, {}).get(name) for point in one["points"]]
                if all(value is not None and value > 0 for value in values):
                    panel.plot(sizes, values, style, label=side)
            panel.set(xscale="log", yscale="log", xlabel=one["over"], ylabel=label)
            panel.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=45)
            panel.minorticks_off()
        axes[0][column].set_title(one["what"], fontsize=10)
    axes[0][0].legend()
    figure.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)
    pyplot.close(figure)
