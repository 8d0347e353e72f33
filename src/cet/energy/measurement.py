"""What the protocol measured, window by window, and the figures that follow from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cet.energy.domains import (
    SYSTEMATIC,
    DeviceFacts,
    DeviceState,
    Domain,
    DomainEnergy,
    EnergyReading,
    Flag,
    Source,
    Unavailable,
    with_domain,
)
from cet.energy.statistics import Estimate
from cet.measure.statistics import INTERVAL_ROUNDS, mean_interval

IDLE = "idle"
"""The name of the idle windows among the workloads."""

Quantity = Literal["seconds", "joules", "net_joules", "watts"]
"""Per sample: time, joules as counted, joules above idle; ``watts`` is the mean power of the windows."""

UNITS: Mapping[Quantity, str] = {"seconds": "s", "joules": "J", "net_joules": "J", "watts": "W"}

Terms: TypeAlias = str | Mapping[str, float]
"""A workload, or workloads with the factors of a weighted sum."""


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Args:
        rounds: in each, every workload and idle have one window.
        window: s, the least length of a window; 5, or 0.5 where no energy can be measured.
        update_periods: the least length of a window in update periods of the slowest counter.
        warmup: s of warm-up right before each window, at least.
        warmup_limit: s after which a warm-up ends even if clocks and temperature are not level.
        seed: of the order and of the windows' phases.
        confidence: level of all intervals, in (0, 1).
        assume_watts: W to assume where no energy can be measured; ``None``, and joules are unknown there.

    Raises:
        ValueError: for a number out of range.
    """

    rounds: int = 10
    window: float | None = None
    update_periods: int = 50
    warmup: float = 3.0
    warmup_limit: float = 30.0
    seed: int = 0
    confidence: float = 0.95
    assume_watts: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("update_periods", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; give a whole number >= {least}")
        for name in ("window", "warmup", "warmup_limit", "assume_watts"):
            value = getattr(self, name)
            if value is None and name in ("window", "assume_watts"):
                continue
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}; give a positive number")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence is {self.confidence}; give a level in (0, 1)")


@dataclass(frozen=True)
class WindowRecord:
    """One window.

    Attributes:
        workload: its name, or :data:`IDLE`.
        round_index: from 0; the idle windows before and after all rounds have -1 and ``Settings.rounds``.
        calls: of the workload.
        items: samples that it worked on.
        reading: the meter's.
        before: state of each GPU domain at the end of the warm-up.
        after: and right behind the window.
        flags: what makes the window less than it seems.
        void: why it does not count and was repeated; ``None`` if it counts.
    """

    workload: str
    round_index: int
    calls: int
    items: int
    reading: EnergyReading
    before: Mapping[str, DeviceState]
    after: Mapping[str, DeviceState]
    flags: tuple[Flag, ...] = ()
    void: str | None = None

    @property
    def seconds(self) -> float:
        return self.reading.seconds

    @property
    def watts(self) -> float | None:
        """Mean power of the window; ``None`` if unknown."""
        return None if self.reading.joules is None else self.reading.joules / self.reading.seconds


@dataclass(frozen=True)
class Measurement:
    """All windows of a measurement, and figures from those that count.

    Attributes:
        settings: how it was measured.
        workloads: their names.
        window: s, the least length of a window: what was asked for, or more where the counter changes seldom.
        domains: what the meter measures.
        unavailable: what it cannot measure, and why.
        update_periods: s between two changes of each domain's counter, ``None`` when not known.
        preflight: what was known of each GPU before the first window.
        windows: all of them in the order of time, void ones too.
        status: ``"partial"`` when it was stopped before its end.
        stopped: what stopped it.
        exit_code: of the command line then.
        flags: of all windows that count and of the measurement as a whole.
    """

    settings: Settings
    workloads: tuple[str, ...]
    window: float
    domains: tuple[Domain, ...]
    unavailable: tuple[Unavailable, ...]
    update_periods: Mapping[str, float | None]
    preflight: Mapping[str, DeviceFacts]
    windows: tuple[WindowRecord, ...]
    status: Literal["complete", "partial"]
    stopped: str | None
    exit_code: int
    flags: tuple[Flag, ...]

    @property
    def idle_before(self) -> WindowRecord | None:
        """The idle window before all rounds; ``None`` if it was not finished."""
        return self._rounds().get(-1, {}).get(IDLE)

    @property
    def idle_after(self) -> WindowRecord | None:
        """The idle window after all rounds; ``None`` if it was not finished."""
        return self._rounds().get(self.settings.rounds, {}).get(IDLE)

    def estimate(self, terms: Terms, quantity: Quantity = "joules", *, domain: str | None = None) -> Estimate:
        """A weighted sum over workloads, such as the difference of two, with its interval over the rounds.

        The joules of a sample are those of its window divided among all samples: attributed, not measured.

        Args:
            terms: a workload, or factors by workload.
            quantity: what to sum, per sample.
            domain: of this domain alone; ``None`` for the total of all that do not overlap.
        """
        series = self._by_round((terms,), quantity, domain)
        unit = UNITS[quantity]
        if isinstance(series, str):
            return Estimate(None, None, None, unit, 0, reason=series)
        mean, half = mean_interval(
            series.values[:, 0],
            series.rounds,
            confidence=self.settings.confidence,
            resolution=math.sqrt(series.variances.mean()),
        )
        low, high = (None, None) if half is None else (mean - half, mean + half)
        reason = _without_interval(series) if half is None else None
        systematic = 0.0 if quantity == "seconds" else None if "model" in series.sources else SYSTEMATIC * abs(mean)
        return Estimate(mean, low, high, unit, len(series.rounds), systematic, series.sources, reason)

    def ratio(
        self, numerator: Terms, denominator: Terms, quantity: Quantity = "joules", *, domain: str | None = None
    ) -> Estimate:
        """The geometric mean over the rounds of the ratio of two weighted sums, from paired log-ratios.

        Both sums are of the same round, so that drift cancels, and so does the gain of a counter. A total of several
        counters has several gains, so that the systematic term of its ratios is unknown.
        """
        series = self._by_round((numerator, denominator), quantity, domain)
        if not isinstance(series, str) and series.values.min() <= 0:
            series = "one of the two is not above zero in every round, so that they have no ratio"
        if isinstance(series, str):
            return Estimate(None, None, None, "1", 0, reason=series)
        mean, half = mean_interval(
            np.log(series.values[:, 0] / series.values[:, 1]),
            series.rounds,
            confidence=self.settings.confidence,
            resolution=math.sqrt((series.variances / series.values**2).sum(axis=1).mean()),
        )
        low, high = (None, None) if half is None else (math.exp(mean - half), math.exp(mean + half))
        gains = 0 if quantity == "seconds" else 1 if domain else sum(part.in_total for part in self.domains)
        systematic = None if gains > 1 else 0.0
        reason = _without_interval(series) if half is None else None
        return Estimate(math.exp(mean), low, high, "1", len(series.rounds), systematic, series.sources, reason)

    def _rounds(self) -> dict[int, dict[str, WindowRecord]]:
        """The windows that count, by round and workload."""
        rounds: dict[int, dict[str, WindowRecord]] = {}
        for window in self.windows:
            if window.void is None:
                rounds.setdefault(window.round_index, {})[window.workload] = window
        return rounds

    def _by_round(self, sums: Sequence[Terms], quantity: Quantity, domain: str | None) -> _Series | str:
        """Weighted sums in each round that has all they need; why, if there is none."""
        terms = [{each: 1.0} if isinstance(each, str) else each for each in sums]
        names = set(chain(*terms))
        needed = names | {IDLE} if quantity == "net_joules" else names
        rounds, figures, sources = [], [], set[Source]()
        reason = f"no round with {', '.join(sorted(needed))} was finished"
        for index, windows in self._rounds().items():
            if not needed <= windows.keys():
                continue
            try:
                figures.append([_weighted_sum(windows, each, quantity, domain) for each in terms])
            except _UnknownError as error:
                reason = str(error)
                continue
            rounds.append(index)
            if quantity != "seconds":
                sources.update(part.source for name in names for part in _parts(windows[name], domain) if part.source)
        if not rounds:
            return reason
        table = np.array(figures)
        return _Series(np.array(rounds), table[..., 0], table[..., 1], tuple(sorted(sources)))


class _UnknownError(Exception):
    """A figure of one round is unknown; the message says why."""


class _Series(NamedTuple):
    """Weighted sums in ``rounds`` ``(n,)``: ``values`` and ``variances``, of the counters' updates, ``(n, k)``."""

    rounds: NDArray[np.int64]
    values: NDArray[np.float64]
    variances: NDArray[np.float64]
    sources: tuple[Source, ...]


def _without_interval(series: _Series) -> str:
    return f"an interval needs {INTERVAL_ROUNDS} rounds, and this is of {len(series.rounds)}"


def _weighted_sum(
    windows: Mapping[str, WindowRecord], terms: Mapping[str, float], quantity: Quantity, domain: str | None
) -> tuple[float, float]:
    """The sum in one round, and its variance from the updates of the counters."""
    total = variance = idle_seconds = 0.0
    for name, factor in terms.items():
        window = windows[name]
        if quantity == "seconds":
            total += factor * window.seconds / window.items
            continue
        joules, of_update = _energy(window, domain)
        share = factor / (window.seconds if quantity == "watts" else window.items)
        total += share * joules
        variance += share**2 * of_update
        idle_seconds += share * window.seconds
    if quantity == "net_joules":
        idle = windows[IDLE]
        joules, of_update = _energy(idle, domain)
        total -= idle_seconds / idle.seconds * joules
        variance += (idle_seconds / idle.seconds) ** 2 * of_update
    return total, variance


def _energy(window: WindowRecord, domain: str | None) -> tuple[float, float]:
    """Joules of a window, and their variance from the resolution of the counters, which move once per update period."""
    joules = variance = 0.0
    parts = _parts(window, domain)
    if not parts:
        reasons = (with_domain(name, reason) for name, reason in window.reading.reasons.items())
        raise _UnknownError("; ".join(reasons) or "no counter was to be read")
    for part in parts:
        if part.joules is None:
            raise _UnknownError(with_domain(part.domain, part.reason))
        joules += part.joules
        if part.source == "counter" and part.update_period is not None:
            variance += (part.joules / window.seconds * part.update_period) ** 2 / 12
    return joules, variance


def _parts(window: WindowRecord, domain: str | None) -> list[DomainEnergy]:
    """The domains that add to the figure."""
    return [part for part in window.reading.domains if (part.in_total if domain is None else part.domain == domain)]
