"""Descriptions of the flow-matching and diffusion heads, which share their network.

The modules are `calm_dist.models.heads.flow` and `calm_dist.models.heads.diffusion`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from calm_dist.heads.counting import affine_parameters, layer_norm_parameters, linear_flops
from calm_dist.heads.spec import HeadRecipe, HeadSpec, Released, unused_width

DIFFUSION_STEPS = 1000
"""Noise levels that the diffusion head is trained on."""

TIME_FEATURES = 256
"""Number of sinusoids that encode the time for the network."""

# As in `heads.energy`.
BLOCK_ACCESSES, OTHER_ACCESSES = 52, 40
BLOCK_KERNELS, OTHER_KERNELS = 50, 120


class IterativeSpec(HeadSpec):
    """An MLP with adaptive layer norm that turns noise into a latent in several steps."""

    outputs_per_latent: ClassVar[int]
    """Outputs of the network for each component of the latent."""
    latent_elements: ClassVar[int]
    """Number of tensors of the latent's size that the loss keeps for a sample."""
    latent_accesses: ClassVar[int]
    """Memory accesses of the loss's kernels per sample and component of the latent."""

    def problems(self, head: HeadRecipe) -> list[str]:
        return unused_width(head)

    def parameters(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        d = hidden_size
        square = affine_parameters(d, d)
        embeddings = affine_parameters(TIME_FEATURES, d) + 2 * square
        embeddings += affine_parameters(latent_size, d)
        block = layer_norm_parameters(d) + 2 * square + affine_parameters(d, 3 * d)
        outputs = self.outputs_per_latent * latent_size
        final = affine_parameters(d, 2 * d) + affine_parameters(d, outputs)
        return embeddings + head.num_mlp_layers * block + final

    def condition_flops(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        return linear_flops(hidden_size, hidden_size)

    def sample_flops(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        d = hidden_size
        square = linear_flops(d, d)
        time = linear_flops(TIME_FEATURES, d) + square
        # A block: two linears, and the modulation's Linear(d, 3d); at the end Linear(d, 2d).
        blocks = (5 * head.num_mlp_layers + 2) * square
        output = linear_flops(d, self.outputs_per_latent * latent_size)
        return time + linear_flops(latent_size, d) + blocks + output

    def input_flops(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        return linear_flops(TIME_FEATURES, hidden_size) + linear_flops(latent_size, hidden_size)

    def activation_elements(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        # A block keeps its norm's input, the modulation's 3d and its input, the modulated tensor
        # and the MLP's rows; then come the embeddings and the final layer; in the backward pass the
        # gradient of a modulation, 3d.
        per_sample = (11 * head.num_mlp_layers + 8 + 3) * hidden_size + TIME_FEATURES
        return head.num_samples * per_sample

    def loss_elements(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        return head.num_samples * self.latent_elements * latent_size

    def traffic_elements(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        rows = (BLOCK_ACCESSES * head.num_mlp_layers + OTHER_ACCESSES) * hidden_size
        return rows + self.latent_accesses * latent_size

    def kernels(self, head: HeadRecipe) -> int:
        return BLOCK_KERNELS * head.num_mlp_layers + OTHER_KERNELS

    def weight_std(self, init: str, name: str, shape: Sequence[int], std: float) -> float:
        """The released heads use Xavier initialisation (here normal, with the same variance) for
        all weights but the embedding of the time."""
        if init != "released" or "time_embed" in name:
            return std
        return math.sqrt(2.0 / sum(shape))


class FlowSpec(IterativeSpec):
    """Flow matching, integrated with the midpoint rule."""

    kind = "flow"
    module = "calm_dist.models.heads.flow:FlowHead"
    released = Released("FlowTransformer", ("generative_head.",), "flow")
    default_sampling_steps = 10
    evaluations_per_step = 2
    outputs_per_latent = 1
    latent_elements = 2
    latent_accesses = 30


class DiffusionSpec(IterativeSpec):
    """DDPM with learned variances."""

    kind = "diffusion"
    module = "calm_dist.models.heads.diffusion:DiffusionHead"
    released = Released("DiffusionTransformer", ("generative_head.",), "diffusion")
    default_sampling_steps = 100
    # The network also predicts a variance.
    outputs_per_latent = 2
    latent_elements = 20
    latent_accesses = 340

    def problems(self, head: HeadRecipe) -> list[str]:
        problems = super().problems(head)
        if head.steps_per_sample > DIFFUSION_STEPS:
            problems.append(
                f"model.head.sampling_steps: {head.sampling_steps}, but the diffusion head is "
                f"trained on {DIFFUSION_STEPS} steps; use at most that"
            )
        if head.steps_per_sample < 2:
            problems.append(
                f"model.head.sampling_steps: {head.sampling_steps}, but the diffusion head samples "
                "from the last noise level down to the first; use at least 2"
            )
        return problems


FLOW, DIFFUSION = FlowSpec(), DiffusionSpec()
