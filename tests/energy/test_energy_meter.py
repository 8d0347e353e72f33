"""The meter against the simulated NVML: the truth is found, and what is not known is never 0."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pynvml
import pytest

from cet.energy import DeviceLostError, DomainEnergy, EnergyMeter, EnergyReading, Flag, MonotonicClock, Unavailable
from cet.energy.domains import PowerSample
from cet.energy.window import integral
from nvml.simulation import Simulation, environment
from powercap import Powercap

COUNTER = "nvmlDeviceGetTotalEnergyConsumption"
GONE = (pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED)
FIELD = "nvmlDeviceGetFieldValues"


@pytest.fixture
def meter(simulation: Simulation) -> EnergyMeter:
    return EnergyMeter(rapl=False, clock=simulation.clock)


def window(
    simulation: Simulation, seconds: float = 5.0, *, gpu: str = "gpu:0", integral: bool = False
) -> tuple[DomainEnergy, float]:
    """A window of one domain, and its true joules."""
    meter = EnergyMeter(rapl=False, integral=integral, clock=simulation.clock)
    with meter:
        before = simulation.energy()
        simulation.clock.sleep(seconds)
        truth = simulation.energy() - before
    assert meter.reading.seconds == pytest.approx(seconds, rel=1e-3)
    return meter.reading[gpu], truth


def calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """A list that grows with every call of a function of pynvml."""
    seen: list[int] = []
    function = getattr(pynvml, name)

    def counted(*arguments: object) -> object:
        seen.append(1)
        return function(*arguments)

    counted.__name__ = name
    monkeypatch.setattr(pynvml, name, counted)
    return seen


@pytest.mark.parametrize("phase", [0.0, 0.013, 0.05, 0.087])
@pytest.mark.parametrize("watts", [0.0, 330.0])
def test_joules_are_true_up_to_a_tick(simulation: Simulation, phase: float, watts: float) -> None:
    simulation.gpu(phase=phase)
    simulation.load(watts)
    simulation.clock.sleep(2)
    energy, truth = window(simulation)
    assert energy.joules == pytest.approx(truth, rel=0.1 / 5)
    assert (energy.source, energy.scope, energy.reason, energy.flags) == ("counter", "board", None, ())
    assert energy.start is not None
    assert energy.end is not None
    assert energy.counter_joules == energy.joules == pytest.approx((energy.end.raw - energy.start.raw) / 1e3)
    assert (energy.end.unit, energy.end.time - energy.start.time) == ("mJ", pytest.approx(5))
    assert energy.samples == ()


def test_the_counter_is_read_at_the_edges_only_and_nothing_runs(
    simulation: Simulation, meter: EnergyMeter, monkeypatch: pytest.MonkeyPatch
) -> None:
    with meter.opened():
        reads, fields = calls(monkeypatch, COUNTER), calls(monkeypatch, FIELD)
        threads = threading.active_count()
        meter.start()
        assert (len(reads), len(fields)) == (1, 0)
        simulation.clock.sleep(5)
        assert not simulation.clock.busy
        assert threading.active_count() == threads
        assert (len(reads), len(fields)) == (1, 0)
        meter.stop()
        assert (len(reads), len(fields)) == (2, 0)


def test_two_edges_cost_less_than_a_thousandth_of_a_window(simulation: Simulation, tmp_path: Path) -> None:
    """0.1 % of 5 s, with a GPU and four RAPL zones, on this machine's own clock."""
    simulation.reset(real_time=True)
    powercap, clock = Powercap(tmp_path / "powercap"), MonotonicClock()
    folders = [f"intel-rapl:{index}" for index in range(4)]
    for index, folder in enumerate(folders):
        powercap.zone(folder, f"package-{index}")
    stops = [powercap.follow(clock, folder, 50) for folder in folders]
    try:
        with EnergyMeter(powercap=powercap.root).opened() as meter:
            for stop in stops:
                stop()
            assert len(meter.domains) == 5
            took = []
            for _ in range(21):
                begin = time.thread_time()
                meter.start()
                meter.stop()
                took.append(time.thread_time() - begin)
    finally:
        for stop in stops:
            stop()
    assert sorted(took)[10] < 0.001 * 5


def test_a_meter_opens_nvml_once_for_many_windows(
    simulation: Simulation, meter: EnergyMeter, monkeypatch: pytest.MonkeyPatch
) -> None:
    inits = calls(monkeypatch, "nvmlInit")
    with meter.opened():
        for _ in range(3):
            meter.start()
            simulation.clock.sleep(1)
            assert meter.stop().joules is not None
            assert meter.reading.seconds == pytest.approx(1)
        with meter.opened(), meter:
            simulation.clock.sleep(1)
        meter.start()
        meter.stop()
    assert len(inits) == 1


def test_windows_and_meters_nest(simulation: Simulation, meter: EnergyMeter) -> None:
    inner = EnergyMeter(rapl=False, clock=simulation.clock)
    simulation.gpu(tick=0.02)
    simulation.load(100)
    simulation.clock.sleep(1)
    with meter:
        simulation.clock.sleep(1)
        with meter:
            simulation.clock.sleep(2)
        middle = meter.reading
        with inner:
            simulation.clock.sleep(3)
        simulation.clock.sleep(1)
    assert (meter.reading.seconds, middle.seconds, inner.reading.seconds) == pytest.approx((7, 2, 3))
    assert meter.reading.joules == pytest.approx(7 / 2 * (middle.joules or 0), rel=0.02)
    assert meter.reading.joules == pytest.approx(7 / 3 * (inner.reading.joules or 0), rel=0.02)


def test_several_gpus_add_up(simulation: Simulation) -> None:
    simulation.reset(gpus=3)
    for index, watts in enumerate((10, 100, 300)):
        simulation.load(watts, index)
    simulation.clock.sleep(1)
    with EnergyMeter(["cuda:2", "cuda:0"], rapl=False, clock=simulation.clock) as meter:
        before = [simulation.energy(index) for index in range(3)]
        simulation.clock.sleep(5)
        truth = [simulation.energy(index) - before[index] for index in range(3)]
    assert {row.domain: row.joules for row in meter.reading.domains} == pytest.approx(
        {"gpu:2": truth[2], "gpu:0": truth[0]}, rel=0.02
    )
    assert meter.reading.joules == pytest.approx(truth[0] + truth[2], rel=0.02)


def test_threads_measure_at_once(simulation: Simulation) -> None:
    simulation.reset(real_time=True)
    simulation.gpu(tick=0.01)

    def measure(seconds: float) -> EnergyReading:
        with EnergyMeter(rapl=False, integral=True) as meter:
            time.sleep(seconds)
        return meter.reading

    lengths = [0.3, 0.5, 0.4, 0.6]
    with ThreadPoolExecutor(4) as pool:
        readings = list(pool.map(measure, lengths))
    for reading, seconds in zip(readings, lengths, strict=True):
        assert reading.seconds >= seconds
        assert reading.joules == pytest.approx(71 * reading.seconds, rel=0.1)
        assert reading["gpu:0"].integral_joules == pytest.approx(71 * reading.seconds, rel=0.1)


def test_the_sampler_is_a_thread_that_ends_with_the_window(simulation: Simulation) -> None:
    simulation.reset(real_time=True)
    before = threading.active_count()
    with EnergyMeter(rapl=False, integral=True) as meter:
        assert threading.active_count() == before + 1
        time.sleep(0.5)
    assert threading.active_count() == before
    assert 6 <= len(meter.reading["gpu:0"].samples) <= 12


def test_the_integral_is_reported_beside_the_counter(simulation: Simulation) -> None:
    simulation.load(150)
    simulation.clock.sleep(2)
    energy, truth = window(simulation, integral=True)
    assert energy.source == "counter"
    assert energy.joules == energy.counter_joules
    assert energy.integral_joules == pytest.approx(truth, rel=0.01)
    assert len(energy.samples) in (5 / 0.05 + 1, 5 / 0.05 + 2)
    assert energy.flags == ()
    assert not simulation.clock.busy


@pytest.mark.parametrize(
    ("gain", "flags"), [(1.04, ()), (1.07, (Flag.COUNTER_DISAGREES,)), (0.93, (Flag.COUNTER_DISAGREES,))]
)
def test_counter_and_integral_that_differ_are_flagged(
    simulation: Simulation, gain: float, flags: tuple[Flag, ...]
) -> None:
    simulation.gpu(gain=gain)
    energy, truth = window(simulation, integral=True)
    assert energy.flags == flags
    assert energy.joules == pytest.approx(gain * truth, rel=0.02)
    assert energy.integral_joules == pytest.approx(truth, rel=0.02)


@pytest.mark.parametrize("code", [3, 4, 13])
def test_without_a_counter_power_is_integrated(simulation: Simulation, code: int) -> None:
    simulation.fault(COUNTER, code)
    simulation.load(150)
    simulation.clock.sleep(2)
    energy, truth = window(simulation)
    assert energy.source == "integral"
    assert energy.joules == energy.integral_joules == pytest.approx(truth, rel=0.01)
    assert (energy.counter_joules, energy.flags) == (None, ())
    assert f"NVML error {code}" in (energy.reason or "")


def test_an_integral_of_averages_is_flagged(simulation: Simulation) -> None:
    simulation.fault("field:186", 3)
    simulation.clock.sleep(2)
    energy, truth = window(simulation, integral=True)
    assert energy.flags == (Flag.INTEGRAL_OF_AVERAGE,)
    assert energy.integral_joules == pytest.approx(truth, rel=0.01)


@pytest.mark.parametrize("code", [3, 10, 13, 999])
def test_with_neither_the_gpu_is_unavailable(simulation: Simulation, code: int) -> None:
    for function in (COUNTER, FIELD, "nvmlDeviceGetPowerUsage"):
        simulation.fault(function, code)
    with EnergyMeter(rapl=False, clock=simulation.clock) as meter:
        simulation.clock.sleep(1)
    assert (meter.reading.joules, meter.reading.domains) == (None, ())
    assert f"NVML error {code}" in meter.reading.reasons["gpu:0"]


@pytest.mark.parametrize("code", [9, 12])
def test_without_nvml_the_gpu_is_null_with_reason_and_mend(simulation: Simulation, code: int) -> None:
    simulation.fault("nvmlInitWithFlags", code)
    with EnergyMeter(rapl=False, clock=simulation.clock) as meter:
        simulation.clock.sleep(1)
    assert meter.reading.joules is None
    (row,) = meter.reading.unavailable
    assert row.domain == "gpu"
    assert f"NVML error {code}" in row.reason
    assert row.fix


def test_the_cpu_alone_is_a_total_and_says_what_it_lacks(simulation: Simulation, tmp_path: Path) -> None:
    simulation.fault("nvmlInitWithFlags", 12)
    powercap = Powercap(tmp_path / "powercap")
    powercap.zone("intel-rapl:0", "package-0")
    powercap.follow(simulation.clock, "intel-rapl:0", 40)
    with EnergyMeter(clock=simulation.clock, powercap=powercap.root) as meter:
        simulation.clock.sleep(10)
    assert meter.reading.joules == pytest.approx(400)
    assert list(meter.reading.reasons) == ["gpu"]


@pytest.mark.parametrize("integral", [False, True])
def test_a_counter_that_runs_backwards_voids_the_window(simulation: Simulation, integral: bool) -> None:
    simulation.at(3.07, "gpu 0 counter 118000000")
    energy, _ = window(simulation, integral=integral)
    assert (energy.joules, energy.source, energy.counter_joules) == (None, None, None)
    assert energy.flags == (Flag.COUNTER_BACKWARDS,)
    assert "ran backwards, from 123456789 to 118" in (energy.reason or "")


def test_a_frozen_counter_is_never_zero(simulation: Simulation) -> None:
    simulation.gpu(frozen=1)
    energy, _ = window(simulation)
    assert (energy.joules, energy.source) == (None, None)
    assert energy.flags == (Flag.COUNTER_FROZEN,)
    assert energy.reason == "gpu:0: the counter stood at 123456789 mJ for 5.00 s"
    energy, truth = window(simulation, integral=True)
    assert energy.source == "integral"
    assert energy.joules == pytest.approx(truth, rel=0.02)
    assert energy.flags == (Flag.COUNTER_FROZEN,)
    assert "stood at" in (energy.reason or "")


def test_the_integral_can_be_asked_for_window_by_window(simulation: Simulation, meter: EnergyMeter) -> None:
    with meter.opened():
        for wanted in (True, False, None):
            meter.start(integral=wanted)
            simulation.clock.sleep(1)
            assert (meter.stop()["gpu:0"].integral_joules is not None) is bool(wanted)


@pytest.mark.parametrize("code", [10, 999])
def test_a_passing_failure_of_an_edge_does_not_show(simulation: Simulation, meter: EnergyMeter, code: int) -> None:
    with meter.opened():
        simulation.fault(COUNTER, code, count=2)
        meter.start()
        simulation.clock.sleep(5)
        simulation.fault(COUNTER, code, count=2)
        assert meter.stop()["gpu:0"].flags == ()


@pytest.mark.parametrize("code", [10, 999])
@pytest.mark.parametrize("edge", ["start", "end"])
@pytest.mark.parametrize("integral", [False, True])
def test_one_that_lasts_voids_the_window_and_no_other(
    simulation: Simulation, meter: EnergyMeter, code: int, edge: str, integral: bool
) -> None:
    with meter.opened():
        if edge == "start":
            simulation.fault(COUNTER, code, count=3)
        meter.start(integral=integral)
        simulation.clock.sleep(5)
        if edge == "end":
            simulation.fault(COUNTER, code, count=3)
        energy = meter.stop()["gpu:0"]
        assert (energy.joules, energy.source, energy.flags) == (None, None, (Flag.COUNTER_FAILED,))
        assert "failed 3 times" in (energy.reason or "")
        assert f"NVML error {code}" in (energy.reason or "")
        meter.start()
        simulation.clock.sleep(5)
        assert meter.stop().joules is not None


@pytest.mark.parametrize("code", [3, 999])
def test_power_with_a_gap_has_no_integral(simulation: Simulation, code: int) -> None:
    simulation.at(1, f"fault {FIELD} 0 {code} 0 1000000")
    simulation.at(3, "heal")
    energy, truth = window(simulation, integral=True)
    assert energy.joules == pytest.approx(truth, rel=0.02)
    assert (energy.source, energy.integral_joules) == ("counter", None)
    assert energy.flags == (Flag.INTEGRAL_FAILED,)


def test_and_without_a_counter_no_joules(simulation: Simulation) -> None:
    simulation.fault(COUNTER, 3)
    simulation.at(1, f"fault {FIELD} 0 999 0 1000000")
    energy, _ = window(simulation)
    assert (energy.joules, energy.source, energy.flags) == (None, None, (Flag.INTEGRAL_FAILED,))
    assert "NVML error 3" in (energy.reason or "")
    assert "its power was not known for more than 1 s" in (energy.reason or "")


def test_the_trapezoid_rule() -> None:
    ramp = [PowerSample(time, 100 * time) for time in (0.0, 0.3, 0.5, 1.5)]
    assert integral(ramp, 0, 1.5) == pytest.approx(100 * 1.5**2 / 2)
    assert integral(ramp[1:], 0, 1.5) == pytest.approx(100 * (0.3**2 + (1.5**2 - 0.3**2) / 2))
    assert integral(ramp[:1], -0.4, 0.4) == 0
    assert integral(ramp[2:], 0.6, 1.4) == pytest.approx(0.8 * 100)  # edges are read a little outside of the window
    for start, end in ((-1.1, 1.5), (0, 2.6)):
        assert integral(ramp, start, end) is None
    assert integral([*ramp, PowerSample(2.6, 0)], 0, 2.6) is None
    assert integral([], 0, 0.1) is None


@pytest.mark.parametrize("code", GONE)
@pytest.mark.parametrize("source", ["counter", "integral"])
def test_a_lost_gpu_ends_the_window_with_what_is_known_of_the_others(
    simulation: Simulation, code: int, source: str
) -> None:
    simulation.reset(gpus=2)
    if source == "integral":
        simulation.fault(COUNTER, 3)
    meter = EnergyMeter(rapl=False, clock=simulation.clock)
    simulation.clock.sleep(1)
    with meter.opened():
        meter.start()
        simulation.clock.sleep(2)
        simulation.fault("*", code, gpu=0)
        simulation.clock.sleep(3)
        with pytest.raises(DeviceLostError, match=rf"gpu:0: .*\(NVML error {code}\)") as caught:
            meter.stop()
        reading = caught.value.reading
        assert reading is not None
        assert reading is meter.reading
        assert (reading["gpu:0"].joules, reading["gpu:0"].source) == (None, None)
        assert f"NVML error {code}" in reading.reasons["gpu:0"]
        assert reading["gpu:1"].joules == pytest.approx(71 * 5, rel=0.05)
        assert reading.joules is None
        with pytest.raises(DeviceLostError):
            meter.start()
        assert not simulation.clock.busy


def test_a_lost_gpu_ends_the_block_with_the_error(simulation: Simulation, meter: EnergyMeter) -> None:
    with pytest.raises(DeviceLostError), meter:  # noqa: PT012
        simulation.clock.sleep(5)
        simulation.fault("*", 15)
    assert meter.reading.joules is None


def test_an_error_of_the_block_is_not_hidden_by_one_of_the_meter(simulation: Simulation, meter: EnergyMeter) -> None:
    with pytest.raises(ZeroDivisionError) as caught, meter:  # noqa: PT012
        simulation.fault("*", 15)
        raise ZeroDivisionError
    assert "GPU is lost" in caught.value.__notes__[0]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_open_by_an_exception(simulation: Simulation, error: type[BaseException]) -> None:
    meter = EnergyMeter(rapl=False, integral=True, clock=simulation.clock)
    with pytest.raises(error), meter:  # noqa: PT012
        simulation.clock.sleep(1)
        meter.start()
        meter.start()
        simulation.clock.sleep(1)
        raise error
    assert not simulation.clock.busy
    assert simulation.references == 0
    assert meter.reading.seconds == pytest.approx(2)
    with pytest.raises(error), meter.opened():  # noqa: PT012
        meter.start()
        raise error
    assert not simulation.clock.busy
    with pytest.raises(RuntimeError, match="no window is open"):
        meter.stop()


def test_nor_by_one_that_begins_a_window(simulation: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = EnergyMeter(rapl=False, integral=True, clock=simulation.clock)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with meter.opened():
        monkeypatch.setattr(pynvml, COUNTER, interrupt)
        with pytest.raises(KeyboardInterrupt):
            meter.start()
        assert not simulation.clock.busy


def test_nor_by_an_error_of_cuda(simulation: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = EnergyMeter(rapl=False, integral=True, clock=simulation.clock)

    def synchronize() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"), meter:  # noqa: PT012
        simulation.clock.sleep(1)
        monkeypatch.setattr(meter, "synchronize", synchronize)
    assert not simulation.clock.busy
    assert simulation.references == 0


def test_a_meter_of_another_thread_is_refused(simulation: Simulation, meter: EnergyMeter) -> None:
    def use() -> None:
        for action in (meter.start, meter.stop, meter.__enter__, lambda: meter.state("gpu:0")):
            with pytest.raises(RuntimeError, match="open in another thread; give each thread a meter of its own"):
                action()

    with meter:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(use).result()
        simulation.clock.sleep(5)
    assert meter.reading.seconds == 5


def test_a_window_shorter_than_the_tick_does_not_call_the_counter_frozen(
    simulation: Simulation, meter: EnergyMeter
) -> None:
    simulation.gpu(tick=0.1)
    with meter.opened():
        meter.measure_update_period("gpu:0")
        simulation.clock.sleep(0.03)
        meter.start()
        simulation.clock.sleep(0.01)
        part = meter.stop()["gpu:0"]
    assert (part.joules, part.flags) == (None, (Flag.SHORT_WINDOW,))
    assert part.reason == "gpu:0: the window of 10 ms is too short for a counter that moves every 100 ms"


def test_a_meter_that_is_not_open_says_so(meter: EnergyMeter) -> None:
    with pytest.raises(RuntimeError, match="use it in a with-block"):
        meter.start()
    with pytest.raises(RuntimeError, match="no window is open"):
        meter.stop()
    with pytest.raises(RuntimeError, match="no window has ended yet"):
        _ = meter.reading
    with meter:
        pass
    for question in (meter.state, meter.facts, meter.measure_update_period):
        with pytest.raises(RuntimeError, match="use it in a with-block"):
            question("gpu:0")
    with pytest.raises(RuntimeError, match="use it in a with-block"):
        meter.read_wrapping()


@pytest.mark.parametrize("tick", [0.02, 0.1])
@pytest.mark.parametrize("phase", [0.0, 0.0137])
def test_the_tick_is_measured(simulation: Simulation, meter: EnergyMeter, tick: float, phase: float) -> None:
    simulation.gpu(tick=tick, phase=phase)
    with meter.opened():
        assert meter.measure_update_period("gpu:0") == pytest.approx(tick, abs=0.001)
        meter.start()
        simulation.clock.sleep(1)
        assert meter.stop()["gpu:0"].update_period == pytest.approx(tick, abs=0.001)


@pytest.mark.parametrize("command", ["gpu 0 frozen 1", f"fault {COUNTER} 0 999 5 1000000"])
def test_a_tick_that_cannot_be_measured_is_none(simulation: Simulation, meter: EnergyMeter, command: str) -> None:
    with meter.opened():
        simulation.command(command)
        assert meter.measure_update_period("gpu:0") is None
    assert simulation.time < 4


def test_without_a_counter_there_is_no_tick(simulation: Simulation, meter: EnergyMeter) -> None:
    simulation.fault(COUNTER, 3)
    with meter.opened():
        assert meter.measure_update_period("gpu:0") is None


def test_state_and_facts_of_a_domain(simulation: Simulation, tmp_path: Path) -> None:
    powercap = Powercap(tmp_path / "powercap")
    powercap.zone("intel-rapl:0", "package-0")
    powercap.follow(simulation.clock, "intel-rapl:0", 40)
    simulation.gpu(sm_clock=1234, limit=345)
    with EnergyMeter(clock=simulation.clock, powercap=powercap.root).opened() as meter:
        assert meter.state("gpu:0").sm_clock == 1234
        facts = meter.facts("gpu:0")
        assert facts is not None
        assert facts.power_limit == 345
        assert set(vars(meter.state("rapl:package-0")).values()) == {None}
        assert meter.facts("rapl:package-0") is None
        for question in (meter.state, meter.facts, meter.measure_update_period):
            with pytest.raises(ValueError, match="'gpu:7' is not measured; measured are: gpu:0, rapl:package-0"):
                question("gpu:7")


def row(joules: float | None, *, name: str = "gpu:0", in_total: bool = True) -> DomainEnergy:
    return DomainEnergy(name, "", "board", in_total, joules, None if joules is None else "counter", "because")


@pytest.mark.parametrize(
    ("rows", "joules"),
    [
        ([], None),
        ([row(None)], None),
        ([row(3.0), row(4.0)], 7.0),
        ([row(3.0), row(4.0, in_total=False)], 3.0),
        ([row(3.0), row(None)], None),
        ([row(3.0), row(None, in_total=False)], 3.0),
        ([row(4.0, in_total=False)], None),
    ],
)
def test_a_total_is_complete_or_none(rows: list[DomainEnergy], joules: float | None) -> None:
    reading = EnergyReading(0.0, 1.0, tuple(rows), (Unavailable("rapl", "no"),))
    assert reading.joules == joules
    assert reading.reasons["rapl"] == "no"
    assert ("gpu:0" in reading.reasons) is any(row.joules is None for row in rows)


def test_readings_are_asked_by_name() -> None:
    reading = EnergyReading(0.0, 1.0, (row(1.0), row(2.0, name="gpu:1")))
    assert reading["gpu:1"].joules == 2
    with pytest.raises(KeyError):
        reading["gpu:2"]


def test_every_flag_is_explained() -> None:
    assert all(flag.explanation.endswith(".") and flag == flag.value for flag in Flag)


def test_measuring_does_not_wait_for_torch(nvml_library: Path, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("clock real\ngpu 0 tick 0.01\n")
    code = """
import sys, time
from cet.energy import EnergyMeter
with EnergyMeter(rapl=False) as meter:
    time.sleep(0.2)
assert "torch" not in sys.modules
print(round(meter.reading.joules / meter.reading.seconds, -1))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=environment(nvml_library, script), capture_output=True, text=True, check=True, timeout=60
    )
    assert float(done.stdout) == 70
