"""Intervals for figures that are measured once per round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from cet.energy.domains import Source

INTERVAL_ROUNDS = 3
"""Rounds that an interval needs: a level, a drift, and one degree of freedom for the scatter."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its two errors.

    Attributes:
        value: in ``unit``; ``None`` if unknown, never 0 for it.
        low: lower end of the confidence interval, of the statistical error alone; ``None`` with fewer than
            :data:`INTERVAL_ROUNDS` rounds.
        high: its upper end.
        unit: ``"J"``, ``"s"``, ``"W"``, or ``"1"`` for ratios.
        rounds: how many rounds the figure is of.
        systematic: half width in ``unit`` of the error that all rounds share, such as the gain of a counter, which no
            repetition shows; ``None`` where nobody knows it.
        sources: where the joules come from.
        reason: why ``value`` is ``None``, or else why it has no interval.
    """

    value: float | None
    low: float | None
    high: float | None
    unit: str
    rounds: int
    systematic: float | None = None
    sources: tuple[Source, ...] = ()
    reason: str | None = None

    def excludes(self, value: float) -> bool:
        """Whether there is an interval and ``value`` lies outside."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high


def mean_interval(
    values: Sequence[float] | NDArray[np.float64],
    rounds: Sequence[int] | NDArray[np.int64],
    *,
    confidence: float = 0.95,
    resolution: float = 0.0,
) -> tuple[float, float | None]:
    """The mean of one value per round and the half width of its confidence interval, by Student's t.

    A drift that is linear in the rounds moves the mean of a whole measurement little, but would count as scatter, so it
    is fitted and taken out of the scatter, at the price of a degree of freedom. And windows whose length is close to a
    multiple of the counter's tick often show no scatter at all although each is wrong by a part of a tick: so the
    scatter is never taken for less than ``resolution`` (JCGM 100:2008, F.2.2.1).

    Args:
        values: ``(n,)``.
        rounds: ``(n,)``, when each was taken.
        confidence: level of the interval, in (0, 1).
        resolution: standard deviation of one value from the resolution of the instrument alone.

    Returns:
        the mean, and the half width, which is ``None`` for fewer than :data:`INTERVAL_ROUNDS` values.
    """
    y = np.asarray(values, dtype=np.float64)
    x = np.asarray(rounds, dtype=np.float64) - np.mean(rounds)
    mean = float(y.mean())
    if len(y) < INTERVAL_ROUNDS:
        return mean, None
    residuals = y - mean - x * (x @ y) / (x @ x)
    freedom = len(y) - 2
    deviation = max(math.sqrt(residuals @ residuals / freedom), resolution)
    return mean, float(stdtrit(freedom, (1 + confidence) / 2)) * deviation / math.sqrt(len(y))
