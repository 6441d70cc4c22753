"""Random numbers that do not depend on the layout.

Noise is keyed by (seed, step, sample index, block of 64 positions, kind). A rank draws only the
blocks that contain its positions, so every layout trains the same model, per device type. Kernels
that draw their own numbers get a key for each position instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from calm_dist.models.heads.base import Draw
from calm_dist.randomness import key_seed

BLOCK_POSITIONS = 64


class KeyedNoise:
    """Noise of one micro-batch shard: samples ``index``, positions [start, stop) of each.

    The shard's positions are flattened sample by sample: [len(index) * (stop - start)].
    """

    def __init__(
        self, seed: int, step: int, index: list[int], start: int, stop: int, device: torch.device
    ) -> None:
        self._seed, self._step, self._index = seed, step, index
        self._start, self._stop = start, stop
        self._device = device

    def chunks(
        self, kind: str, draw: Draw
    ) -> Iterator[tuple[int, int, Callable[[], torch.Tensor]]]:
        """Yield (first, end, function that draws noise [n, end - first, ...]) over the flattened
        positions.

        A block is always drawn whole, so the noise of a position does not depend on the part of the
        block that a rank has.
        """
        for first, part, sample, block in self._blocks():
            generator = partial(self._generator, sample, block, kind)
            end = first + part.stop - part.start
            yield first, end, partial(_part_of, draw, generator, part)

    def keys(self, kind: str) -> torch.Tensor:
        """For each flattened position a key for a counter-based generator, int64: one of its
        sample, plus its place in the block."""
        seeds = [key_seed(self._seed, self._step, sample, kind, "keys") for sample in self._index]
        joined = torch.tensor(seeds)[:, None] + torch.arange(self._start, self._stop)
        joined = joined.flatten()
        if self._device.type == "cuda":
            # From pageable memory the copy would wait for the device.
            joined = joined.pin_memory()
        return joined.to(self._device, non_blocking=True)

    def _blocks(self) -> Iterator[tuple[int, slice, int, int]]:
        """For each part of a block: its first flattened position, the part, its sample and
        block."""
        length = self._stop - self._start
        for number, sample in enumerate(self._index):
            first_block = self._start // BLOCK_POSITIONS
            for block in range(first_block, -(-self._stop // BLOCK_POSITIONS)):
                base = block * BLOCK_POSITIONS
                first, end = max(base, self._start), min(base + BLOCK_POSITIONS, self._stop)
                flattened = number * length + first - self._start
                yield flattened, slice(first - base, end - base), sample, block

    def whole(self, kind: str, draw: Draw) -> torch.Tensor:
        """All chunks concatenated: [n, positions, ...]."""
        return torch.cat([noise() for _, _, noise in self.chunks(kind, draw)], dim=1)

    def _generator(self, sample: int, block: int, kind: str) -> torch.Generator:
        seed = self._seed_of(sample, block, kind)
        return torch.Generator(self._device).manual_seed(seed)

    def _seed_of(self, sample: int, block: int, kind: str) -> int:
        return key_seed(self._seed, self._step, sample, block, kind)


def _part_of(draw: Draw, generator: Callable[[], torch.Generator], part: slice) -> torch.Tensor:
    return draw(generator(), BLOCK_POSITIONS)[:, part]
