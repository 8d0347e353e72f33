"""Looks at the power of this machine, and at where the samples of a model leave, again and again."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import cycle
from typing import TYPE_CHECKING, Any

from cet.energy.domains import EnergyReading, NoCounterError, with_domain
from cet.energy.meter import EnergyMeter

if TYPE_CHECKING:
    from cet.model.early_exit import EarlyExit


@dataclass(frozen=True)
class Look:
    """What is seen at one moment.

    Attributes:
        time: of day, ISO 8601.
        seconds: since the look before.
        watts: by domain; ``None`` if unknown.
        reasons: why, by domain.
        samples_per_second: that the model ran since then; ``None`` without one.
        exit_rates: the fraction of them that left at each exit.
    """

    time: str
    seconds: float
    watts: Mapping[str, float | None]
    reasons: Mapping[str, str]
    samples_per_second: float | None
    exit_rates: Mapping[str, float] | None


class Traffic:
    """A model at work on its data, again and again."""

    def __init__(self, model: EarlyExit, batches: Sequence[tuple[Any, Any]]) -> None:
        self._model = model
        self._batches = cycle(batches)

    def run(self, until: float) -> dict[str, int]:
        """Run at least one batch, and on until a time of the monotonic clock; how many samples left at each exit."""
        from cet.data.batches import call

        counts = dict.fromkeys(self._model.exit_names, 0)
        while True:
            x, _ = next(self._batches)
            for index in call(self._model.predict, x).exit_index.tolist():
                counts[self._model.exit_names[index]] += 1
            if time.monotonic() >= until:
                return counts


def require_power(gpus: EnergyMeter, cpus: EnergyMeter) -> None:
    """Refuse to look where there is nothing to see.

    Raises:
        NoCounterError: when neither of the open meters has a domain, with the reasons.
    """
    if not gpus.domains and not cpus.domains:
        reasons = "; ".join(with_domain(row.domain, row.reason) for row in (*gpus.unavailable, *cpus.unavailable))
        raise NoCounterError(f"no power can be seen ({reasons}); give a model and data to watch exit rates alone")


def looks(
    gpus: EnergyMeter, cpus: EnergyMeter, traffic: Traffic | None, *, interval: float, duration: float | None
) -> Iterator[Look]:
    """A look at the end of every interval.

    Args:
        gpus: an open meter of GPUs, whose power is asked for; their energy counters are left alone.
        cpus: an open meter of the CPU, whose energy counters are read.
        traffic: what runs meanwhile.
        interval: s between two looks.
        duration: s until the last one; ``None`` goes on for ever.

    Raises:
        DeviceLostError: when a GPU is lost.
    """
    began = last = time.monotonic()
    while duration is None or last - began < duration:
        cpus.start()
        counts = None
        if traffic:
            counts = traffic.run(last + interval)
        else:
            time.sleep(max(0.0, last + interval - time.monotonic()))
        reading = cpus.stop()
        seconds, last = time.monotonic() - last, time.monotonic()
        yield _look(gpus, reading, counts, seconds)


def _look(gpus: EnergyMeter, cpus: EnergyReading, counts: Mapping[str, int] | None, seconds: float) -> Look:
    watts = {domain.name: gpus.state(domain.name).watts for domain in gpus.domains}
    reasons = {name: "the GPU does not report its power" for name, value in watts.items() if value is None}
    reasons |= {missing.domain: missing.reason for missing in gpus.unavailable}
    for part in cpus.domains:
        watts[part.domain] = None if part.joules is None else part.joules / cpus.seconds
    reasons |= cpus.reasons
    total = sum(counts.values()) if counts else 0
    return Look(
        time=datetime.now(UTC).isoformat(timespec="milliseconds"),
        seconds=seconds,
        watts=watts | dict.fromkeys(reasons.keys() - watts.keys()),
        reasons=reasons,
        samples_per_second=total / seconds if counts else None,
        exit_rates={name: count / total for name, count in counts.items()} if counts else None,
    )
