"""A figure with its statistical and its systematic error, or the reason why it is unknown."""

from __future__ import annotations

from dataclasses import dataclass

from cet.energy.domains import Source


@dataclass(frozen=True)
class Estimate:
    """A figure with its two errors.

    Attributes:
        value: in ``unit``; ``None`` if unknown, never 0 for it.
        low: lower end of the confidence interval, of the statistical error alone; ``None`` with fewer than
            :data:`cet.measure.statistics.INTERVAL_ROUNDS` rounds.
        high: its upper end.
        unit: ``"J"``, ``"s"``, ``"W"``, or ``"1"`` for ratios.
        rounds: the number of rounds that the figure is of.
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
