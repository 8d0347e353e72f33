"""One window of an energy meter: counters at its edges, power over it, and the joules that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Protocol

from cet.energy.clock import Clock
from cet.energy.domains import (
    CounterReading,
    DeviceLostError,
    Domain,
    DomainEnergy,
    EnergyReading,
    Flag,
    PowerSample,
    ReadingError,
    Unavailable,
)
from cet.energy.nvml import Gpu

Edge = CounterReading | ReadingError | DeviceLostError

SAMPLE_PERIOD = 0.05
"""s between two power samples: half of the 100 ms after which recent GPUs renew them."""

MAX_GAP = 1.0
"""s between two power samples over which power may still be taken for a straight line."""

MAX_DISAGREEMENT = 0.05
"""Difference of counter and integral, relative to the larger one, beyond which it is flagged."""


class Meterable(Protocol):
    """A domain that a window can measure. A GPU may have power only; its source is then the integral."""

    @property
    def domain(self) -> Domain: ...

    def read(self) -> CounterReading: ...

    def fault(self, start: CounterReading, end: CounterReading) -> tuple[Flag, str] | None: ...


class Window:
    """From its making to :meth:`end`; it must be ended or abandoned, as it may hold a thread.

    Args:
        meterables: what to measure.
        clock: of the meter.
        integral: whether to sample the power of all GPUs; where there is no counter, it is sampled in any case.

    Raises:
        DeviceLostError: when a GPU is lost.
    """

    def __init__(self, meterables: Sequence[Meterable], clock: Clock, *, integral: bool) -> None:
        self._meterables = meterables
        self._clock = clock
        gpus = [m for m in meterables if isinstance(m, Gpu) and (integral or m.domain.source == "integral")]
        self._sampler = PowerSampler(gpus, clock)
        try:
            self._start = clock.now()
            self._edges = [_edge(meterable) for meterable in meterables]
            for failure in (*self._sampler.lost.values(), *self._edges):
                if isinstance(failure, DeviceLostError):
                    raise failure
        except BaseException:
            self.abandon()
            raise

    def end(self, unavailable: Sequence[Unavailable], update_periods: Mapping[str, float]) -> EnergyReading:
        """The energy of all domains.

        Args:
            unavailable: what the meter cannot measure, to be passed on.
            update_periods: s between two changes of the counters, where known, by domain.

        Raises:
            DeviceLostError: when a GPU was lost; its ``reading`` is that of the window without it.
        """
        stop = self._clock.now()
        edges = [_edge(meterable) for meterable in self._meterables]
        self.abandon()
        lost = dict(self._sampler.lost)
        rows = []
        for meterable, first, last in zip(self._meterables, self._edges, edges, strict=True):
            name = meterable.domain.name
            if isinstance(last, DeviceLostError):
                lost[name] = last
            rows.append(self._energy(meterable, first, lost.get(name, last), stop, update_periods.get(name)))
        reading = EnergyReading(self._start, stop - self._start, tuple(rows), tuple(unavailable))
        for error in lost.values():
            error.reading = reading
            raise error
        return reading

    def abandon(self) -> None:
        """Stop sampling."""
        self._sampler.stop()

    def _energy(
        self, meterable: Meterable, first: Edge, last: Edge, stop: float, update_period: float | None
    ) -> DomainEnergy:
        domain = meterable.domain
        samples = self._sampler.samples.get(domain.name)
        by_counter, flag, reason = _by_counter(meterable, first, last, update_period or 0.0)
        by_integral = None if samples is None else integral(samples, self._start, stop)
        flags = [] if flag is None else [flag]
        if samples is not None and by_integral is None:
            flags.append(Flag.INTEGRAL_FAILED)
        if by_integral is not None and isinstance(meterable, Gpu) and meterable.power.kind != "instant":
            flags.append(Flag.INTEGRAL_OF_AVERAGE)

        joules, source = by_counter, domain.source
        if by_counter is None:
            # After a reset or a failure the window itself is in doubt: it is void, whatever its power was.
            still = flag in (None, Flag.COUNTER_FROZEN, Flag.SHORT_WINDOW)
            joules, source = by_integral if still else None, "integral"
            if Flag.INTEGRAL_FAILED in flags:
                reason = f"{reason}; its power was not known for more than {MAX_GAP:g} s"
        elif by_integral is not None and abs(by_counter - by_integral) > MAX_DISAGREEMENT * max(
            by_counter, by_integral
        ):
            flags.append(Flag.COUNTER_DISAGREES)
        return DomainEnergy(
            domain=domain.name,
            device=domain.device,
            scope=domain.scope,
            in_total=domain.in_total,
            joules=joules,
            source=None if joules is None else source,
            reason=reason,
            counter_joules=by_counter,
            integral_joules=by_integral,
            start=first if isinstance(first, CounterReading) else None,
            end=last if isinstance(last, CounterReading) else None,
            samples=tuple(samples or ()),
            update_period=update_period,
            flags=tuple(flags),
        )


class PowerSampler:
    """Samples the power of some GPUs: at once, periodically in the background, and when it is stopped.

    With no GPUs nothing runs.

    Attributes:
        samples: by domain.
        lost: the error of each GPU that was lost, by domain.
    """

    def __init__(self, gpus: Sequence[Gpu], clock: Clock) -> None:
        self.samples: dict[str, list[PowerSample]] = {gpu.label: [] for gpu in gpus}
        self.lost: dict[str, DeviceLostError] = {}
        self._gpus = list(gpus)
        self._clock = clock
        self._sample()
        self._cancel = clock.every(SAMPLE_PERIOD, self._sample) if gpus else None

    def stop(self) -> None:
        """Take the last samples; a second call does nothing."""
        if self._cancel:
            self._cancel()
            self._cancel = None
            self._sample()

    def _sample(self) -> None:
        for gpu in list(self._gpus):
            try:
                watts = gpu.power.watts()
            except ReadingError:
                continue  # the gap in the samples shows it
            except DeviceLostError as error:
                self.lost[gpu.label] = error
                self._gpus.remove(gpu)
            else:
                self.samples[gpu.label].append(PowerSample(self._clock.now(), watts))


def integral(samples: Sequence[PowerSample], start: float, end: float) -> float | None:
    """Joules between two times by the trapezoid rule; ``None`` if the samples leave a gap, at the edges or within."""
    times = [start, *(min(max(sample.time, start), end) for sample in samples), end]
    if not samples or any(b - a > MAX_GAP for a, b in pairwise(times)):
        return None
    watts = [samples[0].watts, *(sample.watts for sample in samples), samples[-1].watts]
    return sum((t1 - t0) * (p0 + p1) / 2 for (t0, t1), (p0, p1) in zip(pairwise(times), pairwise(watts), strict=True))


def _edge(meterable: Meterable) -> Edge:
    domain = meterable.domain
    if domain.source == "integral":
        return ReadingError(domain.reason or "")
    try:
        return meterable.read()
    except (ReadingError, DeviceLostError) as failure:
        return failure


def _by_counter(
    meterable: Meterable, first: Edge, last: Edge, update_period: float
) -> tuple[float | None, Flag | None, str | None]:
    """Joules by a counter that moves every ``update_period`` s; if there are none, what to flag, and why."""
    domain = meterable.domain
    if domain.source == "integral" and not isinstance(last, DeviceLostError):
        return None, None, domain.reason
    if not isinstance(first, CounterReading) or not isinstance(last, CounterReading):
        return None, Flag.COUNTER_FAILED, str(first if isinstance(last, CounterReading) else last)
    if fault := meterable.fault(first, last):
        return None, *fault
    if last.raw == first.raw:
        seconds = last.time - first.time
        if seconds < 2 * update_period:
            reason = f"the window of {1e3 * seconds:.3g} ms is too short for a counter that moves every"
            return None, Flag.SHORT_WINDOW, f"{domain.name}: {reason} {1e3 * update_period:.3g} ms"
        reason = f"{domain.name}: the counter stood at {last.raw} {last.unit} for {seconds:.2f} s"
        return None, Flag.COUNTER_FROZEN, reason
    return last.joules - first.joules, None, None
