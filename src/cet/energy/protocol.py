"""How to measure: warm-up, windows of random phase, rounds in random order, and what to do when a counter fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from cet.energy.domains import (
    CounterFrozenError,
    CounterUnstableError,
    DeviceLostError,
    DeviceState,
    DomainEnergy,
    EnergyReading,
    Flag,
    unique,
    with_domain,
)
from cet.energy.measurement import IDLE, Block, Measurement, Settings
from cet.energy.meter import EnergyMeter

MIN_WINDOW, MIN_TICKS = 5.0, 50
"""Windows shorter than so many seconds, or ticks of the counter, are flagged."""
MIN_ROUNDS = 10
"""Measurements of fewer rounds are flagged."""
TIMING_WINDOW = 0.5
"""s, the length of windows where no energy can be measured."""
MAX_REPEATS = 3
"""How often a void window is repeated."""
MAX_DRIFT = 5.0
"""Degrees by which the temperature may change within a window, and from the first round to the last."""
MAX_IDLE_DRIFT = 0.05
"""Relative difference of the idle power before and after."""
MAX_TIME_DRIFT = 0.1
"""Relative difference of the time of a call from the first round to the last."""

_HEATING = 60.0  # s at most until the temperature is that of the rounds
_STRETCH = 1.0  # s of warm-up between looks at clocks and temperature
_LEVEL_DEGREES, _LEVEL_CLOCK, _LEVEL_POWER = 1.0, 0.02, 0.05  # what may change over a stretch; the latter relative
_MARGIN = 1.05  # calls may go faster in the window than they did in the warm-up
_VARIATION = 0.1  # of the length of windows: some ticks, and some calls too
_TOO_LONG = 2.0  # of the time that calls should take; they may go slower too
_WRAP = 30.0  # s, within which counters that wrap are read
_SHORTEST = 1e-6  # s of a call that a coarse clock cannot tell from none
_INTERRUPTED = 130

Progress = Callable[[int, int, float], object]
"""Called before the first window and after each with those done, all of them, and the s that are left."""


@dataclass(frozen=True)
class Workload:
    """Something to measure.

    Args:
        name: other than ``"idle"``.
        run: one call; it is repeated as often as a window needs, and should do the same work each time. It need not
            wait for the GPU.
        items: samples that one call works on.

    Raises:
        ValueError: for ``items`` below 1.
        TypeError: for a ``run`` that cannot be called.
    """

    name: str
    run: Callable[[], object]
    items: int = 1

    def __post_init__(self) -> None:
        if not callable(self.run):
            raise TypeError(f"workload {self.name}: run is {self.run!r}; give a function without arguments")
        if not isinstance(self.items, int) or self.items < 1:
            raise ValueError(f"workload {self.name} has {self.items} items; give a whole number >= 1 per call")


def measure(
    workloads: Sequence[Workload],
    meter: EnergyMeter,
    settings: Settings | None = None,
    *,
    progress: Progress | None = None,
    on_block: Callable[[Block], object] | None = None,
) -> Measurement:
    """Measure time and energy of some workloads against each other and against idle.

    Each round runs every workload and idle once, in random order. Before each window its workload runs until clocks,
    power and temperature are level, right up to the window's start: a counter that moves in ticks still owes energy
    from before the start, which must be of the same power. The windows' starts and lengths vary at random, so that
    they stand in no fixed relation to the tick and its error averages out. The number of calls follows from the time
    that they took in the warm-up, so that devices are synchronised at the edges of windows only; a window that these
    calls do not fill goes on.

    A window in which a counter ran backwards or failed is void, and repeated. For a counter that does not move the
    window is made longer, then power is integrated from there on. A lost GPU, a counter that stays frozen or keeps
    failing, a workload that raises, and Ctrl-C end the measurement as partial, with all finished windows.

    Args:
        workloads: with different names. All of them run once before anything is measured.
        meter: opened here, if it is not open yet. Where it can measure no energy, time is still measured.
        settings: the defaults if not given.
        progress: is told how far the measurement is.
        on_block: gets each window as it ends, so that it can be saved.

    Raises:
        ValueError: for no workloads, for one without a name of its own, and for ``estimate_watts`` where energy can be
            measured.
        EnergyError: for a GPU that is lost before the first window.
    """
    settings = settings or Settings()
    names = [workload.name for workload in workloads]
    if not names:
        raise ValueError("there are no workloads; give at least one")
    if len({*names, IDLE}) != len(names) + 1:
        raise ValueError(
            f"the workloads are named {', '.join(names)}; give each a name of its own, none of them {IDLE}"
        )
    with meter.opened():
        if settings.estimate_watts is not None and meter.domains:
            measured = ", ".join(domain.name for domain in meter.domains)
            raise ValueError(f"estimate_watts is given although {measured} can be measured; leave it out")
        return _Run(workloads, meter, settings, progress, on_block).measurement()


def estimated(reading: EnergyReading, watts: float) -> EnergyReading:
    """The reading with the joules that a device of so many watts would have taken: assumed, and marked so."""
    assumed = DomainEnergy(
        domain="estimate",
        device=f"an assumed {watts:g} W",
        scope="board",
        in_total=True,
        joules=watts * reading.seconds,
        source="model",
        flags=(Flag.MODELLED,),
    )
    return replace(reading, domains=(*reading.domains, assumed))


class _WorkloadError(Exception):
    """A workload raised."""

    exit_code = 1


class _Run:
    """One measurement under way."""

    def __init__(
        self,
        workloads: Sequence[Workload],
        meter: EnergyMeter,
        settings: Settings,
        progress: Progress | None,
        on_block: Callable[[Block], object] | None,
    ) -> None:
        self.workloads = {workload.name: workload for workload in workloads}
        self.meter, self.clock, self.settings = meter, meter.clock, settings
        self.progress, self.on_block = progress, on_block
        self.rng = np.random.default_rng(settings.seed)
        self.gpus = [domain.name for domain in meter.domains if domain.name.startswith("gpu:")]
        self.seconds_per_call = {name: self._first_calls(workload) for name, workload in self.workloads.items()}
        self.preflight = {name: facts for name in self.gpus if (facts := meter.facts(name))}
        self.ticks = {domain.name: meter.measure_tick(domain.name) for domain in meter.domains}
        self.tick = max((tick for tick in self.ticks.values() if tick is not None), default=0.0)
        default = MIN_WINDOW if meter.domains else TIMING_WINDOW
        self.window = max(settings.window or default, settings.ticks * self.tick)
        self.windows = 2 + settings.blocks * (len(self.workloads) + 1)
        self.integral = False  # whether a frozen counter has power integrated in its place
        self.began = 0.0  # when the first window did
        self.done = 0
        self.blocks: list[Block] = []

    def measurement(self) -> Measurement:
        stopped, exit_code = None, 0
        try:
            self._measure()
        except (DeviceLostError, CounterFrozenError, CounterUnstableError, _WorkloadError) as error:
            stopped, exit_code = str(error), error.exit_code
        except KeyboardInterrupt as error:
            stopped, exit_code = str(error) or "interrupted", getattr(error, "exit_code", _INTERRUPTED)
        return Measurement(
            settings=self.settings,
            workloads=tuple(self.workloads),
            window=self.window,
            domains=self.meter.domains,
            unavailable=self.meter.unavailable,
            ticks=self.ticks,
            preflight=self.preflight,
            blocks=tuple(self.blocks),
            status="complete" if stopped is None else "partial",
            stopped=stopped,
            exit_code=exit_code,
            flags=self._flags(),
        )

    def _measure(self) -> None:
        self._tell(self.settings.warmup + self.window)
        try:
            self._come_to_temperature()
            self.began = self.clock.now()
            self._window_that_counts(IDLE, -1)
            for index in range(self.settings.blocks):
                for name in self.rng.permutation([*self.workloads, IDLE]).tolist():
                    self._window_that_counts(name, index)
            self._window_that_counts(IDLE, self.settings.blocks)
        except Exception:
            self._states()  # a lost GPU, which CUDA reports as some error of its own, shows here
            raise

    def _tell(self, seconds_per_window: float) -> None:
        if self.progress:
            self.progress(self.done, self.windows, seconds_per_window * (self.windows - self.done))

    def _come_to_temperature(self) -> None:
        """Take turns as in a round until the temperature stays what it is.

        The power of a chip grows with its temperature: else the first windows would take the least, which is neither
        scatter nor a linear drift, and makes intervals too wide.
        """
        began, earlier = self.clock.now(), self._states()
        while self.clock.now() - began < _HEATING:
            for name in (*self.workloads, IDLE):
                self._spend(name, self.window)
                self.meter.synchronize()
            states = self._states()
            if _are_level(earlier, states):
                break
            earlier = states

    def _window_that_counts(self, name: str, index: int) -> None:
        """Measure until a window is not void.

        Raises:
            CounterFrozenError: for a counter that did not move, not in a longer window either, and no integral.
            CounterUnstableError: after too many void windows for other reasons.
        """
        length, repeats = self.window, 0
        while True:
            block = self._window(name, index, length)
            self.blocks.append(block)
            if self.on_block:
                self.on_block(block)
            if block.void is None:
                break
            if any(Flag.COUNTER_FROZEN in part.flags for part in _missing(block.reading)):
                if self.integral:
                    raise CounterFrozenError(block.void)
                self.integral = length > self.window
                length = 2 * self.window
            elif repeats == MAX_REPEATS:
                raise CounterUnstableError(f"{block.void}, in {1 + repeats} windows one after another")
            else:
                repeats += 1
        self.done += 1
        self._tell((self.clock.now() - self.began) / self.done)

    def _window(self, name: str, index: int, length: float) -> Block:
        self.clock.sleep(self.rng.uniform(0, self.tick))  # where in its tick the counter will be
        before, flags = self._warm_up(name)
        self.meter.start(integral=self.integral or None)
        try:
            calls = self._fill(name, length * self.rng.uniform(_MARGIN, _MARGIN + _VARIATION))
        except BaseException:
            with suppress(RuntimeError):  # what came first counts
                self.meter.stop()
            raise
        reading = self.meter.stop()
        after = self._states()
        if name != IDLE and self.settings.estimate_watts is not None:
            reading = estimated(reading, self.settings.estimate_watts)
        void = "; ".join(with_domain(part.domain, part.reason) for part in _missing(reading))
        return Block(
            workload=name,
            round=index,
            calls=calls,
            items=0 if name == IDLE else calls * self.workloads[name].items,
            reading=reading,
            before=before,
            after=after,
            flags=unique((*reading.flags, *flags, *window_flags(reading, before, after))),
            void=void or None,
        )

    def _warm_up(self, name: str) -> tuple[dict[str, DeviceState], tuple[Flag, ...]]:
        """Run until nothing changes any more; the state then, and a flag if the limit came first."""
        began = self.clock.now()
        earlier = None
        while True:
            started = self.clock.now()
            calls = self._spend(name, min(_STRETCH, self.settings.warmup))
            states = self._states()  # while the GPU still has work queued
            self.meter.synchronize()
            now = self.clock.now()
            if calls:
                self.seconds_per_call[name] = max((now - started) / calls, _SHORTEST)
            if now - began >= self.settings.warmup and earlier is not None and _are_level(earlier, states):
                return states, ()
            if now - began >= self.settings.warmup_limit:
                return states, (Flag.NOT_LEVEL,)
            earlier = states

    def _fill(self, name: str, seconds: float) -> int:
        """Spend at least so long, whatever the calls took before; the number of calls."""
        began = self.clock.now()
        calls = self._spend(name, seconds)
        while calls and self.clock.now() - began < seconds:
            self.meter.synchronize()  # the host may be ahead of the device
            spent = self.clock.now() - began
            if spent < seconds:
                self.seconds_per_call[name] = max(spent / calls, _SHORTEST)
                calls += self._spend(name, seconds - spent)
        return calls

    def _spend(self, name: str, seconds: float) -> int:
        """Be idle for so long, or make the calls that should take so long, but not for far longer; their number."""
        if name == IDLE:
            while seconds > _WRAP:
                self.clock.sleep(_WRAP)
                self.meter.read_wrapping()
                seconds -= _WRAP
            self.clock.sleep(seconds)
            return 0
        run = self.workloads[name].run
        calls, foretold = 0, seconds / self.seconds_per_call[name]
        began = read = self.clock.now()
        while calls < foretold:
            try:
                run()
            except (Exception, SystemExit) as error:
                raise _WorkloadError(f"{name} failed: {type(error).__name__}: {error}") from error
            calls += 1
            now = self.clock.now()
            if now - began > _TOO_LONG * seconds:
                break
            if now - read > _WRAP:
                self.meter.read_wrapping()
                read = now
        return calls

    def _first_calls(self, workload: Workload) -> float:
        """Seconds of the second call, since the first one loads and compiles."""
        for _ in range(2):
            started = self.clock.now()
            workload.run()
            self.meter.synchronize()
        return max(self.clock.now() - started, _SHORTEST)

    def _states(self) -> dict[str, DeviceState]:
        return {name: self.meter.state(name) for name in self.gpus}

    def _flags(self) -> tuple[Flag, ...]:
        """Of all windows that count, and of the measurement as a whole."""
        counted = [block for block in self.blocks if block.void is None]
        flags = [flag for block in counted for flag in block.flags]
        if any(facts.others for facts in self.preflight.values()):
            flags.append(Flag.SHARED_DEVICE)
        working = [block for block in counted if block.workload != IDLE]
        for gpu in self.gpus:
            if abs(_drift([block.after[gpu].temperature for block in working])) > MAX_DRIFT:
                flags.append(Flag.TEMPERATURE_DRIFT)
        for name in self.workloads:
            times = [block.seconds / block.calls for block in working if block.workload == name]
            if times and abs(_drift(times)) > MAX_TIME_DRIFT * fmean(times):
                flags.append(Flag.TIME_DRIFT)
        ends = [block.watts for block in counted if block.round in (-1, self.settings.blocks)]
        if len(ends) == 2 and idle_drifts(*ends):
            flags.append(Flag.IDLE_DRIFT)
        if self.settings.blocks < MIN_ROUNDS:
            flags.append(Flag.FEW_ROUNDS)
        return unique(flags)


def _missing(reading: EnergyReading) -> list[DomainEnergy]:
    """The domains that the total lacks; a part of another, such as a graphics unit, may well be off for good."""
    return [part for part in reading.domains if part.in_total and part.joules is None]


def idle_drifts(before: float | None, after: float | None) -> bool:
    """Whether two idle powers, in W, differ by more than :data:`MAX_IDLE_DRIFT`; ``False`` if one is unknown."""
    return before is not None and after is not None and abs(after - before) > MAX_IDLE_DRIFT * before


def _are_level(earlier: Mapping[str, DeviceState], now: Mapping[str, DeviceState]) -> bool:
    return all(
        _spread(before.temperature, state.temperature) <= _LEVEL_DEGREES
        and _spread(before.sm_clock, state.sm_clock) <= _LEVEL_CLOCK * (state.sm_clock or 0)
        and _spread(before.watts, state.watts) <= _LEVEL_POWER * (state.watts or 0)
        for before, state in zip(earlier.values(), now.values(), strict=True)
    )


def window_flags(
    reading: EnergyReading, before: Mapping[str, DeviceState], after: Mapping[str, DeviceState]
) -> Iterator[Flag]:
    """What makes one window less than it seems, besides the flags of the meter.

    Args:
        reading: the meter's.
        before: state of the GPU domains before the window, by name.
        after: and behind it.
    """
    if any(part.source == "counter" and part.tick is None for part in reading.domains):
        yield Flag.TICK_UNKNOWN
    ticks = [part.tick or 0.0 for part in reading.domains if part.source in ("counter", "integral")]
    if ticks and reading.seconds < max(MIN_WINDOW, MIN_TICKS * max(ticks)):
        yield Flag.SHORT_WINDOW
    for gpu, state in after.items():
        if _spread(before[gpu].temperature, state.temperature) > MAX_DRIFT:
            yield Flag.TEMPERATURE_DRIFT
        if before[gpu].throttle or state.throttle:
            yield Flag.THROTTLED


def _drift(values: Sequence[float | None]) -> float:
    """From the first window to the last, taken for linear: twice what the two halves differ by; 0 if unknown."""
    known = [value for value in values if value is not None]
    half = len(known) // 2
    return 2 * (fmean(known[half:]) - fmean(known[:half])) if half else 0.0


def _spread(a: float | None, b: float | None) -> float:
    """How far the two are apart; 0 if one is unknown."""
    return 0.0 if a is None or b is None else abs(a - b)
