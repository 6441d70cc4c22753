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
    begins at slot 0, a step's slot is its rotary position, and keys are stored rotated. Each row
    attends to its own memory, so that no bit of its result depends on other rows.

    Attributes:
        lengths: number of steps stored for each row, int64 [rows] on the CPU.
    """

    def __init__(self, memory: dict[int, tuple[Tensor, Tensor]], lengths: Tensor) -> None:
        """``memory``: layer number -> keys and values, each [rows, slots, groups, head_dim]."""
        keys, _ = next(iter(memory.values()))
        super().__init__(max_batch_size=keys.shape[0], max_sequence_length=keys.shape[1])
        self.key_value_memory_dict = memory
        self.lengths = lengths
        # Number of steps of the current forward pass.
        self._steps = 0

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
        return KeyValueCache(memory, self.lengths[rows])

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
        return self.lengths + torch.arange(steps)[:, None]

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

    def advance(self) -> None:
        """After the last layer of a forward pass, add its steps to the lengths."""
        self.lengths += self._steps
