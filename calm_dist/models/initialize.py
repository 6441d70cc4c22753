"""Initial weights of a tensor- and pipeline-parallel backbone: the same model in every layout.

The full tensor of each parameter is drawn, and each tensor-parallel rank keeps its part.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from calm_dist.models.backbone import Backbone
from calm_dist.models.weights import InitStd, fill_parameter


@torch.no_grad()
def initialize_backbone(
    backbone: Backbone, groups: ProcessGroupCollection, std: InitStd, seed: int, vocab_size: int
) -> None:
    """Initialise one stage of a tensor-parallel backbone. Rows that pad the vocabulary are zero."""
    world = groups.tp.size()
    for name, parameter in backbone.named_parameters():
        shape = list(parameter.shape)
        is_sharded = getattr(parameter, "tensor_model_parallel", False)
        dim: int = getattr(parameter, "partition_dim", 0)
        if is_sharded:
            shape[dim] *= world
        vocab_rows = shape[0] if "embed_tokens" in name or "output_layer" in name else None
        if vocab_rows is not None:
            shape[0] = vocab_size

        def part_of(
            full: torch.Tensor,
            parameter: nn.Parameter = parameter,
            vocab_rows: int | None = vocab_rows,
        ) -> torch.Tensor:
            if vocab_rows is not None:
                full = nn.functional.pad(full, (0, 0, 0, vocab_rows - full.shape[0]))
            return local_part(parameter, full, groups)

        full_name = global_name(name, backbone)
        fill_parameter(parameter, full_name, torch.Size(shape), std, seed, part_of)


def local_part(
    parameter: nn.Parameter, full: torch.Tensor, groups: ProcessGroupCollection
) -> torch.Tensor:
    """This tensor-parallel rank's part of the full tensor of a backbone's parameter."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return full
    world, rank = groups.tp.size(), groups.tp.rank()
    dim: int = getattr(parameter, "partition_dim", 0)
    # A gated projection (stride 2) keeps this rank's parts of gate and up, in that order.
    stride = getattr(parameter, "partition_stride", 1)
    return torch.cat(full.chunk(world * stride, dim=dim)[rank::world], dim=dim)


def global_name(name: str, backbone: Backbone) -> str:
    """`decoder.layers.<number in this stage>` -> `decoder.layers.<number in the backbone>`."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(backbone.decoder.layers[int(parts[2])].layer_number - 1)
    return ".".join(parts)
