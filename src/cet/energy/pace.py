"""Keeps a workload running for a given time, by a number of calls that is known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from cet.energy.measurement import IDLE
from cet.energy.meter import EnergyMeter

_TOO_LONG = 2.0  # of the time that calls should take; they may go slower too
_WRAP = 30.0  # s, within which counters that wrap are read
_SHORTEST = 1e-6  # s of a call that a coarse clock shows as none

Seen = TypeVar("Seen")


class WorkloadError(Exception):
    """A workload raised an error."""

    exit_code = 1


class Pace:
    """Runs workloads for given times.

    The number of calls follows from the time that calls took before, so that devices are synchronised at the ends of
    these times only.

    Args:
        runs: one call of each workload, by name. Each is called twice here: the first call loads and compiles.
        meter: an open one. Its counters that wrap are read in time, whatever happens for how long.
    """

    def __init__(self, runs: Mapping[str, Callable[[], object]], meter: EnergyMeter) -> None:
        self._runs, self._meter, self._clock = runs, meter, meter.clock
        self._seconds_per_call = {name: self._second_call(run) for name, run in runs.items()}

    def spend(self, name: str, seconds: float) -> int:
        """Be idle for so long, or make the calls that should take so long, but not for far longer.

        Returns:
            the number of calls.

        Raises:
            WorkloadError: for a call that raised.
        """
        if name == IDLE:
            self._rest(seconds)
            return 0
        calls, foretold = 0, seconds / self._seconds_per_call[name]
        began = read = self._clock.now()
        while calls < foretold:
            try:
                self._runs[name]()
            except (Exception, SystemExit) as error:
                raise WorkloadError(f"{name} failed: {type(error).__name__}: {error}") from error
            calls += 1
            now = self._clock.now()
            if now - began > _TOO_LONG * seconds:
                break
            if now - read > _WRAP:
                self._meter.read_wrapping()
                read = now
        return calls

    def fill(self, name: str, seconds: float) -> int:
        """Spend at least so long, whatever the calls took before; the number of calls."""
        began = self._clock.now()
        calls = self.spend(name, seconds)
        while calls and self._clock.now() - began < seconds:
            self._meter.synchronize()  # the host may be ahead of the device
            spent = self._clock.now() - began
            if spent < seconds:
                self._note(name, spent, calls)
                calls += self.spend(name, seconds - spent)
        return calls

    def stretch(self, name: str, seconds: float, look: Callable[[], Seen]) -> Seen:
        """Spend so long, look while the device still has work queued, and wait for the device; what was seen."""
        began = self._clock.now()
        calls = self.spend(name, seconds)
        seen = look()
        self._meter.synchronize()
        if calls:
            self._note(name, self._clock.now() - began, calls)
        return seen

    def _note(self, name: str, seconds: float, calls: int) -> None:
        self._seconds_per_call[name] = max(seconds / calls, _SHORTEST)

    def _rest(self, seconds: float) -> None:
        while seconds > _WRAP:
            self._clock.sleep(_WRAP)
            self._meter.read_wrapping()
            seconds -= _WRAP
        self._clock.sleep(seconds)

    def _second_call(self, run: Callable[[], object]) -> float:
        for _ in range(2):
            began = self._clock.now()
            run()
            self._meter.synchronize()
        return max(self._clock.now() - began, _SHORTEST)
