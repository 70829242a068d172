"""The order of examples: a pure function of seed and position."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pentad.datasets.batches import collate
from pentad.datasets.order import BLOCK, Order, best_fit


def test_each_epoch_has_every_unit_once_in_another_order() -> None:
    order = Order([5, 3], None, seed=1)
    epochs = [[order[8 * epoch + i] for i in range(8)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == [(0, i) for i in range(5)] + [(1, i) for i in range(3)]
    assert epochs[0] != epochs[1]


def test_the_order_depends_on_seed_and_position_only() -> None:
    one, other = Order([9], None, seed=2), Order([9], None, seed=2)
    assert [one[i] for i in range(30)] == [other[i] for i in reversed(range(30))][::-1]
    assert [one[i] for i in range(30)] != [Order([9], None, seed=3)[i] for i in range(30)]


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, 0.2, 0.1], [1e-3, 1.0]])
def test_a_mixture_has_the_weights_shares_and_whole_epochs(weights: list[float]) -> None:
    order = Order([7] * len(weights), weights, seed=0)
    drawn = [order[i] for i in range(3 * BLOCK)]
    counts = Counter(source for source, _ in drawn)
    for source, weight in enumerate(weights):
        assert abs(counts[source] - 3 * BLOCK * weight / sum(weights)) <= 1
        units = [unit for s, unit in drawn if s == source]
        for epoch in range(len(units) // 7):
            assert sorted(units[7 * epoch : 7 * epoch + 7]) == list(range(7))


@given(st.lists(st.integers(1, 50), max_size=60))
def test_bins_hold_every_item_once_and_never_overflow(lengths: list[int]) -> None:
    bins = best_fit(lengths, 50)
    assert sorted(item for one in bins for item in one) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in one) <= 50 for one in bins)
    assert len(bins) <= max(1, 2 * -(-sum(lengths) // 50))


def test_batches_predict_targets_from_the_row_before() -> None:
    a = (np.array([5, 6, 7], np.int32), np.array([1, 0, 1], np.uint8))
    b = (np.array([8, 9], np.int32), np.array([0, 1], np.uint8))
    batch = collate([a, b])
    assert batch.ids_N.tolist() == [5, 6, 7, 8, 9]
    assert batch.rows_M.tolist() == [1, 3]
    assert batch.targets_M.tolist() == [7, 9]
    assert batch.targets_per_sequence == (1, 1)
    assert batch.batch.layout.cu_seqlens == (0, 3, 5)
