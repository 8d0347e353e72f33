"""The choice of buckets, against trying all of them."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cet.runtime.buckets import choose_buckets, geometric_buckets, least_padding, survivor_weights


def padding(weights: np.ndarray, buckets: tuple[int, ...]) -> float:
    return sum(w * (min(b for b in buckets if b >= n) - n) for n, w in enumerate(weights) if n > 0)


@given(
    weights=st.lists(st.floats(0, 1), min_size=2, max_size=10).map(np.array),
    limit=st.integers(1, 12),
)
def test_no_other_buckets_need_less_padding(weights: np.ndarray, limit: int) -> None:
    got = least_padding(weights, limit)
    capacity = len(weights) - 1
    assert len(got) <= limit
    assert got[-1] == capacity
    assert list(got) == sorted(set(got))
    others = (
        (*chosen, capacity) for size in range(min(limit, capacity)) for chosen in combinations(range(1, capacity), size)
    )
    assert padding(weights, got) == pytest.approx(min(padding(weights, other) for other in others), abs=1e-12)


def test_buckets_go_where_the_survivors_are() -> None:
    weights = np.zeros(101)
    weights[[10, 40, 41]] = 1.0, 2.0, 1.0
    assert least_padding(weights, 3) == (10, 41, 100)
    assert least_padding(weights, 1) == (100,)


def test_large_batches_have_few_candidates() -> None:
    weights = survivor_weights([5000], 0.3)
    got = least_padding(weights, 4)
    assert got[-1] == 5000
    assert any(1500 <= bucket < 1600 for bucket in got)
    assert padding(weights, got) < padding(weights, geometric_buckets(5000, 4)) / 2


@pytest.mark.parametrize(
    ("capacity", "limit", "expected"),
    [
        (1, 8, (1,)),
        (2, 8, (1, 2)),
        (64, 8, (1, 2, 4, 8, 16, 32, 64)),
        (100, 8, (1, 2, 3, 6, 12, 25, 50, 100)),
        (64, 1, (64,)),
        (64, 2, (1, 64)),
        (1000, 4, (1, 10, 100, 1000)),
    ],
)
def test_geometric_buckets(capacity: int, limit: int, expected: tuple[int, ...]) -> None:
    assert geometric_buckets(capacity, limit) == expected


@given(capacity=st.integers(1, 5000), limit=st.integers(1, 10))
def test_geometric_buckets_keep_their_limits(capacity: int, limit: int) -> None:
    buckets = geometric_buckets(capacity, limit)
    assert buckets[-1] == capacity
    assert 1 <= len(buckets) <= limit
    assert limit == 1 or buckets[0] == 1 or buckets[0] <= max(1, capacity // 2 ** (limit - 1))


@pytest.mark.parametrize("survival", [0.0, 0.3, 1.0])
def test_batches_of_every_size_weigh_by_their_share(survival: float) -> None:
    weights = survivor_weights([4, 16], survival)
    counts = np.arange(17)
    assert weights.sum() == pytest.approx(1 / 4 + 1 / 16)
    mean = 0.9 * survival * 2 + 0.1  # each size adds its mean over itself
    assert (weights * counts).sum() == pytest.approx(mean)


def test_the_first_segment_and_those_behind_open_exits_get_buckets() -> None:
    assert choose_buckets(16, [0, 2], None, 3) == [(1, 4, 16)] * 3
    first, behind_one, behind_two = choose_buckets(64, [0, 2], (0.9, 0.5, 0.1), 3)
    assert first == (1, 8, 64)
    for survival, buckets in ((0.9, behind_one), (0.1, behind_two)):
        weights = survivor_weights(first, survival)
        assert len(buckets) == 3
        assert padding(weights, buckets) <= padding(weights, first)
    assert behind_two != behind_one
    assert choose_buckets(64, [], None, 3) == [first]
