"""A figure with its errors."""

from __future__ import annotations

from cet.energy.statistics import Estimate


def test_an_estimate_excludes_what_is_outside_its_interval() -> None:
    estimate = Estimate(1.0, 0.9, 1.1, "1", 10)
    assert estimate.excludes(1.2)
    assert estimate.excludes(0.8)
    assert not estimate.excludes(1.1)
    assert not Estimate(1.0, None, None, "1", 2).excludes(5.0)
