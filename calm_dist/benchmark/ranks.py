"""Training and encoding in several processes on this machine: throughput, pipeline bubbles and the
balance of stages, measured and compared with the layout's predictions."""

from __future__ import annotations

import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calm_dist.errors import UserError

RATE_TOKENS = 8192
# Numbers of blocks per step, for pipelines of two stages.
MICRO_BATCHES = (1, 2, 4, 8, 16)
_TIMEOUT_SECONDS = 1800


def measure_ranks(repeats: int) -> dict[str, Any]:
    """Launch worlds of one and of two processes with one thread each, and time steps in them.

    Returns:
        ``pipeline``: a row for each number of micro-batches on two stages, with ``bubble`` and
        ``stage_shares``, both measured (processor time of the stages) and predicted. ``scaling``: a
        row for each way to use one or two processes, with tokens/s of all processes together and
        MiB of the largest.

    Raises:
        UserError: a launch failed; the message includes its output.
    """
    alone: list[dict[str, Any]] = [
        {"name": "1 process", "kind": "step"},
        {"name": "encoding, 1 process", "kind": "encode"},
    ]
    two: list[dict[str, Any]] = [
        {"name": "2 replicas", "kind": "step", "training.global_batch_size": 8},
        {"name": "tensor parallel 2", "kind": "step", "parallel.tensor_parallel_size": 2},
        {"name": "encoding, 2 processes", "kind": "encode"},
    ]
    pipelines: list[dict[str, Any]] = [
        {
            "name": f"pipeline of 2, {count} micro-batches",
            "kind": "step",
            "parallel.pipeline_parallel_size": 2,
            "training.global_batch_size": count,
        }
        for count in MICRO_BATCHES
    ]
    rows = [*_launch(1, alone, repeats), *_launch(2, two, repeats)]
    return {
        "scaling": [_scaling(row) for row in rows],
        "pipeline": [_pipeline(row) for row in _launch(2, pipelines, repeats)],
    }


def _scaling(row: dict[str, Any]) -> dict[str, Any]:
    slowest = max(rank["seconds"] for rank in row["ranks"])
    return {
        "name": row["name"],
        "tokens_per_second": row["tokens"] / slowest,
        "largest_mib": max(rank["peak_mib"] for rank in row["ranks"]),
    }


def _pipeline(row: dict[str, Any]) -> dict[str, Any]:
    busy = [rank["busy"] for rank in row["ranks"]]
    seconds = max(rank["schedule"] for rank in row["ranks"])
    shares, stages, count = row["work_shares"], len(busy), row["micro_batches"]
    balance = sum(shares) / stages / max(shares)
    return {
        "micro_batches": count,
        "seconds": seconds,
        "bubble": 1 - sum(busy) / (stages * seconds),
        # Equal stages wait for stages - 1 micro-batches; unequal ones also for the slowest stage.
        "predicted_bubble": 1 - balance * count / (count + stages - 1),
        "stage_shares": [part / sum(busy) for part in busy],
        "predicted_stage_shares": shares,
    }


def _launch(processes: int, cases: Sequence[dict[str, Any]], repeats: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="calm-ranks-") as directory:
        job = Path(directory) / "job.json"
        job.write_text(json.dumps({"cases": cases, "repeats": repeats}), encoding="utf-8")
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run(
            [sys.executable, *launcher, "-m", __name__, str(job)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
        if done.returncode:
            raise UserError(f"{processes} processes could not be timed: {done.stderr[-2000:]}")
        return json.loads(job.with_suffix(".result").read_text(encoding="utf-8"))


def main(job: Path) -> None:
    """One rank of a launch."""
    import torch.distributed as dist

    from calm_dist.compat import megatron_cpu
    from calm_dist.parallel.launch import join_world, read_world, select_device

    world = read_world()
    world.export()
    device = select_device(world, "cpu")
    join_world(world, device, timeout_seconds=120.0)
    megatron_cpu.install()
    described = json.loads(job.read_text(encoding="utf-8"))
    rows = []
    for case in described["cases"]:
        measure = _time_steps if case.pop("kind") == "step" else _time_encoding
        row = measure(case, described["repeats"])
        ranks: list[Any] = [None] * world.size
        dist.all_gather_object(ranks, row.pop("rank"))
        rows.append({**row, "ranks": ranks})
        gc.collect()
    if world.rank == 0:
        job.with_suffix(".result").write_text(json.dumps(rows), encoding="utf-8")
    dist.destroy_process_group()


def _time_steps(case: dict[str, Any], repeats: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from calm_dist.benchmark.random_steps import RandomSteps
    from calm_dist.costs.stages import work_shares
    from calm_dist.parallel.topology import build_topology, destroy_topology

    recipe = _recipe(case, dist.get_world_size())
    topology = build_topology(recipe, torch.device("cpu"))
    steps = RandomSteps(recipe, topology)
    steps.step()
    times = []
    for _ in range(repeats):
        dist.barrier()
        times.append(steps.step())
    steps.close()
    del steps
    destroy_topology(topology)
    return {
        "name": case["name"],
        "tokens": recipe.tokens_per_step,
        "micro_batches": recipe.num_micro_batches,
        "work_shares": work_shares(recipe),
        "rank": {
            "seconds": statistics.median(t.total for t in times),
            "schedule": statistics.median(t.schedule for t in times),
            "busy": statistics.median(t.busy for t in times),
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        },
    }


def _time_encoding(case: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Each process encodes its own blocks, like the workers of `tools/encode_latents.py`."""
    import torch
    import torch.distributed as dist

    from calm_dist.benchmark.pairs import PAPER_VOCAB, random_autoencoder, zipf_tokens

    model = random_autoencoder(PAPER_VOCAB).eval().requires_grad_(False)
    tokens = zipf_tokens(PAPER_VOCAB, RATE_TOKENS, seed=dist.get_rank())[None]
    model.encode(tokens)
    times = []
    for _ in range(repeats):
        dist.barrier()
        started = time.perf_counter()
        with torch.no_grad():
            model.encode(tokens)
        times.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "name": case["name"],
        "tokens": RATE_TOKENS * dist.get_world_size(),
        "rank": {"seconds": statistics.median(times), "peak_mib": peak},
    }


def _recipe(changes: dict[str, Any], world_size: int) -> Any:
    """A CALM of hidden 256 with 16 layers; each micro-batch is one block of 1,024 tokens."""
    from calm_dist.recipe import Recipe

    values: dict[str, Any] = {
        "run": {"dir": "runs/benchmark"},
        "model": {
            "kind": "calm",
            "vocab_size": 8192,
            "patch_size": 4,
            "latent_size": 128,
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 16,
            "num_attention_heads": 4,
            "head": {"num_mlp_layers": 2},
        },
        "data": {"path": "latents/train", "block_size": 1024},
        "parallel": {"world_size": world_size},
        "training": {"steps": 1, "micro_batch_size": 1, "global_batch_size": 4},
    }
    for name, value in changes.items():
        if "." in name:
            section, field = name.split(".")
            values[section][field] = value
    return Recipe.from_dict(values)


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = ["| | tokens/s | largest process |", "|---|---|---|"]
    lines += [
        f"| {row['name']} | {row['tokens_per_second']:,.0f} | {row['largest_mib']:,.0f} MiB |"
        for row in result["scaling"]
    ]
    lines += [
        "",
        "| micro-batches | forward and backward | bubble | predicted | stages' work | predicted |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["pipeline"]:
        measured, predicted = (
            " : ".join(f"{share:.0%}" for share in row[name])
            for name in ("stage_shares", "predicted_stage_shares")
        )
        lines.append(
            f"| {row['micro_batches']} | {row['seconds']:.3g} s | {row['bubble']:.0%} "
            f"| {row['predicted_bubble']:.0%} | {measured} | {predicted} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
