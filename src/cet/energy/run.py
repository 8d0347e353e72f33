"""The joules while a command runs: one window from its start to its end."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from typing import Any

from cet.energy import process, report
from cet.energy.checks import idle_drifts, window_flags
from cet.energy.domains import (
    CounterFrozenError,
    CounterUnstableError,
    DeviceLostError,
    DeviceState,
    EnergyError,
    EnergyReading,
    Flag,
    Source,
    unique,
)
from cet.energy.figures import window_figures
from cet.energy.meter import EnergyMeter
from cet.energy.protocol import estimated
from cet.signals import Stopped

WRAP = 30.0
"""s, within which counters that wrap are read."""


@dataclass(frozen=True)
class MeasuredCommand:
    """A command that ended, and its window.

    Attributes:
        arguments: the program and its arguments.
        ended: how it ended.
        reading: of its window.
        idle: windows of the idle machine, before and after.
        flags: what makes the figures less than they seem.
        failure: of the measurement.
        stopped: why the document is partial; ``None`` if it is complete.
        interrupted: the exit code of a signal that came behind the command; 0 if none did.
    """

    arguments: tuple[str, ...]
    ended: process.Ended
    reading: EnergyReading
    idle: tuple[EnergyReading, ...]
    flags: tuple[Flag, ...]
    failure: EnergyError | None
    stopped: str | None
    interrupted: int = 0

    @property
    def exit_code(self) -> int:
        """The command's own, or that of the failure or the signal if the command succeeded."""
        return self.ended.exit_code or (self.failure.exit_code if self.failure else self.interrupted)

    def document(self) -> dict[str, Any]:
        """For the report."""
        measurement = {
            "window": report.plain_reading(self.reading),
            "idle": [report.plain_reading(reading) for reading in self.idle],
            "unavailable": [report.plain(missing) for missing in self.reading.unavailable],
        }
        about = {
            "command": list(self.arguments),
            "exit_code": self.ended.exit_code,
            "host": {"platform": platform.platform()},
        }
        figures = window_figures(self.reading, self.idle)
        return report.document("run", figures, [measurement], flags=self.flags, stopped=self.stopped, about=about)


def measure(
    meter: EnergyMeter,
    arguments: tuple[str, ...],
    mask: process.Mask,
    *,
    idle: float,
    assume_watts: float | None,
) -> MeasuredCommand:
    """Run a command within :func:`process.signals_held`, and measure it.

    Args:
        meter: an open one.
        arguments: the program and its arguments.
        mask: the signal mask for it.
        idle: s to measure the idle machine before and after.
        assume_watts: W to assume; ``None`` to measure.

    Raises:
        CommandError: when it cannot be started.
        Stopped: for a signal that comes before it was.
        DeviceLostError: for a GPU that is lost then.
    """
    periods = {domain.name: meter.measure_update_period(domain.name) for domain in meter.domains}
    standing = any(name.startswith("gpu:") and period is None for name, period in periods.items())
    integral = standing or None  # else as the meter was made
    idle_readings = [_idle(meter, idle, integral)] if idle else []
    ended, reading, failure, flags = _command(meter, arguments, mask, integral)
    stopped = f"{' and '.join(ended.stopped_by)} while the command ran" if ended.stopped_by else None
    interrupted = 0
    if idle and failure is None:
        try:
            idle_readings.append(_idle(meter, idle, integral))
        except Stopped as signal:
            stopped = stopped or f"{signal} while the idle machine was measured"
            interrupted = signal.exit_code
        else:
            if idle_drifts(*(each.joules and each.joules / each.seconds for each in idle_readings)):
                flags.append(Flag.IDLE_DRIFT)
    if assume_watts is not None:
        reading = estimated(reading, assume_watts)
        flags.append(Flag.MODELLED)
    return MeasuredCommand(
        arguments,
        ended,
        reading,
        tuple(idle_readings),
        unique(flags),
        failure,
        str(failure) if failure else stopped,
        interrupted,
    )


def _command(
    meter: EnergyMeter, arguments: tuple[str, ...], mask: process.Mask, integral: bool | None
) -> tuple[process.Ended, EnergyReading, EnergyError | None, list[Flag]]:
    """Run the command in a window: how it ended, the reading, why that failed, and its flags."""
    shared, before = _are_shared(meter), _states(meter)
    meter.start(integral=integral)
    ended = process.run_command(arguments, mask, every=WRAP, action=meter.read_wrapping)
    failure: EnergyError | None
    try:
        reading = meter.stop()
    except DeviceLostError as error:
        if error.reading is None:
            raise
        reading, failure = error.reading, error
    else:
        reading = without_standing(meter, reading)
        failure = failure_of(reading)
    flags = [*reading.flags, *window_flags(reading, before, _states(meter))]
    if shared or _are_shared(meter):
        flags.append(Flag.SHARED_DEVICE)
    return ended, reading, failure, flags


def _idle(meter: EnergyMeter, seconds: float, integral: bool | None) -> EnergyReading:
    meter.start(integral=integral)
    try:
        process.sleep(seconds)
    finally:
        reading = meter.stop()
    return reading


def without_standing(meter: EnergyMeter, reading: EnergyReading) -> EnergyReading:
    """The reading without the joules of counters that moved over the window, but stand still now.

    They stopped at an unknown moment within it. The integral takes their place, if there is one.
    """
    parts = []
    for part in reading.domains:
        if part.source == "counter" and part.update_period is not None and _stands(meter, part.domain):
            source: Source | None = None if part.integral_joules is None else "integral"
            reason = f"{part.domain}: the counter stands still after the window; it may have stopped within"
            flags = unique((*part.flags, Flag.COUNTER_FROZEN))
            part = replace(part, joules=part.integral_joules, source=source, reason=reason, flags=flags)
        parts.append(part)
    return replace(reading, domains=tuple(parts))


def _stands(meter: EnergyMeter, domain: str) -> bool:
    try:
        return meter.measure_update_period(domain) is None
    except DeviceLostError:  # which it was not in the window
        return False


def _states(meter: EnergyMeter) -> dict[str, DeviceState]:
    """Of each GPU; none after one was lost, which the end of the window reports."""
    try:
        return {domain.name: meter.state(domain.name) for domain in meter.domains if domain.name.startswith("gpu:")}
    except DeviceLostError:
        return {}


def _are_shared(meter: EnergyMeter) -> bool:
    """Whether processes use the GPUs while the command does not run."""
    try:
        return any(facts.others for domain in meter.domains if (facts := meter.facts(domain.name)))
    except DeviceLostError:
        return False


def failure_of(reading: EnergyReading) -> EnergyError | None:
    """What went wrong with a counter that worked when the window began; ``None`` if nothing did."""
    for part in reading.domains:
        if part.in_total and part.joules is None and Flag.SHORT_WINDOW not in part.flags:
            kind = CounterFrozenError if Flag.COUNTER_FROZEN in part.flags else CounterUnstableError
            return kind(part.reason)
    return None
