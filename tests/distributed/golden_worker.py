"""Imported language models in real ranks.

Usage: golden_worker.py JOBS.json, a list of {"kind", "run": imported run directory, "overrides"}
and, by kind:

- golden: trains on the golden tokens with the golden noise; "golden" directory, "steps", "out"
- start: writes fp32 master weights as training would start; "out"
- train: trains as tools/train.py does, on the run's own data
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from world import joined_world

from calm_dist.cli.console import run


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with joined_world() as (world, device):
        for job in jobs:
            if job["kind"] == "train":
                train(job, world, device)
            elif job["kind"] == "start":
                Start(job, world.size, device).write_masters()
            else:
                GoldenRun(job, world.size, device).go()


def train(job: dict[str, Any], world: Any, device: Any) -> None:
    """What tools/train.py does, in ranks that are connected already."""
    from calm_dist.parallel.rank_zero import on_rank_zero
    from calm_dist.recipe import LanguageModelRecipe, load_recipe
    from calm_dist.training.resolve import resolve
    from calm_dist.training.run import train_in_world
    from calm_dist.training.session import prepare_run_directory, record_start

    recipe = load_recipe(Path(job["run"]) / "recipe.yaml", job["overrides"])
    recipe = resolve(recipe.with_world_size(world.size))
    assert isinstance(recipe, LanguageModelRecipe)
    on_rank_zero(partial(prepare_run_directory, recipe))
    on_rank_zero(partial(record_start, recipe, world))
    train_in_world(recipe, device)


class Start:
    """One layout: the parts of a real run, as they are before the first step."""

    def __init__(self, job: dict[str, Any], world_size: int, device: Any) -> None:
        from calm_dist.parallel.topology import build_topology
        from calm_dist.recipe import LanguageModelRecipe, load_recipe
        from calm_dist.runs import checkpoints
        from calm_dist.training.build import build_parts
        from calm_dist.training.checkpoint import model_state

        self.job = job
        recipe = load_recipe(Path(job["run"]) / "recipe.yaml", job["overrides"])
        assert isinstance(recipe, LanguageModelRecipe)
        self.recipe = recipe.with_world_size(world_size)
        self.topology = build_topology(self.recipe, device)
        self.parts = build_parts(self.recipe, self.topology)
        directory = checkpoints.newest_valid(Path(job["run"]))
        assert directory is not None
        parts = self.parts
        model_state.start_from_weights(
            directory, parts.chunks, parts.optimizer, parts.head, self.topology
        )

    def write_masters(self) -> None:
        """The backbone's weights and their fp32 masters, and the head's; of one rank."""
        from safetensors.torch import save_file

        from calm_dist.parallel.topology import destroy_topology

        assert self.parts.head is not None
        found = {n: t.clone() for n, t in self.parts.head.export_state().items()}
        for name, parameter in self.parts.chunks[0].module.named_parameters():
            found[f"backbone.{name}"] = parameter.detach().clone()
            found[f"master.{name}"] = parameter.main_param.detach().clone()
        save_file(found, self.job["out"])
        destroy_topology(self.topology)


class GoldenRun(Start):
    """With the golden noise and tokens."""

    def __init__(self, job: dict[str, Any], world_size: int, device: Any) -> None:
        super().__init__(job, world_size, device)
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from safetensors.torch import load_file

        from calm_dist.interop.huggingface import load_autoencoder
        from calm_dist.recipe import CalmModel
        from calm_dist.training.optimizer import JointOptimizer

        self.io = load_file(Path(job["golden"]) / "io.safetensors")
        self.optimizer = JointOptimizer(
            self.recipe, self.parts.optimizer, self.parts.head, self.topology
        )
        model = self.recipe.model
        assert isinstance(model, CalmModel) and model.autoencoder is not None
        encoder = load_autoencoder(model.autoencoder)
        self.forward_step = golden_forward_step(self, encoder)
        self.schedule = get_forward_backward_func()

    def go(self) -> None:
        import torch
        import torch.distributed as dist
        from safetensors.torch import save_file

        from calm_dist.parallel.topology import destroy_topology

        losses, norms, tensors = [], [], {}
        for step in range(self.job["steps"] + 1):
            loss = self.forward_backward(step)
            if step == 0:
                tensors = {f"grad.{name}": value for name, value in self.gradients().items()}
                tensors["hidden_states"] = self.hidden_states()
            result = self.optimizer.step(step, loss)
            losses.append(result.loss)
            norms.append(result.grad_norm)
        found: list[dict[str, torch.Tensor] | None] = [None] * self.topology.world_size
        dist.all_gather_object(found, tensors)
        if self.topology.rank == 0:
            # Stages hold different parameters; what several ranks hold is the same.
            merged = {n: t.contiguous() for part in found if part for n, t in part.items()}
            save_file({n: t for n, t in merged.items() if t.numel()}, self.job["out"] + ".tensors")
            numbers = json.dumps({"losses": losses, "grad_norms": norms})
            Path(self.job["out"]).write_text(numbers, encoding="utf-8")
        destroy_topology(self.topology)

    def forward_backward(self, step: int) -> Any:
        """One pass of Megatron's schedule over the golden batch; this rank's part of the loss."""
        import torch

        from calm_dist.parallel.pipeline import micro_batches

        for chunk in self.parts.chunks:
            chunk.zero_grad_buffer()
        self.parts.optimizer.zero_grad()
        self.forward_step.begin(step)
        self.forward_step.outputs.clear()
        groups, tokens = self.topology.groups, self.io["input_ids"]
        whole = {"tokens": tokens, "index": torch.arange(len(tokens))}
        batch = {n: t.chunk(groups.dp.size())[groups.dp.rank()] for n, t in whole.items()}
        size = self.recipe.training.micro_batch_size
        outputs = self.schedule(
            forward_step_func=self.forward_step,
            data_iterator=[micro_batches(batch, size) for _ in self.parts.chunks],
            model=self.parts.chunks,
            num_microbatches=self.recipe.num_micro_batches,
            seq_length=self.recipe.padded_length,
            micro_batch_size=size,
            forward_only=False,
        )
        return sum((output["loss"] for output in outputs), torch.zeros(()))

    def hidden_states(self) -> Any:
        """[B, P, d] of all ranks of the last stage; nothing on the others."""
        import torch

        if not self.forward_step.outputs:
            return torch.zeros(0)
        output = torch.cat(self.forward_step.outputs, dim=1)  # [steps of this rank, B, d]
        if self.recipe.parallel.use_sequence_parallel:
            output = torch.cat(gathered(output, self.topology.groups.tp))
        return output.transpose(0, 1)[:, : self.recipe.num_patches - 1].contiguous()

    def gradients(self) -> dict[str, Any]:
        """Whole gradients of backbone and head under our global names."""
        from calm_dist.models.initialize import global_name

        found = {}
        for chunk in self.parts.chunks:
            backbone = chunk.module
            for name, parameter in backbone.named_parameters():
                value = parameter.main_grad.clone()
                if getattr(parameter, "tensor_model_parallel", False):
                    value = self.whole(parameter, value)
                found[global_name(name, backbone)] = value
        if self.parts.head is not None:
            found |= {f"head.{name}": v for name, v in self.head_gradients().items()}
        return found

    def whole(self, parameter: Any, value: Any) -> Any:
        """A tensor-parallel gradient from its shards; [gate; up] lie side by side on each rank."""
        import torch

        dim, stride = parameter.partition_dim, parameter.partition_stride
        shards = gathered(value, self.topology.groups.tp)
        parts = [shard.chunk(stride, dim=dim) for shard in shards]
        return torch.cat([part[s] for s in range(stride) for part in parts], dim=dim)

    def head_gradients(self) -> dict[str, Any]:
        """Gradients of the head from the partitions of its ZeRO engine."""
        import torch

        head = self.parts.head
        assert head is not None
        zero = head._zero
        names = {id(p): name for name, p in head.module.named_parameters()}
        found = {}
        for number, parameters in enumerate(zero.round_robin_bit16_groups):
            local = torch.cat([g.flatten() for g in zero.averaged_gradients[number]])
            flat = torch.cat(gathered(local, self.topology.head_group))
            offset = 0
            for parameter in parameters:
                part = flat[offset : offset + parameter.numel()]
                found[names[id(parameter)]] = part.view_as(parameter).clone()
                offset += parameter.numel()
        return found


def gathered(tensor: Any, group: Any) -> list[Any]:
    """The same-shaped tensors of all ranks of a group."""
    import torch
    import torch.distributed as dist

    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts


def golden_forward_step(golden: GoldenRun, encoder: Any) -> Any:
    """The real forward step, with golden noise and a record of the last stage's outputs."""
    import torch.nn.functional as F

    from calm_dist.parallel.pipeline import LatentForwardStep

    class GoldenNoise:
        """Golden noise of the rows of a micro-batch, cut to this rank's positions."""

        def __init__(self, rows: list[int], start: int, stop: int) -> None:
            self.rows, self.start, self.stop = rows, start, stop

        def whole(self, kind: str, draw: Any) -> Any:
            noise = {
                "head": golden.io["noise_uniform01"] - 0.5,
                "posterior": golden.io["target_eps"],
            }[kind]
            samples, positions, size = noise.shape
            patches = positions // len(golden.io["input_ids"])
            by_row = noise.view(samples, -1, patches, size)[:, self.rows]
            # Positions that predict nothing have no golden noise, and no weight.
            padded = F.pad(by_row, (0, 0, 0, max(self.stop - patches, 0)))
            return padded[:, :, self.start : self.stop].flatten(1, 2)

        def chunks(self, kind: str, draw: Any) -> Iterator[tuple[int, int, Any]]:
            noise = self.whole(kind, draw)
            yield 0, noise.shape[1], lambda: noise

        def keys(self, kind: str) -> Any:
            raise NotImplementedError("golden noise is stored, not drawn by keys")

    class GoldenForwardStep(LatentForwardStep):
        outputs: list[Any] = []  # noqa: RUF012

        def _loss(self, batch: Any, output: Any) -> Any:
            self.outputs.append(output.detach().clone())
            return super()._loss(batch, output)

        def _noise_source(self, batch: Any) -> GoldenNoise:
            return GoldenNoise(batch["index"].tolist(), self._start, self._stop)

    return GoldenForwardStep(golden.recipe, golden.topology, golden.parts.head, encoder)


if __name__ == "__main__":
    run(main)
