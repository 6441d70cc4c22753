"""Keys and values of earlier steps, so that the backbone computes only the new step."""

from __future__ import annotations

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

SLOT_MULTIPLE = 64
"""Slots are allocated in multiples of this, so that the alignment of a row never varies."""


class KeyValueCache(StaticInferenceContext):
    """Keys and values of all layers for several rows, each with its own number of steps.

    Megatron's static context (0.16.1) writes all rows at one offset, which left-pads short rows,
    and stores unrotated keys, so that all keys must be rotated again at each step. Here every row
    begins at slot 0, a step's slot is its rotary position, and keys are stored rotated.

    Attributes:
        lengths: number of steps stored for each row, int64 [rows] on the CPU.
        together: whether the rows attend in one call. Otherwise each row attends to its own memory,
            so that no bit of its result depends on other rows.
        seen: of rows together and of unequal lengths, the slots that the steps of the current
            forward pass see, bool [rows, 1, steps, slots].
    """

    def __init__(
        self,
        memory: dict[int, tuple[Tensor, Tensor]],
        lengths: Tensor,
        *,
        together: bool = False,
    ) -> None:
        """``memory``: layer number -> keys and values, each [rows, slots, groups, head_dim]."""
        keys, _ = next(iter(memory.values()))
        super().__init__(max_batch_size=keys.shape[0], max_sequence_length=keys.shape[1])
        self.key_value_memory_dict = memory
        self.lengths = lengths
        self.together = together
        self.seen: Tensor | None = None
        # Number of steps of the current forward pass; where `together`, the rows and slots to which
        # it writes.
        self._steps = 0
        self._written: tuple[Tensor, Tensor] | None = None

    @property
    def num_rows(self) -> int:
        """Number of texts in the cache."""
        return len(self.lengths)

    def select(self, rows: slice | list[int]) -> KeyValueCache:
        """Some of the rows. A slice gives a view, which writes to this cache; a list gives a
        copy."""
        memory = {
            layer: (keys[rows], values[rows])
            for layer, (keys, values) in self.key_value_memory_dict.items()
        }
        return KeyValueCache(memory, self.lengths[rows], together=self.together)

    def clear(self, row: int) -> None:
        """Forget the steps of a row."""
        self.lengths[row] = 0

    def truncate(self, steps: int) -> None:
        """Forget all but the first ``steps`` of every row."""
        self.lengths.clamp_(max=steps)

    def begin(self, steps: int) -> Tensor:
        """Reserve slots for the next ``steps`` of every row, before a forward pass over them.

        Returns:
            their rotary positions if they continue each row, [steps, rows] on the CPU.

        Raises:
            ValueError: they do not fit.
        """
        longest = int(self.lengths.max()) + steps
        if longest > self.max_sequence_length:
            raise ValueError(
                f"{longest} steps do not fit in a cache of {self.max_sequence_length} steps"
            )
        self._steps = steps
        positions = self.lengths + torch.arange(steps)[:, None]
        if self.together:
            self._begin_together(positions, longest)
        return positions

    def _begin_together(self, positions: Tensor, longest: int) -> None:
        device = next(iter(self.key_value_memory_dict.values()))[0].device
        slots = positions.T.to(device)
        self._written = torch.arange(self.num_rows, device=device)[:, None], slots
        self.seen = None
        if int(self.lengths.min()) + self._steps < longest:
            self.seen = (torch.arange(longest, device=device) <= slots[..., None])[:, None]

    def append(
        self, layer_number: int, key: Tensor, value: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Store the new steps of one layer, [steps, >= rows, groups, head_dim] with rotated keys.

        Surplus rows only pad the batch and are ignored.

        Returns:
            the keys and the values of each row, the new ones last: [slots, 1, groups, head_dim].
        """
        keys, values = self.key_value_memory_dict[layer_number]
        of_rows: tuple[list[Tensor], list[Tensor]] = ([], [])
        for row, held in enumerate(self.lengths.tolist()):
            end = held + self._steps
            for memory, new, result in zip((keys, values), (key, value), of_rows, strict=True):
                memory[row, held:end] = new[:, row]
                result.append(memory[row, :end, None])
        return of_rows

    def append_together(
        self, layer_number: int, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `append`, for all rows at once.

        Returns:
            keys and values up to the longest row, [slots, rows, groups, head_dim].
        """
        assert self._written is not None
        keys, values = self.key_value_memory_dict[layer_number]
        keys[self._written], values[self._written] = key.transpose(0, 1), value.transpose(0, 1)
        end = int(self.lengths.max()) + self._steps
        return keys[:, :end].transpose(0, 1), values[:, :end].transpose(0, 1)

    def advance(self) -> None:
        """After the last layer of a forward pass, add its steps to the lengths."""
        self.lengths += self._steps
