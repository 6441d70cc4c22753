"""One rank of tests/distributed/test_output_layer.py: the output layer's loss in chunks, its
gradients and its plain form.

Usage: output_layer_worker.py JOBS.json, a list of {"recipe": path, "out": path, "dtype": name,
"sequence_parallel": bool, "chunk": logits at a time}. Rank 0 writes the loss and the whole
gradients of both forms.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from world import joined_world

from calm_dist.cli.console import run

# The vocabulary is padded to 320 rows, the last of which are no words.
STEPS, BATCH, WIDTH, VOCAB = 6, 3, 16, 300


def inputs(padded: int) -> dict[str, torch.Tensor]:
    """Hidden states, the whole layer, targets on all shards, and weights with ignored positions."""
    generator = torch.Generator().manual_seed(5)
    targets = torch.randint(0, VOCAB, (BATCH, STEPS), generator=generator)
    targets[0, :2] = torch.tensor([0, VOCAB - 1])
    weight = torch.rand(STEPS, generator=generator)
    weight[2] = weight[-1] = 0.0
    return {
        "hidden": torch.randn(STEPS, BATCH, WIDTH, generator=generator),
        "layer": torch.randn(padded, WIDTH, generator=generator),
        "targets": targets,
        "weight": weight,
    }


def main() -> None:
    from calm_dist.parallel.topology import build_topology, destroy_topology
    from calm_dist.recipe import load_recipe

    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with joined_world() as (world, device):
        size = {"parallel.tensor_parallel_size": world.size, "model.vocab_size": VOCAB}
        size |= {"parallel.pipeline_parallel_size": 1, "model.hidden_size": WIDTH}
        size |= {"parallel.sequence_parallel": False, "data.path": "none"}
        given = load_recipe(jobs[0]["recipe"], [f"{name}={value}" for name, value in size.items()])
        topology = build_topology(given.with_world_size(world.size), device)
        for job in jobs:
            found = both_forms(job, given, topology)
            if world.rank == 0:
                save_file(found, job["out"])
        destroy_topology(topology)


def both_forms(job: dict[str, Any], given: Any, topology: Any) -> dict[str, torch.Tensor]:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from calm_dist.costs import chunks
    from calm_dist.models.backbone import transformer_config
    from calm_dist.models.output_layer import OutputLayer
    from calm_dist.recipe.checks import padded_vocab_size

    chunks.LOGITS = job["chunk"]
    dtype = getattr(torch, job["dtype"])
    config = transformer_config(given, dtype)
    config.sequence_parallel = job["sequence_parallel"]
    layer = OutputLayer(config, VOCAB, topology.groups)
    data = inputs(padded_vocab_size(VOCAB))
    with torch.no_grad():
        layer.weight.copy_(data["layer"].chunk(topology.tp_size)[topology.tp_rank])
    part = data["hidden"].to(dtype)
    if job["sequence_parallel"]:
        part = part.chunk(topology.tp_size)[topology.tp_rank]
    found: dict[str, torch.Tensor] = {}
    for form in ("chunks", "plain"):
        hidden = part.clone().requires_grad_()
        layer.weight.grad = None
        if form == "chunks":
            loss = layer(hidden, data["targets"], data["weight"])
        else:
            logits = layer(hidden).float()
            losses = vocab_parallel_cross_entropy(logits, data["targets"].T.contiguous())
            loss = (losses * data["weight"][:, None]).sum()
        # As the schedule's factor is.
        (3.5 * loss).backward()
        assert hidden.grad is not None and hidden.grad.dtype == layer.weight.grad.dtype == dtype
        of_hidden = hidden.grad
        if job["sequence_parallel"]:
            of_hidden = whole(of_hidden, topology)
        found |= {
            f"{form}.loss": loss.detach(),
            f"{form}.hidden": of_hidden,
            f"{form}.layer": whole(layer.weight.grad, topology),
        }
    return found


def whole(part: torch.Tensor, topology: Any) -> torch.Tensor:
    parts = [torch.empty_like(part) for _ in range(topology.tp_size)]
    torch.distributed.all_gather(parts, part.contiguous(), group=topology.groups.tp)
    return torch.cat(parts)


if __name__ == "__main__":
    run(main)
