"""What this machine can measure: each counter is tried in a window, and the state of its device is looked at."""

from __future__ import annotations

from dataclasses import dataclass

from cet.energy.clock import Clock
from cet.energy.domains import (
    DeviceFacts,
    DeviceLostError,
    DeviceState,
    Domain,
    Source,
    Unavailable,
)
from cet.energy.meter import EnergyMeter, no_counter


@dataclass(frozen=True)
class Measurable:
    """A domain whose joules came out of a window.

    Attributes:
        domain: what it is.
        source: where the joules came from.
        reason: why not from the counter; ``None`` if they did.
        update_period: s between two changes of the counter; ``None`` when not known.
        state: how the device is.
        facts: what a measurement should know of a GPU; ``None`` for the CPU.
    """

    domain: Domain
    source: Source
    reason: str | None
    update_period: float | None
    state: DeviceState
    facts: DeviceFacts | None


@dataclass(frozen=True)
class Examination:
    """What can be measured, and what cannot."""

    measurable: tuple[Measurable, ...]
    unavailable: tuple[Unavailable, ...]

    def require_gpu(self) -> None:
        """Refuse a machine on which the joules of no GPU came out.

        Raises:
            NoCounterError: with the reasons.
        """
        if not any(found.domain.name.startswith("gpu") for found in self.measurable):
            raise no_counter("GPU's joules", [row for row in self.unavailable if row.domain.startswith("gpu")])


def examine(*, rapl: bool = True, clock: Clock | None = None) -> Examination:
    """Try everything that this machine may have; it takes the time of ten updates of each counter.

    A window shows it: a counter can answer and yet stand still, in whose place there may be power. Where the
    GPUs that were asked for cannot be measured, or one is lost meanwhile, the CPU is examined alone.

    Args:
        rapl: whether to look at the CPU.
        clock: by default the system's monotonic clock.
    """
    try:
        with EnergyMeter(rapl=rapl, clock=clock).opened() as meter:
            return _examined(meter)
    except Exception as error:  # whatever is wrong here, an examination must come out
        gpus = Unavailable("gpu", str(error) or type(error).__name__, lost=isinstance(error, DeviceLostError))
    if not rapl:
        return Examination((), (gpus,))
    try:
        with EnergyMeter([], clock=clock).opened() as meter:
            cpu = _examined(meter)
    except Exception as error:
        cpu = Examination((), (Unavailable("rapl", str(error) or type(error).__name__),))
    return Examination(cpu.measurable, (gpus, *cpu.unavailable))


def _examined(meter: EnergyMeter) -> Examination:
    meter.start(integral=True)
    periods = {domain.name: meter.measure_update_period(domain.name) for domain in meter.domains}
    reading = meter.stop()
    measurable, unavailable = [], list(meter.unavailable)
    for domain in meter.domains:
        energy = reading[domain.name]
        if energy.source is None:
            unavailable.append(Unavailable(domain.name, energy.reason or ""))
            continue
        state, facts = meter.state(domain.name), meter.facts(domain.name)
        measurable.append(Measurable(domain, energy.source, energy.reason, periods[domain.name], state, facts))
    return Examination(tuple(measurable), tuple(unavailable))
