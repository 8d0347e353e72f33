"""Whether one workload takes more energy, or time, per sample than another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cet.energy.measurement import Measurement, Quantity, Settings, WindowRecord
from cet.energy.meter import EnergyMeter
from cet.energy.protocol import Progress, Workload, measure
from cet.energy.statistics import Estimate

Verdict = Literal["less", "more", "not distinguishable", "unknown"]


@dataclass(frozen=True)
class Contrast:
    """Two workloads in one quantity.

    Attributes:
        quantity: per sample.
        domain: of this domain alone; ``None`` for time, and for the total of the domains that do not overlap.
        a: of the first workload.
        b: of the second.
        ratio: ``a / b``, the geometric mean over the rounds, from paired log-ratios.
    """

    quantity: Quantity
    domain: str | None
    a: Estimate
    b: Estimate
    ratio: Estimate

    @property
    def verdict(self) -> Verdict:
        """Whether A takes less or more than B: ``"not distinguishable"`` if the interval of the ratio holds 1, and
        ``"unknown"`` if there is none."""
        if self.ratio.low is None or self.ratio.high is None:
            return "unknown"
        if self.ratio.high < 1:
            return "less"
        return "more" if self.ratio.low > 1 else "not distinguishable"


@dataclass(frozen=True)
class Comparison:
    """Two workloads in time and energy.

    Attributes:
        a: name of the first workload.
        b: name of the second.
        contrasts: time, joules and joules above idle in total; and both joules of each domain, where the total is of
            several.
        measurement: the windows behind them.
    """

    a: str
    b: str
    contrasts: tuple[Contrast, ...]
    measurement: Measurement


def compare(
    a: Workload,
    b: Workload,
    meter: EnergyMeter,
    settings: Settings | None = None,
    *,
    progress: Progress | None = None,
    on_window: Callable[[WindowRecord], object] | None = None,
) -> Comparison:
    """Measure two workloads in the same rounds, by :func:`cet.energy.protocol.measure`, and compare them per sample."""
    measurement = measure([a, b], meter, settings, progress=progress, on_window=on_window)
    return comparison_of(measurement, a.name, b.name)


def comparison_of(measurement: Measurement, a: str, b: str) -> Comparison:
    """Compare two workloads of a measurement."""
    parts = [domain.name for domain in measurement.domains]
    of: list[tuple[Quantity, str | None]] = [("seconds", None), ("joules", None), ("net_joules", None)]
    if len(parts) > 1:
        of += [(quantity, part) for part in parts for quantity in ("joules", "net_joules")]
    contrasts = tuple(
        Contrast(
            quantity,
            domain,
            measurement.estimate(a, quantity, domain=domain),
            measurement.estimate(b, quantity, domain=domain),
            measurement.ratio(a, b, quantity, domain=domain),
        )
        for quantity, domain in of
    )
    return Comparison(a, b, contrasts, measurement)
