"""The chain head's description; the module is `calm_dist.models.heads.chain`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from calm_dist.heads.counting import affine_parameters, layer_norm_parameters, linear_flops
from calm_dist.heads.energy import (
    BLOCK_ACCESSES,
    BLOCK_KERNELS,
    ENERGY,
    OTHER_ACCESSES,
    OTHER_KERNELS,
)
from calm_dist.heads.spec import HeadRecipe, HeadSpec


@dataclass(frozen=True)
class ChainSpec(HeadSpec):
    """An energy head that draws the K slots of a latent one after the other.

    Slot k is drawn in one step from noise, the hidden state and the earlier slots. All slots share
    a network of the energy head's blocks (after `reverse Markov learning`_ and MtPC,
    arXiv 2511.11346, where one step over all K tokens costs quality).

    .. _reverse Markov learning: https://openreview.net/forum?id=eKSkXjo1a4
    """

    kind = "chain"
    module = "calm_dist.models.heads.chain:ChainHead"
    scores_energy = True
    slots: int = 1

    @property
    def module_arguments(self) -> tuple[Any, ...]:
        return (self.slots,)

    @property
    def runs_per_evaluation(self) -> int:
        return self.slots

    def for_patches(self, patch_size: int) -> HeadSpec:
        return ChainSpec(patch_size)

    def problems(self, head: HeadRecipe) -> list[str]:
        return ENERGY.score_problems(head)

    def latent_problems(self, latent_size: int) -> list[str]:
        if latent_size % self.slots == 0:
            return []
        return [
            f"model.latent_size: {latent_size} cannot be cut into {self.slots} slots, one for each "
            "token of a patch; use a multiple, or another head"
        ]

    def parameters(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        w, slot = self._width(head, hidden_size), latent_size // self.slots
        square, norm = affine_parameters(w, w), layer_norm_parameters(w)
        conditions = affine_parameters(hidden_size, self.slots * w) + self._earlier(slot) * w
        noise = affine_parameters(head.noise_size, w) + 2 * norm
        block = norm + affine_parameters(2 * w, w) + 2 * square + affine_parameters(w, 2 * w)
        final = norm + square + affine_parameters(w, slot)
        return conditions + noise + head.num_mlp_layers * block + final

    def condition_flops(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        w, slot = self._width(head, hidden_size), latent_size // self.slots
        views = linear_flops(hidden_size, self.slots * w) + linear_flops(self._earlier(slot), w)
        # The condition's half of each block's Linear(2w, w), for each slot.
        return views + self.slots * head.num_mlp_layers * linear_flops(w, w)

    def sample_flops(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        w, slot = self._width(head, hidden_size), latent_size // self.slots
        squares = (5 * head.num_mlp_layers + 1) * linear_flops(w, w)
        one = linear_flops(head.noise_size, w) + squares + linear_flops(w, slot)
        return self.slots * one

    def input_flops(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        return self.slots * linear_flops(head.noise_size, self._width(head, hidden_size))

    def shared_input_flops(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        slot = latent_size // self.slots
        return linear_flops(self._earlier(slot), self._width(head, hidden_size))

    def activation_elements(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        w = self._width(head, hidden_size)
        per_sample = (10 * head.num_mlp_layers + 5) * w + head.noise_size
        of_slot = head.num_samples * per_sample + 2 * w
        return self.slots * of_slot + head.num_samples * latent_size + hidden_size

    def traffic_elements(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        rows = BLOCK_ACCESSES * head.num_mlp_layers + OTHER_ACCESSES
        return self.slots * rows * self._width(head, hidden_size)

    def kernels(self, head: HeadRecipe) -> int:
        return BLOCK_KERNELS * head.num_mlp_layers + OTHER_KERNELS

    @staticmethod
    def _width(head: HeadRecipe, hidden_size: int) -> int:
        return head.width or hidden_size

    def _earlier(self, slot_size: int) -> int:
        """Number of components of the earlier slots, summed over all slots."""
        return slot_size * self.slots * (self.slots - 1) // 2


CHAIN = ChainSpec()
