"""How to measure: warm-up, windows of random phase, rounds in random order, and what to do when a counter fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from cet.energy.checks import MIN_WINDOW, States, measurement_flags, until_level, window_flags
from cet.energy.domains import (
    CounterFrozenError,
    CounterUnstableError,
    DeviceLostError,
    DomainEnergy,
    EnergyReading,
    Flag,
    unique,
    with_domain,
)
from cet.energy.measurement import IDLE, Measurement, Settings, WindowRecord
from cet.energy.meter import EnergyMeter
from cet.energy.pace import Pace, WorkloadError
from cet.measure.rounds import rounds

TIMING_WINDOW = 0.5
"""s, the length of windows where no energy can be measured."""
MAX_REPEATS = 3
"""How often a void window is repeated."""

_HEATING = 60.0  # s at most until the temperature is that of the rounds
_STRETCH = 1.0  # s of warm-up between looks at clocks and temperature
_MARGIN = 1.05  # calls may go faster in the window than they did in the warm-up
_VARIATION = 0.1  # of the length of windows: some update periods, and some calls too
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
    on_window: Callable[[WindowRecord], object] | None = None,
) -> Measurement:
    """Measure time and energy of some workloads against each other and against idle.

    Each round runs every workload and idle once, in random order. Before each window its workload runs until clocks,
    power and temperature are level, right up to the window's start: a counter that moves once per update period still
    owes energy from before the start, which must be of the same power. The windows' starts and lengths vary at random,
    so that they stand in no fixed relation to that period and its error averages out. The number of calls follows from
    the time that they took in the warm-up, so that devices are synchronised at the edges of windows only; a window that
    these calls do not fill goes on.

    A window in which a counter ran backwards or failed is void, and repeated. For a counter that does not move the
    window is made longer, then power is integrated from there on. A lost GPU, a counter that stays frozen or keeps
    failing, a workload that raises, and Ctrl-C end the measurement as partial, with all finished windows.

    Args:
        workloads: with different names. All of them run once before anything is measured.
        meter: opened here, if it is not open yet. Where it can measure no energy, time is still measured.
        settings: the defaults if not given.
        progress: is called with how far the measurement is.
        on_window: gets each window as it ends, so that it can be saved.

    Raises:
        ValueError: for no workloads, for one without a name of its own, and for ``assume_watts`` where energy can be
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
        if settings.assume_watts is not None and meter.domains:
            measured = ", ".join(domain.name for domain in meter.domains)
            raise ValueError(f"assume_watts is given although {measured} can be measured; leave it out")
        return _Run(_Bench(workloads, meter, settings), progress, on_window).measurement()


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


class _Bench:
    """The workloads at an open meter: brings them to temperature and takes one window at a time."""

    def __init__(self, workloads: Sequence[Workload], meter: EnergyMeter, settings: Settings) -> None:
        self.workloads = {workload.name: workload for workload in workloads}
        self.names = [*self.workloads, IDLE]
        self.meter, self.clock, self.settings = meter, meter.clock, settings
        self.rng = np.random.default_rng(settings.seed)
        self.gpus = [domain.name for domain in meter.domains if domain.name.startswith("gpu:")]
        self.pace = Pace({workload.name: workload.run for workload in workloads}, meter)
        self.preflight = {name: facts for name in self.gpus if (facts := meter.facts(name))}
        self.update_periods = {domain.name: meter.measure_update_period(domain.name) for domain in meter.domains}
        self.longest_period = max((period for period in self.update_periods.values() if period), default=0.0)
        default = MIN_WINDOW if meter.domains else TIMING_WINDOW
        self.length = max(settings.window or default, settings.update_periods * self.longest_period)

    def states(self) -> States:
        return {name: self.meter.state(name) for name in self.gpus}

    def come_to_temperature(self) -> None:
        """Take turns as in a round until the temperature stays what it is.

        The power of a chip grows with its temperature: else the first windows would take the least, which is neither
        scatter nor a linear drift, and makes intervals too wide.
        """
        until_level(self._turns, self.clock, seconds=0.0, limit=_HEATING, earlier=self.states())

    def window(self, name: str, round_index: int, length: float, *, integral: bool) -> WindowRecord:
        """Warm one workload up, and take a window of at least ``length`` s; power is integrated where asked for."""
        self.clock.sleep(self.rng.uniform(0, self.longest_period))  # where in its period the counter will be
        before, is_level = self._warm_up(name)
        self.meter.start(integral=integral or None)
        try:
            calls = self.pace.fill(name, length * self.rng.uniform(_MARGIN, _MARGIN + _VARIATION))
        except BaseException:
            with suppress(RuntimeError):  # what came first counts
                self.meter.stop()
            raise
        reading = self.meter.stop()
        after = self.states()
        if name != IDLE and self.settings.assume_watts is not None:
            reading = estimated(reading, self.settings.assume_watts)
        void = "; ".join(with_domain(part.domain, part.reason) for part in _missing(reading))
        flags = () if is_level else (Flag.NOT_LEVEL,)
        return WindowRecord(
            workload=name,
            round_index=round_index,
            calls=calls,
            items=0 if name == IDLE else calls * self.workloads[name].items,
            reading=reading,
            before=before,
            after=after,
            flags=unique((*reading.flags, *flags, *window_flags(reading, before, after))),
            void=void or None,
        )

    def _turns(self) -> States:
        for name in self.names:
            self.pace.spend(name, self.length)
            self.meter.synchronize()
        return self.states()

    def _warm_up(self, name: str) -> tuple[States, bool]:
        """Run until nothing changes any more; the states then, and whether that came before the limit."""
        seconds = min(_STRETCH, self.settings.warmup)
        return until_level(
            lambda: self.pace.stretch(name, seconds, self.states),
            self.clock,
            seconds=self.settings.warmup,
            limit=self.settings.warmup_limit,
        )


class _Run:
    """One measurement under way: its plan, and the windows so far."""

    def __init__(
        self, bench: _Bench, progress: Progress | None, on_window: Callable[[WindowRecord], object] | None
    ) -> None:
        self.bench, self.settings, self.clock = bench, bench.settings, bench.clock
        self.progress, self.on_window = progress, on_window
        self.num_windows = 2 + self.settings.rounds * len(bench.names)
        self.num_done = 0
        self.began = 0.0  # when the first window did
        self.integral = False  # whether a frozen counter has power integrated in its place
        self.windows: list[WindowRecord] = []

    def measurement(self) -> Measurement:
        stopped, exit_code = None, 0
        try:
            self._measure()
        except (DeviceLostError, CounterFrozenError, CounterUnstableError, WorkloadError) as error:
            stopped, exit_code = str(error), error.exit_code
        except KeyboardInterrupt as error:
            stopped, exit_code = str(error) or "interrupted", getattr(error, "exit_code", _INTERRUPTED)
        bench = self.bench
        counted = [window for window in self.windows if window.void is None]
        return Measurement(
            settings=self.settings,
            workloads=tuple(bench.workloads),
            window=bench.length,
            domains=bench.meter.domains,
            unavailable=bench.meter.unavailable,
            update_periods=bench.update_periods,
            preflight=bench.preflight,
            windows=tuple(self.windows),
            status="complete" if stopped is None else "partial",
            stopped=stopped,
            exit_code=exit_code,
            flags=measurement_flags(counted, self.settings.rounds, bench.preflight),
        )

    def _measure(self) -> None:
        bench, num_rounds = self.bench, self.settings.rounds
        self._tell(self.settings.warmup + bench.length)
        try:
            bench.come_to_temperature()
            self.began = self.clock.now()
            self._window_that_counts(IDLE, -1)
            for round_index, order in enumerate(rounds(bench.names, bench.rng, min_rounds=num_rounds)):
                for name in order:
                    self._window_that_counts(name, round_index)
            self._window_that_counts(IDLE, num_rounds)
        except Exception:
            bench.states()  # a lost GPU, which CUDA reports as some error of its own, shows here
            raise

    def _tell(self, seconds_per_window: float) -> None:
        if self.progress:
            left = self.num_windows - self.num_done
            self.progress(self.num_done, self.num_windows, seconds_per_window * left)

    def _window_that_counts(self, name: str, round_index: int) -> None:
        """Measure until a window is not void.

        Raises:
            CounterFrozenError: for a counter that did not move, not in a longer window either, and no integral.
            CounterUnstableError: after too many void windows for other reasons.
        """
        length, repeats = self.bench.length, 0
        while True:
            window = self.bench.window(name, round_index, length, integral=self.integral)
            self.windows.append(window)
            if self.on_window:
                self.on_window(window)
            if window.void is None:
                break
            if any(Flag.COUNTER_FROZEN in part.flags for part in _missing(window.reading)):
                if self.integral:
                    raise CounterFrozenError(window.void)
                self.integral = length > self.bench.length
                length = 2 * self.bench.length
            elif repeats == MAX_REPEATS:
                raise CounterUnstableError(f"{window.void}, in {1 + repeats} windows one after another")
            else:
                repeats += 1
        self.num_done += 1
        self._tell((self.clock.now() - self.began) / self.num_done)


def _missing(reading: EnergyReading) -> list[DomainEnergy]:
    """The domains that the total lacks; a part of another, such as a graphics unit, may well be off for good."""
    return [part for part in reading.domains if part.in_total and part.joules is None]
