"""The discrete head's description; the module is `calm_dist.models.heads.tokens`.

Its token embedding and its output layer are cut over the backbone's tensor-parallel ranks and are
counted with the backbone: `calm_dist.models.patch_tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from calm_dist.heads.counting import affine_parameters, linear_flops
from calm_dist.heads.spec import HeadRecipe, HeadSpec, unused_width

EXPANSION = 2
"""Inner width of a block's SwiGLU, in units of the hidden size."""

# As in `heads.energy`, for a token of a patch.
BLOCK_ACCESSES, OTHER_ACCESSES = 43, 29
BLOCK_KERNELS, OTHER_KERNELS = 50, 120


@dataclass(frozen=True)
class TokensSpec(HeadSpec):
    """Predicts the K tokens of the next patch by softmax, without latents.

    This is the control that isolates the effect of patches: token k is predicted from the hidden
    state and, unless ``independent``, from the tokens before it in the same patch.
    """

    kind = "tokens"
    module = "calm_dist.models.heads.tokens:TokensHead"
    predicts = "tokens"
    patch_size: int = 1

    @property
    def module_arguments(self) -> tuple[Any, ...]:
        return (self.patch_size,)

    @property
    def runs_per_evaluation(self) -> int:
        return self.patch_size

    def for_patches(self, patch_size: int) -> HeadSpec:
        return TokensSpec(patch_size)

    def problems(self, head: HeadRecipe) -> list[str]:
        problems = unused_width(head)
        if head.sampling_steps is not None:
            problems.append(
                f"model.head.sampling_steps: {head.sampling_steps}, but the tokens head draws from "
                "its softmax; leave it out"
            )
        if self.patch_size == 1 and not head.independent:
            problems.append(
                "model.patch_size: 1 leaves the tokens head no earlier token of a patch to predict "
                "from; use model.head.independent=true, or a Transformer"
            )
        return problems

    def parameters(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        d, tokens = hidden_size, self.patch_size
        block = d + 3 * EXPANSION * d * d
        of_previous = 0 if head.independent else d + self._pairs * d * d
        views = affine_parameters(d, tokens * d)
        return views + of_previous + head.num_mlp_layers * block + d

    def condition_flops(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        d = hidden_size
        block = 3 * linear_flops(d, EXPANSION * d)
        views = linear_flops(d, self.patch_size * d)
        of_previous = 0 if head.independent else self._pairs * linear_flops(d, d)
        return views + of_previous + self.patch_size * head.num_mlp_layers * block

    def sample_flops(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        return 0

    def input_flops(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        return 0

    def activation_elements(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        # A block: the norm's input and output, gate, up, SiLU and product; at the end, those of the
        # last norm. Then the earlier tokens, their norm, and the inputs of their linears.
        of_token = (2 + 4 * EXPANSION) * head.num_mlp_layers + 3
        of_previous = 0 if head.independent else 2 * (self.patch_size - 1) + self._pairs
        return (self.patch_size * of_token + of_previous + 1) * hidden_size

    def traffic_elements(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        rows = (BLOCK_ACCESSES * head.num_mlp_layers + OTHER_ACCESSES) * hidden_size
        return self.patch_size * rows

    def kernels(self, head: HeadRecipe) -> int:
        return BLOCK_KERNELS * head.num_mlp_layers + OTHER_KERNELS

    @property
    def _pairs(self) -> int:
        """Number of pairs of a token and an earlier token of its patch."""
        return self.patch_size * (self.patch_size - 1) // 2


TOKENS = TokensSpec()
