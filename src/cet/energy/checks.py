"""What makes windows less than they seem: devices that are not level, throttle, drift or are shared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean

from cet.energy.clock import Clock
from cet.energy.domains import DeviceFacts, DeviceState, EnergyReading, Flag, unique
from cet.energy.measurement import IDLE, WindowRecord

MIN_WINDOW, MIN_TICKS = 5.0, 50
"""Windows shorter than so many seconds, or update periods of the counter, are flagged."""
MIN_ROUNDS = 10
"""Measurements of fewer rounds are flagged."""
MAX_DRIFT = 5.0
"""Degrees by which the temperature may change within a window, and from the first round to the last."""
MAX_IDLE_DRIFT = 0.05
"""Relative difference of the idle power before and after."""
MAX_TIME_DRIFT = 0.1
"""Relative difference of the time of a call from the first round to the last."""

_LEVEL_DEGREES, _LEVEL_CLOCK, _LEVEL_POWER = 1.0, 0.02, 0.05  # what may change over a stretch; the latter relative

States = Mapping[str, DeviceState]
"""The state of each GPU domain, by its name."""


def until_level(
    stretch: Callable[[], States], clock: Clock, *, seconds: float, limit: float, earlier: States | None = None
) -> tuple[States, bool]:
    """Repeat a stretch of work until the states behind two of them are the same.

    Args:
        stretch: works for a while, and returns the states at its end.
        clock: of the meter.
        seconds: the time to go on for at least.
        limit: s after which to end in any case.
        earlier: the states before the first stretch, where one stretch may be enough.

    Returns:
        the last states, and whether they are level.
    """
    began = clock.now()
    while True:
        states = stretch()
        spent = clock.now() - began
        if spent >= seconds and earlier is not None and _are_level(earlier, states):
            return states, True
        if spent >= limit:
            return states, False
        earlier = states


def window_flags(reading: EnergyReading, before: States, after: States) -> Iterator[Flag]:
    """What makes one window less than it seems, besides the flags of the meter.

    Args:
        reading: the meter's.
        before: state of the GPU domains before the window, by name.
        after: and behind it.
    """
    if any(part.source == "counter" and part.update_period is None for part in reading.domains):
        yield Flag.UPDATE_PERIOD_UNKNOWN
    periods = [part.update_period or 0.0 for part in reading.domains if part.source in ("counter", "integral")]
    if periods and reading.seconds < max(MIN_WINDOW, MIN_TICKS * max(periods)):
        yield Flag.SHORT_WINDOW
    for gpu, state in after.items():
        if _spread(before[gpu].temperature, state.temperature) > MAX_DRIFT:
            yield Flag.TEMPERATURE_DRIFT
        if before[gpu].throttle or state.throttle:
            yield Flag.THROTTLED


def measurement_flags(
    windows: Sequence[WindowRecord], num_rounds: int, preflight: Mapping[str, DeviceFacts]
) -> tuple[Flag, ...]:
    """Those of all windows, and what only all of them together show.

    Args:
        windows: those that count, in the order of time.
        num_rounds: that were to be measured.
        preflight: what was known of each GPU before the first window.
    """
    flags = [flag for window in windows for flag in window.flags]
    if any(facts.others for facts in preflight.values()):
        flags.append(Flag.SHARED_DEVICE)
    working = [window for window in windows if window.workload != IDLE]
    for gpu in working[0].after if working else ():
        if abs(_drift([window.after[gpu].temperature for window in working])) > MAX_DRIFT:
            flags.append(Flag.TEMPERATURE_DRIFT)
    for name in dict.fromkeys(window.workload for window in working):
        times = [window.seconds / window.calls for window in working if window.workload == name]
        if abs(_drift(times)) > MAX_TIME_DRIFT * fmean(times):
            flags.append(Flag.TIME_DRIFT)
    ends = [window.watts for window in windows if window.round_index in (-1, num_rounds)]
    if len(ends) == 2 and idle_drifts(*ends):
        flags.append(Flag.IDLE_DRIFT)
    if num_rounds < MIN_ROUNDS:
        flags.append(Flag.FEW_ROUNDS)
    return unique(flags)


def idle_drifts(before: float | None, after: float | None) -> bool:
    """Whether two idle powers, in W, differ by more than :data:`MAX_IDLE_DRIFT`; ``False`` if one is unknown."""
    return before is not None and after is not None and abs(after - before) > MAX_IDLE_DRIFT * before


def _are_level(earlier: States, now: States) -> bool:
    return all(
        _spread(before.temperature, state.temperature) <= _LEVEL_DEGREES
        and _spread(before.sm_clock, state.sm_clock) <= _LEVEL_CLOCK * (state.sm_clock or 0)
        and _spread(before.watts, state.watts) <= _LEVEL_POWER * (state.watts or 0)
        for before, state in zip(earlier.values(), now.values(), strict=True)
    )


def _drift(values: Sequence[float | None]) -> float:
    """From the first window to the last, taken for linear: twice what the two halves differ by; 0 if unknown."""
    known = [value for value in values if value is not None]
    half = len(known) // 2
    return 2 * (fmean(known[half:]) - fmean(known[:half])) if half else 0.0


def _spread(a: float | None, b: float | None) -> float:
    """How far the two are apart; 0 if one is unknown."""
    return 0.0 if a is None or b is None else abs(a - b)
