"""Stretches of a mixture: shares, repetition, changes of weights, and their arithmetic alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from calm_dist.compat.streaming import Stream
from calm_dist.data.mixture import Mixture, Stretch
from calm_dist.errors import DataError

G = 8


def mixture(*sizes: int, **changes: Any) -> Mixture:
    values: dict[str, Any] = {
        "sizes": sizes, "weights": None, "most_epochs": (None,) * len(sizes),
        "global_batch_size": G, "seed": 3, **changes,
    }  # fmt: skip
    return Mixture(**values)


def stretches(found: Mixture, steps: int) -> list[Stretch]:
    """All up to that of a step, after checking that they follow one another."""
    result = [found.at(found.start.step)]
    while result[-1].end <= steps:
        result.append(found.at(result[-1].end))
    for one, two in pairwise(result):
        assert (two.first, two.number) == (one.end, one.number + 1)
    for stretch in result:
        assert sum(stretch.counts) == stretch.steps * G and stretch.steps > 0
    return result


@pytest.mark.parametrize("weights", [None, (1.0, 3.0, 2.0), (1e-3, 1.0, 5.0)])
def test_constant_weights_give_the_counts_of_streaming(weights: tuple[float, ...] | None) -> None:
    """So that the order of earlier versions stays as it was."""
    sizes = (101, 57, 23)
    streams = [Stream(local="x", proportion=w) for w in weights or (None,) * 3]
    size = sum(sizes) // G * G
    Stream.apply_weights(streams, np.array(sizes), size, 3)
    found = stretches(mixture(*sizes, weights=weights), 100)
    assert {stretch.counts for stretch in found} == {tuple(s.choose for s in streams)}
    assert {stretch.steps for stretch in found} == {sum(sizes) // G}


@pytest.mark.parametrize("sizes", [(1638, 514, 1864, 1092), (977, 907, 1773, 1071), (7, 9)])
def test_an_epoch_of_whole_batches_has_every_block(sizes: tuple[int, ...]) -> None:
    """Rounded shares would give one store a block too few and another one too many."""
    found = mixture(*sizes, global_batch_size=4)
    assert found.at(0).counts == sizes


def test_weights_change_at_their_steps() -> None:
    found = mixture(80, 80, weights=([(0, 1.0), (25, 0.0)], [(10, 1.0)]))
    first, *others = stretches(found, 60)
    assert (first.steps, first.counts) == (10, (80, 0))
    assert (others[0].first, others[0].steps, others[0].counts) == (10, 15, (60, 60))
    assert (others[1].first, others[1].steps, others[1].counts) == (25, 20, (0, 160))
    assert found.read_at(25) == [140.0, 60.0]
    assert found.read_at(35) == [140.0, 140.0]


@pytest.mark.parametrize("sizes", [(10, 200), (37, 411), (3, 90)])
@pytest.mark.parametrize("most", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_no_store_is_read_more_often_than_it_may_be(
    sizes: tuple[int, int], most: float, share: float
) -> None:
    found = mixture(*sizes, weights=(share, 1 - share), most_epochs=(most, None))
    stretches(found, 500)
    few, many = found.read_at(500)
    assert few <= most * sizes[0]
    # What is missing is less than its part of one step, or the steps were too few.
    assert few > most * sizes[0] - max(1, share * G + 1) or few >= share * 500 * G - 60
    assert few + many == 500 * G


@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        ((323, 107), {"weights": (1.0, 1.0), "most_epochs": (1.0, None)}),
        ((323, 107), {"weights": ([(0, 1.0), (29, 3.0)], [(0, 1.0), (29, 0.5), (140, 0.0)])}),
        ((90, 7, 40), {"weights": (1.0, 5.0, 0.1), "most_epochs": (None, None, 0.5)}),
        ((41,), {"most_epochs": (30.0,)}),
    ],
)
def test_a_store_is_read_whole_before_any_of_it_is_read_again(
    sizes: tuple[int, ...], changes: dict[str, Any]
) -> None:
    found = mixture(*sizes, passes=True, **changes)
    times = [np.zeros(size, np.int64) for size in sizes]
    drawn = stretches(found, 150)
    assert len(drawn) > 2
    for stretch in drawn:
        for store, passes in enumerate(found.blocks_of(stretch)):
            assert sum(map(len, passes)) == stretch.counts[store]
            for blocks in passes:
                assert (np.diff(blocks) > 0).all()
                times[store][blocks] += 1
            assert np.ptp(times[store]) <= 1
    for most, read in zip(found.most_epochs, times, strict=True):
        assert most is None or read.max() <= np.ceil(most)


def test_passes_go_on_where_an_order_begins_later() -> None:
    before = mixture(41, most_epochs=(9.0,), passes=True)
    end = before.at(0).end
    changes: dict[str, Any] = {"weights": (1.0, 2.0), "most_epochs": (None, None)}
    after = before.restarted(end, mixture(41, 64, passes=True, **changes))
    (first,), (next_, *_) = before.blocks_of(before.at(0))[0], after.blocks_of(after.at(end))[0]
    assert sorted([*first, *next_]) == list(range(41))
    # Another pass, store or seed has another order.
    assert not np.array_equal(first[:20], np.arange(20))
    orders = [mixture(41, 41, 41, passes=True, seed=seed)._of_pass(store, number, 0, 20).tolist()
              for seed in (3, 4) for store in (0, 1) for number in (0, 1)]  # fmt: skip
    assert len({tuple(order) for order in orders}) == 8


def test_data_end_where_all_limits_are_reached() -> None:
    found = mixture(40, 80, weights=(1.0, 1.0), most_epochs=(1.0, 2.0))
    last = stretches(found, 20)[-1]
    assert found.read_at(20)[0] == 40
    with pytest.raises(DataError, match="give data for 25 steps; raise max_epochs"):
        found.at(25)
    assert last.end <= 25 and found.read_at(25) == [40.0, 160.0]


def test_an_order_that_begins_later_goes_on_counting() -> None:
    before = mixture(40, most_epochs=(3.0,))
    after = before.restarted(7, mixture(40, 80, weights=(1.0, 1.0), most_epochs=(3.0, None)))
    assert after.at(7) == Stretch(2, 7, 15, (60, 60)) == after.numbered(2)
    assert after.read_at(7) == [56.0, 0.0]
    stretches(after, 100)
    assert after.read_at(100)[0] == 120.0


def test_states_are_plain_and_give_the_same_stretches() -> None:
    import json

    changes: dict[str, Any] = {
        "weights": (1.0, [(5, 2.0), (9, 0.5)]),
        "most_epochs": (None, 2.0),
    }
    assert "order" not in mixture(30, 60).identity()
    for one in (mixture(30, 60), mixture(30, 60, **changes),
                mixture(30, 60, passes=True, **changes),
                mixture(30).restarted(4, mixture(30, 60, **changes))):  # fmt: skip
        state = json.loads(json.dumps(one.identity()))
        again = Mixture.of_state(state, one.sizes)
        assert stretches(again, 90) == stretches(one, 90)
        assert again.identity() == one.identity() and again.passes == one.passes
