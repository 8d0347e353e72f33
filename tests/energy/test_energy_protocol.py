"""The protocol on simulated GPUs and a virtual clock: what it runs when, what it flags, and what it does on failure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pynvml
import pytest

from cet.energy.domains import (
    CounterFrozenError,
    CounterUnstableError,
    DeviceLostError,
    DeviceState,
    EnergyReading,
    Flag,
)
from cet.energy.measurement import IDLE, Measurement, Settings, WindowRecord
from cet.energy.meter import EnergyMeter
from cet.energy.protocol import Workload, measure
from nvml.simulation import Simulation
from powercap import Powercap
from simulated_work import work

SHORT = Settings(rounds=4, warmup=0.5, warmup_limit=3)


@pytest.fixture
def meter(simulation: Simulation) -> Iterator[EnergyMeter]:
    simulation.gpu(leakage=0)
    with EnergyMeter(rapl=False, clock=simulation.clock).opened() as meter:
        yield meter


def names(windows: Sequence[WindowRecord]) -> list[str]:
    return [record.workload for record in windows]


def counted(measurement: Measurement) -> list[WindowRecord]:
    return [record for record in measurement.windows if record.void is None]


# ---- the plan ----


def test_every_round_has_each_workload_and_idle_once_in_changing_order(
    simulation: Simulation, meter: EnergyMeter
) -> None:
    found = measure([work(simulation, "a", 200), work(simulation, "b", 300)], meter, Settings(rounds=12, warmup=0.5))
    assert found.status == "complete"
    assert (found.stopped, found.exit_code) == (None, 0)
    rounds = [names([record for record in found.windows if record.round_index == index]) for index in range(12)]
    assert all(sorted(order) == ["a", "b", IDLE] for order in rounds)
    assert len({tuple(order) for order in rounds}) > 3
    assert (found.windows[0].workload, found.windows[0].round_index) == (IDLE, -1)
    assert (found.windows[-1].workload, found.windows[-1].round_index) == (IDLE, 12)
    assert (found.idle_before, found.idle_after) == (found.windows[0], found.windows[-1])
    assert found.flags == ()


@pytest.mark.parametrize(("tick", "window"), [(0.02, 5.0), (0.1, 5.0), (0.4, 20.0)])
def test_windows_last_five_seconds_or_fifty_ticks(
    simulation: Simulation, meter: EnergyMeter, tick: float, window: float
) -> None:
    simulation.gpu(tick=tick)
    found = measure([work(simulation, "a", 200)], meter, SHORT)
    assert found.update_periods["gpu:0"] == pytest.approx(tick, rel=0.02)
    assert found.window == pytest.approx(window, rel=0.02)
    assert all(window <= record.seconds <= 1.2 * window for record in found.windows)
    assert len({round(record.seconds, 6) for record in found.windows}) > 3
    assert Flag.SHORT_WINDOW not in found.flags


def test_the_same_seed_gives_the_same_order(simulation: Simulation, meter: EnergyMeter) -> None:
    orders = [
        names(measure([work(simulation, "a", 200), work(simulation, "b", 200)], meter, settings).windows)
        for settings in (Settings(warmup=0.5), Settings(warmup=0.5), Settings(warmup=0.5, seed=1))
    ]
    assert orders[0] == orders[1] != orders[2]


def test_calls_and_items_are_counted(simulation: Simulation, meter: EnergyMeter) -> None:
    found = measure([work(simulation, "a", 200, seconds=0.05, items=32)], meter, SHORT)
    for record in found.windows:
        if record.workload == "a":
            assert record.items == 32 * record.calls
            assert record.seconds == pytest.approx(0.05 * record.calls)
        else:
            assert (record.calls, record.items) == (0, 0)


class Recorder(EnergyMeter):
    """Notes what happens in which order."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(rapl=False, clock=simulation.clock)
        self.events: list[str] = []

    def start(self, *, integral: bool | None = None) -> None:
        self.events.append("start")
        super().start(integral=integral)
        self.events.append("started")

    def stop(self) -> EnergyReading:
        self.events.append("stop")
        return super().stop()

    def synchronize(self) -> None:
        self.events.append("synchronize")
        super().synchronize()

    def state(self, domain: str) -> DeviceState:
        self.events.append("state")
        return super().state(domain)

    def noting(self, workload: Workload) -> Workload:
        def run() -> None:
            self.events.append(workload.name)
            workload.run()

        return Workload(workload.name, run, workload.items)


def test_a_window_holds_its_workload_alone_and_the_warm_up_goes_right_up_to_it(simulation: Simulation) -> None:
    with Recorder(simulation).opened() as meter:
        workloads = [meter.noting(work(simulation, name, 200)) for name in ("a", "b")]
        found = measure(workloads, meter, SHORT)
    events = meter.events
    starts = [index for index, event in enumerate(events) if event == "started"]
    assert len(starts) == len(found.windows)
    for start, record in zip(starts, found.windows, strict=True):
        stop = events.index("stop", start)
        inside = events[start + 1 : stop]
        before = [event for event in events[:start] if event not in ("state", "synchronize", "start")]
        if record.workload == IDLE:
            assert inside == []
        else:
            assert inside == [record.workload] * record.calls
            assert before[-1] == record.workload


def test_a_window_that_faster_calls_do_not_fill_goes_on_and_slower_calls_end_it_early(simulation: Simulation) -> None:
    class Windows(EnergyMeter):
        """Knows whether one is open."""

        counting = False

        def start(self, *, integral: bool | None = None) -> None:
            super().start(integral=integral)
            self.counting = True

        def stop(self) -> EnergyReading:
            self.counting = False
            return super().stop()

    with Windows(rapl=False, clock=simulation.clock).opened() as meter:
        faster = Workload("faster", lambda: simulation.clock.sleep(0.003 if meter.counting else 0.1))
        slower = Workload("slower", lambda: simulation.clock.sleep(1.0 if meter.counting else 0.001))
        found = measure([faster, slower], meter, SHORT)
    for record in found.windows:
        if record.workload == "faster":
            assert 5 <= record.seconds <= 6
            assert record.seconds == pytest.approx(0.003 * record.calls)
        elif record.workload == "slower":
            assert 10 <= record.seconds <= 13.5
            assert record.seconds == pytest.approx(record.calls)


def test_a_window_is_as_long_as_what_the_device_takes_when_the_host_is_ahead(simulation: Simulation) -> None:
    class Queue(EnergyMeter):
        """Work takes time only when it is waited for."""

        queued = 0.0

        def synchronize(self) -> None:
            self.clock.sleep(self.queued)
            self.queued = 0.0

    with Queue(rapl=False, clock=simulation.clock).opened() as meter:

        def run() -> None:
            meter.queued += 0.01

        found = measure([Workload("queued", run)], meter, SHORT)
    for record in found.windows:
        assert 5 <= record.seconds <= 6
        if record.workload == "queued":
            assert record.seconds == pytest.approx(0.01 * record.calls)


def test_figures_are_near_the_truth(simulation: Simulation, meter: EnergyMeter) -> None:
    simulation.gpu(idle=80, tick=0.02)
    found = measure([work(simulation, "a", 220, seconds=0.05, items=10)], meter, Settings(warmup=0.5))
    seconds, joules, net, watts = (found.estimate("a", q) for q in ("seconds", "joules", "net_joules", "watts"))
    assert seconds.value == pytest.approx(0.005)
    assert joules.value == pytest.approx(1.5, rel=2e-3)
    assert net.value == pytest.approx(1.1, rel=2e-3)
    assert watts.value == pytest.approx(300, rel=2e-3)
    assert found.estimate(IDLE, "watts").value == pytest.approx(80, rel=2e-3)
    assert joules.systematic == pytest.approx(0.05 * joules.value)
    assert seconds.systematic == 0
    assert [joules.sources, seconds.sources] == [("counter",), ()]
    assert [each.unit for each in (seconds, joules, net, watts)] == ["s", "J", "J", "W"]


def test_progress_and_windows_are_told_as_they_end(simulation: Simulation, meter: EnergyMeter) -> None:
    told: list[tuple[int, int, float]] = []
    seen: list[WindowRecord] = []
    found = measure(
        [work(simulation, "a", 200)], meter, SHORT, progress=lambda *each: told.append(each), on_window=seen.append
    )
    assert tuple(seen) == found.windows
    assert [done for done, _, _ in told] == list(range(11))
    assert {total for _, total, _ in told} == {10}
    assert told[-1][2] == 0
    assert told[5][2] == pytest.approx(5 * (5.35 + 1.0), rel=0.1)


# ---- the warm-up ----


def test_warm_up_lasts_until_power_and_temperature_are_level(simulation: Simulation, meter: EnergyMeter) -> None:
    simulation.gpu(ramp=1.0, tick=0.02)
    found = measure([work(simulation, "a", 200)], meter, Settings(rounds=3, warmup=1))
    for record in found.windows:
        if record.workload == "a":
            assert record.watts == pytest.approx(270, rel=5e-3)
    assert Flag.NOT_LEVEL not in found.flags


def test_a_warm_up_that_never_gets_level_is_flagged(simulation: Simulation, meter: EnergyMeter) -> None:
    settings = Settings(rounds=1, warmup=0.5, warmup_limit=4)
    found = measure([work(simulation, "a", lambda now: 100 + 150 * (now % 1.9))], meter, settings)
    flagged = [Flag.NOT_LEVEL in record.flags for record in found.windows]
    assert flagged == [record.workload == "a" for record in found.windows]
    assert Flag.NOT_LEVEL in found.flags


# ---- flags ----


def test_short_windows_are_flagged_and_counted(simulation: Simulation, meter: EnergyMeter) -> None:
    found = measure([work(simulation, "a", 200)], meter, Settings(rounds=3, warmup=0.2, window=1, update_periods=5))
    assert all(record.flags == (Flag.SHORT_WINDOW,) for record in found.windows)
    assert {Flag.SHORT_WINDOW, Flag.FEW_ROUNDS} == set(found.flags)
    assert found.estimate("a").rounds == 3


def test_so_they_are_where_power_is_integrated(simulation: Simulation) -> None:
    simulation.gpu(leakage=0)
    simulation.fault("nvmlDeviceGetTotalEnergyConsumption", pynvml.NVML_ERROR_NOT_SUPPORTED)
    with EnergyMeter(rapl=False, clock=simulation.clock).opened() as meter:
        found = measure([work(simulation, "a", 200)], meter, Settings(rounds=1, warmup=0.2, window=1))
    assert all(Flag.SHORT_WINDOW in record.flags for record in found.windows)


def test_figures_of_few_rounds_say_why_they_have_no_interval(simulation: Simulation, meter: EnergyMeter) -> None:
    found = measure([work(simulation, "a", 200)], meter, Settings(rounds=2, warmup=0.5))
    for figure in (found.estimate("a"), found.ratio("a", IDLE, "watts")):
        assert figure.value is not None
        assert (figure.low, figure.high) == (None, None)
        assert figure.reason == "an interval needs 3 rounds, and this is of 2"


def test_throttling_is_flagged(simulation: Simulation, meter: EnergyMeter) -> None:
    simulation.at(60, f"gpu 0 throttle {pynvml.nvmlClocksEventReasonSwThermalSlowdown}")
    found = measure([work(simulation, "a", 200)], meter, SHORT)
    for record in found.windows:
        assert (Flag.THROTTLED in record.flags) == (record.reading.start + record.seconds > 60)
    assert Flag.THROTTLED in found.flags


def test_a_window_in_which_the_temperature_changes_is_flagged(simulation: Simulation, meter: EnergyMeter) -> None:
    simulation.gpu(inertia=60, heating=0.3)
    found = measure([work(simulation, "a", 400)], meter, Settings(rounds=1, warmup=0.2, warmup_limit=0.4))
    drifts = [
        abs(record.after["gpu:0"].temperature - record.before["gpu:0"].temperature) > 5 for record in found.windows
    ]
    assert any(drifts)
    assert [Flag.TEMPERATURE_DRIFT in record.flags for record in found.windows] == drifts


def test_a_slow_rise_of_the_temperature_is_flagged_for_the_measurement(
    simulation: Simulation, meter: EnergyMeter
) -> None:
    for minute in range(40):
        simulation.at(5 * minute, f"gpu 0 ambient {30 + minute / 2}")
    found = measure([work(simulation, "a", 200)], meter, Settings(warmup=0.5))
    assert not any(Flag.TEMPERATURE_DRIFT in record.flags for record in found.windows)
    assert Flag.TEMPERATURE_DRIFT in found.flags


@pytest.mark.parametrize(("change", "flagged"), [(0.02, False), (0.1, True)])
def test_idle_power_that_changes_is_flagged(
    simulation: Simulation, meter: EnergyMeter, change: float, flagged: bool
) -> None:
    simulation.gpu(idle=100)
    simulation.at(60, f"gpu 0 idle {100 * (1 + change)}")
    found = measure([work(simulation, "a", 200)], meter, SHORT)
    assert (Flag.IDLE_DRIFT in found.flags) == flagged


def test_other_processes_on_the_gpu_are_flagged(simulation: Simulation, meter: EnergyMeter) -> None:
    simulation.gpu(process=4_000_000)
    found = measure([work(simulation, "a", 200)], meter, SHORT)
    assert found.preflight["gpu:0"].processes == (4_000_000,)
    assert Flag.SHARED_DEVICE in found.flags


def test_a_counter_against_the_integral_is_flagged(simulation: Simulation) -> None:
    simulation.gpu(gain=1.2, leakage=0)
    with EnergyMeter(rapl=False, clock=simulation.clock, integral=True).opened() as meter:
        found = measure([work(simulation, "a", 200)], meter, SHORT)
    assert Flag.COUNTER_DISAGREES in found.flags
    assert len(counted(found)) == len(found.windows)


# ---- failures ----

IN_THE_MIDDLE = 60.0
"""s, when some windows are finished and some are not."""


def finished(measurement: Measurement) -> int:
    """Windows that count, none of them with joules below zero or missing."""
    windows = counted(measurement)
    assert all(record.reading.joules is not None and record.reading.joules > 0 for record in windows)
    return len(windows)


def test_a_counter_that_runs_backwards_voids_the_window_which_is_repeated(
    simulation: Simulation, meter: EnergyMeter
) -> None:
    simulation.at(IN_THE_MIDDLE, "gpu 0 counter 5000")
    found = measure([work(simulation, "a", 200)], meter, SHORT)
    assert found.status == "complete"
    assert finished(found) == 10
    (void,) = [record for record in found.windows if record.void is not None]
    assert Flag.COUNTER_BACKWARDS in void.flags
    assert "backwards" in void.void
    again = found.windows[found.windows.index(void) + 1]
    assert (again.workload, again.round_index, again.void) == (void.workload, void.round_index, None)
    assert Flag.COUNTER_BACKWARDS not in found.flags
    assert found.estimate("a").rounds == 4


def test_a_part_of_another_domain_that_goes_off_voids_nothing(simulation: Simulation, tmp_path: Path) -> None:
    powercap, clock = Powercap(tmp_path), simulation.clock
    switch_off = []
    for folder, name, watts in (("intel-rapl:0", "package-0", 50), ("intel-rapl:0:0", "uncore", 5)):
        powercap.zone(folder, name)
        switch_off.append(powercap.follow(clock, folder, watts))

    def run() -> None:
        clock.sleep(0.05)
        if clock.now() > IN_THE_MIDDLE and len(switch_off) == 2:
            switch_off.pop()()

    with EnergyMeter(["cpu"], clock=clock, powercap=tmp_path).opened() as meter:
        found = measure([Workload("a", run)], meter, SHORT)
    assert (found.status, finished(found)) == ("complete", 10)
    assert found.estimate("a", "watts").value == pytest.approx(50, rel=0.01)
    part = found.estimate("a", domain="rapl:uncore-0")
    assert 0 < part.rounds < found.estimate("a").rounds
    assert "the counter stood at" in found.windows[-1].reading["rapl:uncore-0"].reason


def test_a_counter_that_keeps_failing_ends_the_measurement_with_what_is_finished(
    simulation: Simulation, meter: EnergyMeter
) -> None:
    fault = f"fault nvmlDeviceGetTotalEnergyConsumption -1 {pynvml.NVML_ERROR_UNKNOWN} 0 1000000"
    simulation.at(IN_THE_MIDDLE, fault)
    found = measure([work(simulation, "a", 200)], meter, SHORT)
    assert (found.status, found.exit_code) == ("partial", CounterUnstableError.exit_code)
    assert "in 4 windows one after another" in found.stopped
    assert 1 < finished(found) < 10
    assert [record.void is None for record in found.windows[-5:]] == [True, False, False, False, False]
    assert found.idle_after is None


def test_a_frozen_counter_gets_a_longer_window_and_then_the_integral(
    simulation: Simulation, meter: EnergyMeter
) -> None:
    simulation.at(IN_THE_MIDDLE, "gpu 0 frozen 1")
    found = measure([work(simulation, "a", 200)], meter, SHORT)
    assert found.status == "complete"
    assert finished(found) == 10
    before, (first, second), after = _around([record.void is not None for record in found.windows], found.windows)
    assert second.seconds == pytest.approx(2 * first.seconds, rel=0.1)
    assert "stood at" in first.void
    assert {record.reading["gpu:0"].source for record in before} == {"counter"}
    assert {record.reading["gpu:0"].source for record in after} == {"integral"}
    assert Flag.COUNTER_FROZEN in found.flags
    assert found.estimate("a").sources == ("counter", "integral")
    assert found.estimate("a", "watts").value == pytest.approx(270, rel=0.01)
    assert not simulation.clock.busy


def _around(
    marked: list[bool], windows: Sequence[WindowRecord]
) -> tuple[Sequence[WindowRecord], Sequence[WindowRecord], Sequence[WindowRecord]]:
    """The windows before, in and behind the marked ones, which follow on each other."""
    start = marked.index(True)
    end = start + sum(marked)
    assert all(marked[start:end])
    return windows[:start], windows[start:end], windows[end:]


def test_a_counter_frozen_for_a_while_needs_the_longer_window_only(simulation: Simulation, meter: EnergyMeter) -> None:
    simulation.at(IN_THE_MIDDLE, "gpu 0 frozen 1")
    simulation.at(IN_THE_MIDDLE + 14, "gpu 0 frozen 0")
    found = measure([work(simulation, "a", 200)], meter, SHORT)
    assert finished(found) == 10
    assert found.estimate("a").sources == ("counter",)


def test_a_frozen_counter_without_power_ends_the_measurement(simulation: Simulation, meter: EnergyMeter) -> None:
    simulation.fault("nvmlDeviceGetPowerUsage", pynvml.NVML_ERROR_NOT_SUPPORTED)
    for field in (pynvml.NVML_FI_DEV_POWER_INSTANT, pynvml.NVML_FI_DEV_POWER_AVERAGE):
        simulation.fault(f"field:{field}", pynvml.NVML_ERROR_NOT_SUPPORTED)
    simulation.at(IN_THE_MIDDLE, "gpu 0 frozen 1")
    found = measure([work(simulation, "a", 200)], meter, SHORT)
    assert (found.status, found.exit_code) == ("partial", CounterFrozenError.exit_code)
    assert "gpu:0" in found.stopped
    assert 1 < finished(found) < 10
    assert [record.void is None for record in found.windows[-4:]] == [True, False, False, False]


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED])
def test_a_lost_gpu_ends_the_measurement_with_what_is_finished(
    simulation: Simulation, meter: EnergyMeter, code: int
) -> None:
    simulation.at(IN_THE_MIDDLE, f"fault * 0 {code} 0 1000000")
    seen: list[WindowRecord] = []
    found = measure([work(simulation, "a", 200)], meter, SHORT, on_window=seen.append)
    assert (found.status, found.exit_code) == ("partial", DeviceLostError.exit_code)
    assert "gpu:0" in found.stopped
    assert 1 < finished(found) < 10
    assert tuple(seen) == found.windows


class _CudaError(RuntimeError):
    """What torch makes of a lost GPU."""


def test_a_lost_gpu_that_the_workload_meets_first_is_told_as_such(simulation: Simulation, meter: EnergyMeter) -> None:
    calm = work(simulation, "a", 200)

    def run() -> None:
        if simulation.time > IN_THE_MIDDLE:
            simulation.fault("*", pynvml.NVML_ERROR_GPU_IS_LOST)
            raise _CudaError("unspecified launch failure")
        calm.run()

    found = measure([Workload("a", run)], meter, SHORT)
    assert (found.status, found.exit_code) == ("partial", DeviceLostError.exit_code)
    assert finished(found) > 1


@pytest.mark.parametrize("error", [_CudaError("out of memory"), SystemExit(0)])
def test_an_error_of_the_workload_keeps_what_is_finished(
    simulation: Simulation, meter: EnergyMeter, error: BaseException
) -> None:
    calm = work(simulation, "a", 200)

    def run() -> None:
        if simulation.time > IN_THE_MIDDLE:
            raise error
        calm.run()

    found = measure([Workload("a", run)], meter, SHORT)
    assert (found.status, found.exit_code) == ("partial", 1)
    assert found.stopped == f"a failed: {type(error).__name__}: {error}"
    assert finished(found) > 1


def test_an_error_of_who_is_told_is_its_own(simulation: Simulation, meter: EnergyMeter) -> None:
    def refuse(_: WindowRecord) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        measure([work(simulation, "a", 200)], meter, SHORT, on_window=refuse)


@pytest.mark.parametrize("limited", [True, False])
def test_a_counter_that_jumps_voids_the_window_where_the_limit_is_known(simulation: Simulation, limited: bool) -> None:
    simulation.gpu(leakage=0)
    if not limited:
        simulation.fault("nvmlDeviceGetEnforcedPowerLimit", pynvml.NVML_ERROR_NOT_SUPPORTED)
    simulation.at(IN_THE_MIDDLE, "gpu 0 counter 999999999")
    with EnergyMeter(rapl=False, clock=simulation.clock).opened() as meter:
        found = measure([work(simulation, "a", 200)], meter, SHORT)
    assert (found.status, finished(found)) == ("complete", 10)
    jumped = [record for record in found.windows if Flag.COUNTER_JUMPED in record.flags]
    assert len(jumped) == limited
    assert all("at a power limit of 700 W" in record.void for record in jumped)


@pytest.mark.parametrize(("growth", "flagged"), [(0.0, False), (0.001, False), (0.03, True), (-0.02, True)])
def test_calls_that_get_slower_or_faster_are_flagged(
    simulation: Simulation, meter: EnergyMeter, growth: float, flagged: bool
) -> None:
    def run() -> None:
        simulation.clock.sleep(0.05 * (1 + growth * simulation.time / 6))

    found = measure([Workload("a", run)], meter, SHORT)
    assert (Flag.TIME_DRIFT in found.flags) == flagged


class _Terminated(KeyboardInterrupt):
    exit_code = 143


@pytest.mark.parametrize(
    ("signal", "stopped", "exit_code"),
    [(KeyboardInterrupt(), "interrupted", 130), (_Terminated("terminated"), "terminated", 143)],
)
def test_an_interrupt_keeps_what_is_finished_and_stops_the_sampler(
    simulation: Simulation, signal: KeyboardInterrupt, stopped: str, exit_code: int
) -> None:
    calm = work(simulation, "a", 200)

    def run() -> None:
        if simulation.time > IN_THE_MIDDLE:
            raise signal
        calm.run()

    simulation.gpu(leakage=0)
    with EnergyMeter(rapl=False, clock=simulation.clock, integral=True).opened() as meter:
        found = measure([Workload("a", run)], meter, SHORT)
        assert not simulation.clock.busy
    assert (found.status, found.stopped, found.exit_code) == ("partial", stopped, exit_code)
    assert 1 < finished(found) < 10


# ---- without a counter ----


@pytest.fixture
def blind(simulation: Simulation) -> Iterator[EnergyMeter]:
    simulation.reset(gpus=0)
    with EnergyMeter(rapl=False, clock=simulation.clock).opened() as meter:
        yield meter


def timed(simulation: Simulation) -> Workload:
    return Workload("a", lambda: simulation.clock.sleep(0.02), items=4)


def test_without_a_counter_time_is_measured_and_joules_are_unknown(simulation: Simulation, blind: EnergyMeter) -> None:
    found = measure([timed(simulation)], blind, SHORT)
    assert found.status == "complete"
    assert all(0.5 <= record.seconds <= 0.6 for record in found.windows)
    assert set(found.flags) == {Flag.FEW_ROUNDS}
    seconds, joules = found.estimate("a", "seconds"), found.estimate("a", "joules")
    assert seconds.value == pytest.approx(0.005)
    assert seconds.low is not None
    assert (joules.value, joules.low, joules.systematic) == (None, None, None)
    assert "shows no GPU" in joules.reason
    assert found.ratio("a", "a").value is None


def test_assumed_watts_are_marked_everywhere(simulation: Simulation, blind: EnergyMeter) -> None:
    found = measure([timed(simulation)], blind, Settings(rounds=4, warmup=0.5, assume_watts=15))
    joules, net = found.estimate("a"), found.estimate("a", "net_joules")
    assert joules.value == pytest.approx(15 * 0.005)
    assert joules.sources == ("model",)
    assert joules.systematic is None
    assert net.value is None
    for record in found.windows:
        if record.workload == "a":
            assert record.reading["estimate"].source == "model"
            assert Flag.MODELLED in record.flags
        else:
            assert record.reading.joules is None
    assert Flag.MODELLED in found.flags


def test_watts_are_not_assumed_where_they_can_be_measured(simulation: Simulation, meter: EnergyMeter) -> None:
    with pytest.raises(ValueError, match="assume_watts is given although gpu:0 can be measured"):
        measure([work(simulation, "a", 200)], meter, Settings(assume_watts=100))


# ---- arguments ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"rounds": 1.5}, "rounds is 1.5; give a whole number >= 1"),
        ({"seed": "3"}, "seed is '3'"),
        ({"warmup": None}, "warmup is None"),
        ({"window": 0.0}, "window is 0.0"),
        ({"update_periods": 0}, "update_periods is 0"),
        ({"warmup": -1.0}, "warmup is -1.0"),
        ({"confidence": 1.0}, "confidence is 1.0"),
        ({"assume_watts": float("nan")}, "assume_watts is nan"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


@pytest.mark.parametrize("given", [[], ["a", "a"], ["a", "idle"]])
def test_workloads_need_names_of_their_own(simulation: Simulation, meter: EnergyMeter, given: list[str]) -> None:
    with pytest.raises(ValueError, match="give each a name of its own" if given else "there are no workloads"):
        measure([work(simulation, name, 200) for name in given], meter)
    assert simulation.time == 0


def test_workloads_without_items_are_refused(simulation: Simulation, meter: EnergyMeter) -> None:
    for items in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"workload a has {items} items; give a whole number"):
            Workload("a", print, items)
    with pytest.raises(TypeError, match="workload a: run is None"):
        Workload("a", None)
