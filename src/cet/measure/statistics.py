"""The spread of a figure that is measured once per round, and intervals for its mean or for any statistic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

INTERVAL_ROUNDS = 3
"""The rounds that an interval of a mean needs: a level, a drift, and one degree of freedom for the scatter."""


@dataclass(frozen=True)
class Spread:
    """The median and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Floats) -> Spread:
        p20, median, p80 = np.percentile(values, (20, 50, 80))
        return cls(float(median), float(p20), float(p80))


def mean_interval(
    values: Sequence[float] | Floats,
    rounds: Sequence[int] | NDArray[np.int64],
    *,
    confidence: float = 0.95,
    resolution: float = 0.0,
) -> tuple[float, float | None]:
    """The mean of one value per round and the half width of its confidence interval, by Student's t.

    A drift that is linear in the rounds moves the mean of a whole measurement little, but would count as scatter, so it
    is fitted and taken out of the scatter, at the price of a degree of freedom. And windows whose length is close to a
    multiple of a counter's update period often show no scatter at all although each is wrong by a part of a period: so
    the scatter is never taken for less than ``resolution`` (JCGM 100:2008, F.2.2.1).

    Args:
        values: ``(n,)``.
        rounds: ``(n,)``, when each was taken.
        confidence: level of the interval, in (0, 1).
        resolution: standard deviation of one value from the resolution of the instrument alone.

    Returns:
        the mean, and the half width, which is ``None`` for fewer than :data:`INTERVAL_ROUNDS` values.
    """
    from scipy.special import stdtrit  # here, because it takes half a second to import

    y = np.asarray(values, dtype=np.float64)
    x = np.asarray(rounds, dtype=np.float64) - np.mean(rounds)
    mean = float(y.mean())
    if len(y) < INTERVAL_ROUNDS:
        return mean, None
    residuals = y - mean - x * (x @ y) / (x @ x)
    freedom = len(y) - 2
    deviation = max(math.sqrt(residuals @ residuals / freedom), resolution)
    return mean, float(stdtrit(freedom, (1 + confidence) / 2)) * deviation / math.sqrt(len(y))


def bootstrap_interval(
    statistic: Callable[..., Floats],
    *series: Floats,
    rng: np.random.Generator,
    confidence: float = 0.95,
    num_resamples: int = 2000,
) -> tuple[float, float, float]:
    """A statistic of series that belong together round by round, and the ends of its percentile interval.

    The rounds are drawn with replacement (Efron & Tibshirani 1993, chapter 13).

    Args:
        statistic: takes the series, each ``(..., n)``, and reduces the last dimension.
        series: each ``(n,)``, one value per round.
        rng: draws the rounds.
        confidence: level of the interval, in (0, 1).
        num_resamples: how often the rounds are drawn.

    Returns:
        the value of the statistic, and the lower and the upper end.
    """
    num_rounds = len(series[0])
    drawn = rng.integers(num_rounds, size=(num_resamples, num_rounds))
    tail = 50 * (1 - confidence)
    low, high = np.percentile(statistic(*(values[drawn] for values in series)), [tail, 100 - tail])
    return float(statistic(*series)), float(low), float(high)
