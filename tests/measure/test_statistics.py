"""Intervals against a textbook regression, and how often they hold the truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from cet.measure.statistics import Floats, bootstrap_interval, mean_interval

RUNS = 4000


@pytest.mark.parametrize("confidence", [0.9, 0.95])
@pytest.mark.parametrize("rounds", [[0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 3, 4, 7]])
def test_interval_is_that_of_a_regression_on_the_round_at_its_middle(rounds: list[int], confidence: float) -> None:
    y = np.random.default_rng(3).normal(50, 2, len(rounds))
    design = np.column_stack([np.ones(len(y)), np.array(rounds) - np.mean(rounds)])
    solution, (squares,), *_ = np.linalg.lstsq(design, y, rcond=None)
    freedom = len(y) - 2
    error = np.sqrt(squares / freedom * np.linalg.inv(design.T @ design)[0, 0])
    mean, half = mean_interval(y, rounds, confidence=confidence)
    assert mean == pytest.approx(solution[0], rel=1e-12)
    assert half == pytest.approx(stats.t.interval(confidence, freedom, scale=error)[1], rel=1e-9)


def test_a_linear_drift_is_no_scatter() -> None:
    mean, half = mean_interval([10.0, 11.0, 12.0, 13.0], [0, 1, 2, 3])
    assert mean == 11.5
    assert half == pytest.approx(0, abs=1e-12)


def test_scatter_is_never_less_than_the_resolution() -> None:
    _, half = mean_interval([7.0] * 10, range(10), resolution=0.5)
    assert half == pytest.approx(stats.t.ppf(0.975, 8) * 0.5 / np.sqrt(10), rel=1e-9)
    y = np.random.default_rng(0).normal(0, 1, 10)
    assert mean_interval(y, range(10), resolution=0.1) == mean_interval(y, range(10))


@pytest.mark.parametrize("rounds", [1, 2])
def test_too_few_rounds_have_a_mean_and_no_interval(rounds: int) -> None:
    assert mean_interval([4.0] * rounds, range(rounds)) == (4.0, None)


@pytest.mark.parametrize("drift", [0.0, 5.0])
def test_intervals_hold_the_mean_as_often_as_they_say(drift: float) -> None:
    rng = np.random.default_rng(1)
    rounds = np.arange(10)
    held = 0
    for y in rng.normal(100, 1, (RUNS, 10)) + drift * (rounds - 4.5):
        mean, half = mean_interval(y, rounds)
        assert half is not None
        held += abs(mean - 100) <= half
    assert held / RUNS == pytest.approx(0.95, abs=0.012)  # 3.5 standard deviations of the share


def test_bootstrap_intervals_hold_the_ratio_of_means_as_often_as_they_say() -> None:
    def ratio_of_means(a: Floats, b: Floats) -> Floats:
        return a.mean(axis=-1) / b.mean(axis=-1)

    rng = np.random.default_rng(2)
    held = 0
    for _ in range(1000):
        common = rng.normal(0, 0.2, 60)  # what slows a round slows both
        a, b = 2 + common + rng.normal(0, 0.1, 60), 1 + common / 2 + rng.normal(0, 0.1, 60)
        value, low, high = bootstrap_interval(ratio_of_means, a, b, rng=rng, num_resamples=400)
        assert value == a.mean() / b.mean()
        held += low <= 2 <= high
    assert held / 1000 == pytest.approx(0.95, abs=0.025)  # percentile intervals of 60 rounds are a little short
