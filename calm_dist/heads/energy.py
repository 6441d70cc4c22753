"""The energy head's description; the module is `calm_dist.models.heads.energy`."""

from __future__ import annotations

from calm_dist.heads.counting import affine_parameters, layer_norm_parameters, linear_flops
from calm_dist.heads.spec import HeadRecipe, HeadSpec, Released, unused_width

# Memory accesses of element-wise kernels per sample and element of the hidden state, counted with a
# TorchDispatchMode (see `costs.work`): in one block; before and after the blocks. The same for
# kernel launches, in a rehearsal of CALM-M.
BLOCK_ACCESSES, OTHER_ACCESSES = 43, 29
BLOCK_KERNELS, OTHER_KERNELS = 37, 27


class EnergySpec(HeadSpec):
    """One step from uniform noise and hidden state to a sample (paper, section 4)."""

    kind = "energy"
    module = "calm_dist.models.heads.energy:EnergyHead"
    # The authors' training script selects the energy head if model_type is absent.
    released = Released(
        "EnergyTransformer", ("mlp_generator.", "generative_head."), required=("noise_size",)
    )
    scores_energy = True

    def problems(self, head: HeadRecipe) -> list[str]:
        return self.score_problems(head) + unused_width(head)

    @staticmethod
    def score_problems(head: HeadRecipe) -> list[str]:
        """`problems` of every head that is trained with the energy score."""
        problems = []
        if head.num_samples < 2:
            problems.append(
                f"model.head.num_samples: found {head.num_samples}; the energy score's second term "
                "needs two samples; use at least 2"
            )
        if head.sampling_steps is not None:
            problems.append(
                f"model.head.sampling_steps: {head.sampling_steps}, but the {head.kind} head draws "
                "a sample in one step; leave it out"
            )
        return problems

    def parameters(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        d = hidden_size
        square, norm = affine_parameters(d, d), layer_norm_parameters(d)
        embeddings = affine_parameters(head.noise_size, d) + square + 2 * norm
        block = norm + affine_parameters(2 * d, d) + 2 * square + affine_parameters(d, 2 * d)
        final = norm + square + affine_parameters(d, latent_size)
        return embeddings + head.num_mlp_layers * block + final

    def condition_flops(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        # The condition's embedding, and its half of each block's Linear(2d, d).
        return (1 + head.num_mlp_layers) * linear_flops(hidden_size, hidden_size)

    def sample_flops(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        d = hidden_size
        # A block: the noise's half of Linear(2d, d), then Linear(d, d), (d, 2d), (d, d).
        squares = (5 * head.num_mlp_layers + 1) * linear_flops(d, d)
        return linear_flops(head.noise_size, d) + squares + linear_flops(d, latent_size)

    def input_flops(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        return linear_flops(head.noise_size, hidden_size)

    def activation_elements(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        d = hidden_size
        # A block: the norm's input and output, both sides of two SiLUs, the gated linear's 2d, SiLU
        # of the gate and the product. The noise's norm and the final layer keep five more rows.
        per_sample = (10 * head.num_mlp_layers + 5) * d + head.noise_size + latent_size
        # Shared by all samples: hidden state, its embedding, its norm.
        return head.num_samples * per_sample + 3 * d

    def traffic_elements(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        return (BLOCK_ACCESSES * head.num_mlp_layers + OTHER_ACCESSES) * hidden_size

    def kernels(self, head: HeadRecipe) -> int:
        return BLOCK_KERNELS * head.num_mlp_layers + OTHER_KERNELS


ENERGY = EnergySpec()
