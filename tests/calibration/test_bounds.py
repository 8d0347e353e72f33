"""P-values against enumeration, simulation and each other."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cet.calibration import bounds


def score(lost: int, won: int, n: int, bound: float) -> float:
    """Tango's statistic, with the likeliest rate of won samples found by brute force."""
    rates = np.linspace(0, (1 - bound) / 2, 200_001)[1:-1]
    with np.errstate(divide="ignore"):
        likelihood = (
            lost * np.log(rates + bound) + won * np.log(rates) + (n - lost - won) * np.log1p(-2 * rates - bound)
        )
    rate = rates[likelihood.argmax()]
    return (lost - won - n * bound) / math.sqrt(n * (2 * rate + bound * (1 - bound)))


@pytest.mark.parametrize(("n", "bound"), [(12, 0.1), (30, 0.05), (30, 0.2)])
def test_paired_p_value_is_the_largest_tail(n: int, bound: float) -> None:
    """Over every outcome, and two thousand rates of won samples."""
    outcomes = np.array([(a, b) for a, b in product(range(n + 1), repeat=2) if a + b <= n])
    statistics = bounds._score_statistic(outcomes[:, 0], outcomes[:, 1], n, bound)
    rates = np.linspace(0, (1 - bound) / 2, 2000)[:-1]
    chances = np.array(
        [
            stats.multinomial.pmf(
                np.column_stack([outcomes, n - outcomes.sum(1)]), n, [q + bound, q, 1 - 2 * q - bound]
            )
            for q in rates
        ]
    )
    for lost, won in [(0, 0), (0, 1), (1, 2), (2, 4), (0, 5)]:
        statistic = bounds._score_statistic(lost, won, n, bound)
        truth = chances[:, statistics <= statistic + 1e-9].sum(axis=1).max()
        got = bounds.paired(lost, won, n, bound)
        assert got == pytest.approx(truth, rel=0.01)


@pytest.mark.parametrize(("lost", "won"), [(3, 2), (10, 1), (1, 6), (40, 39)])
def test_score_statistic_is_that_of_its_definition(lost: int, won: int) -> None:
    assert bounds._score_statistic(lost, won, 200, 0.05) == pytest.approx(score(lost, won, 200, 0.05), abs=1e-4)


def test_without_wins_or_losses_the_paired_p_value_is_binomial() -> None:
    assert bounds.paired(0, 0, 150, 0.02) == pytest.approx(0.98**150, rel=1e-6)
    assert bounds.binomial(0, 150, 0.02) == pytest.approx(0.98**150)
    assert bounds.paired(3, 3, 150, 0.0) == 1.0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.floats(0.001, 0.5), st.data())
def test_paired_p_value_orders_outcomes(n: int, bound: float, data: st.DataObject) -> None:
    """One more lost sample never makes it smaller, one more won never larger; and the test with a memory agrees."""
    lost = data.draw(st.integers(0, n))
    won = data.draw(st.integers(0, n - lost))
    p_value = bounds.paired(lost, won, n, bound)
    assert 0 <= p_value <= 1
    test = bounds.PairedTest(n, bound)

    def rejects(lost: int, level: float) -> bool:
        return test.rejects(float(test.statistics(np.array([lost]), np.array([won]))[0]), level)

    for level in (0.2, 0.01, 0.05):
        assert rejects(lost, level) == (p_value <= level)
    if lost:
        assert bounds.paired(lost - 1, won, n, bound) <= p_value + 1e-12
        assert rejects(lost - 1, 0.05) >= rejects(lost, 0.05)
    if lost + won < n:
        assert bounds.paired(lost, won + 1, n, bound) <= p_value + 1e-12


LEVEL = 0.1


def broken(p_values: list[float]) -> float:
    """The share of refuted claims that were true, less what may be, in its own deviations."""
    share = np.mean(np.array(p_values) <= LEVEL)
    return float((share - LEVEL) / math.sqrt(LEVEL * (1 - LEVEL) / len(p_values)))


@pytest.mark.parametrize(
    ("n", "bound", "won"), [(60, 0.1, 0.0), (400, 0.02, 0.001), (400, 0.02, 0.1), (1500, 0.01, 0.02)]
)
def test_true_claims_are_refuted_rarely(n: int, bound: float, won: float) -> None:
    """At the edge of the claim, where it is hardest: every method within its level, and the exact test near it."""
    rng = np.random.default_rng(1)
    draws = rng.choice([1.0, -1.0, 0.0], size=(300, n), p=[won + bound, won, 1 - 2 * won - bound])
    lost, wins = (draws > 0).sum(1), (draws < 0).sum(1)
    exact = broken([bounds.paired(int(a), int(b), n, bound) for a, b in zip(lost, wins, strict=True)])
    assert -5.7 < exact < 3
    assert broken([bounds.betting(row, -1, 1, bound, LEVEL) for row in draws]) < 3
    assert broken([bounds.bentkus(float(row.clip(0).mean()), n, bound) for row in draws]) < 3


def test_a_wrong_bound_would_be_seen() -> None:
    rng = np.random.default_rng(1)
    draws = rng.choice([1.0, 0.0], size=(600, 400), p=[0.04, 0.96])
    assert broken([bounds.binomial(int(row.sum()), 400, 0.05) for row in draws]) > 3


def test_betting_adapts_to_the_variance() -> None:
    rng = np.random.default_rng(0)
    quiet = 0.01 + 0.02 * rng.normal(size=400).clip(-2, 2)
    assert bounds.betting(quiet, -1, 1, 0.03, 0.05) < 0.01
    assert bounds.bentkus(float((quiet.mean() + 1) / 2), 400, 0.515) > 0.5
    assert bounds.betting([], -1, 1, 0.03, 0.05) == 1.0
    assert bounds.betting(np.full(50, 1.0), -1, 1, 0.03, 0.05) == 1.0


def test_betting_is_the_capital_of_its_definition() -> None:
    values, bound, level, n = np.array([0.0, 0.5, -0.5, -0.5, 1.0, 0.0]), 0.2, 0.1, 6
    capital, highest, seen = 1.0, 1.0, []
    unit, null = (values + 1) / 2, (bound + 1) / 2
    means: list[float] = []
    for value in unit:
        variance = (0.25 + sum((x - m) ** 2 for x, m in zip(seen, means, strict=True))) / (len(seen) + 1)
        stake = min(math.sqrt(2 * math.log(1 / level) / (n * variance)), bounds.MAX_STAKE / (1 - null))
        capital *= 1 - stake * (value - null)
        highest = max(highest, capital)
        seen.append(value)
        means.append((0.5 + sum(seen)) / (len(seen) + 1))
    assert bounds.betting(values, -1, 1, bound, level) == pytest.approx(1 / highest)


def test_bentkus_by_hand() -> None:
    # 2 of 100, bound 0.1: Hoeffding's exponent is 100 (0.02 log 0.2 + 0.98 log (0.98 / 0.9)).
    hoeffding = math.exp(-100 * (0.02 * math.log(0.2) + 0.98 * math.log(0.98 / 0.9)))
    assert bounds.bentkus(0.02, 100, 0.1) == pytest.approx(min(hoeffding, math.e * stats.binom.cdf(2, 100, 0.1)))
    assert bounds.bentkus(0.1, 100, 0.1) == 1.0
