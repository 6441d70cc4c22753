"""Keyed noise: shards of any layout are parts of the same whole."""

from __future__ import annotations

import itertools

import torch

from calm_dist.parallel.noise import KeyedNoise

CPU = torch.device("cpu")
POSITIONS = 200


def draw(generator: torch.Generator, positions: int) -> torch.Tensor:
    return torch.rand(3, positions, 5, generator=generator)


def shard(index: list[int], start: int, stop: int, seed: int = 0, step: int = 0) -> torch.Tensor:
    whole = KeyedNoise(seed, step, index, start, stop, CPU).whole("head", draw)
    return whole.unflatten(1, (len(index), stop - start))


def test_shards_are_slices_of_the_whole() -> None:
    whole = shard([4, 9], 0, POSITIONS)
    for cuts in ([0, 100, 200], [0, 50, 100, 150, 200], [0, 1, 63, 64, 65, 128, 200]):
        parts = [shard([4, 9], a, b) for a, b in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat(parts, dim=2), whole)


def test_samples_do_not_depend_on_their_batch() -> None:
    whole = shard([4, 9, 2], 0, POSITIONS)
    assert torch.equal(shard([2], 0, POSITIONS)[:, 0], whole[:, 2])


def test_every_part_of_the_key_counts() -> None:
    first = shard([4], 0, 64)
    assert not torch.equal(first, shard([5], 0, 64))
    assert not torch.equal(first, shard([4], 64, 128))
    assert not torch.equal(first, shard([4], 0, 64, seed=1))
    assert not torch.equal(first, shard([4], 0, 64, step=1))
    other_kind = KeyedNoise(0, 0, [4], 0, 64, CPU).whole("posterior", draw)
    assert not torch.equal(first[:, 0], other_kind)


def test_keys_are_those_of_the_whole_and_differ() -> None:
    whole = KeyedNoise(0, 0, [4, 9], 0, POSITIONS, CPU).keys("posterior").view(2, -1)
    assert len(whole.unique()) == 2 * POSITIONS and (whole >= 0).all()
    for start, stop in ((0, 100), (30, 31), (63, 129), (100, 200)):
        part = KeyedNoise(0, 0, [4, 9], start, stop, CPU).keys("posterior").view(2, -1)
        assert torch.equal(part, whole[:, start:stop])
    others = [KeyedNoise(*key, [4, 9], 0, POSITIONS, CPU) for key in ((1, 0), (0, 1))]
    for keys in (*(other.keys("posterior") for other in others),
                 KeyedNoise(0, 0, [4, 9], 0, POSITIONS, CPU).keys("head")):  # fmt: skip
        assert not torch.isin(keys, whole).any()


def test_chunks_cover_all_positions_in_order() -> None:
    def normal(generator: torch.Generator, positions: int) -> torch.Tensor:
        return torch.randn(4, positions, 3, generator=generator)

    source = KeyedNoise(0, 0, [1, 2], 30, 170, CPU)
    chunks = [(start, stop, part()) for start, stop, part in source.chunks("posterior", normal)]
    ends = [(start, stop) for start, stop, _ in chunks]
    assert ends[0][0] == 0 and ends[-1][1] == 2 * 140
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ends))
    assert all(part.shape == (4, stop - start, 3) for start, stop, part in chunks)
    # Standard normal: mean and variance of 4·280·3 numbers within 5 standard errors.
    values = torch.cat([part.flatten() for _, _, part in chunks])
    count = values.numel()
    assert abs(values.mean()) < 5 / count**0.5
    assert abs(values.var() - 1) < 5 * (2 / count) ** 0.5
