"""RAPL through a powercap tree on disk: wraps, twins, parts, permissions."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cet.energy import EnergyMeter, EnergyReading, Flag
from nvml.simulation import VirtualClock
from powercap import Powercap

RANGE = 65_532_610_987  # uJ, of many desktop CPUs


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def powercap(tmp_path: Path) -> Powercap:
    return Powercap(tmp_path / "powercap")


def meter(powercap: Powercap, clock: VirtualClock) -> EnergyMeter:
    return EnergyMeter(["cpu"], clock=clock, powercap=powercap.root)


def measure(powercap: Powercap, clock: VirtualClock, seconds: float) -> EnergyReading:
    with meter(powercap, clock) as open_meter:
        clock.sleep(seconds)
    return open_meter.reading


def test_joules_of_a_package(powercap: Powercap, clock: VirtualClock) -> None:
    folder = powercap.zone("intel-rapl:0", "package-0", range_=RANGE)
    powercap.follow(clock, "intel-rapl:0", 50)
    reading = measure(powercap, clock, 10)
    package = reading["rapl:package-0"]
    assert package.joules == package.counter_joules == reading.joules == pytest.approx(500)
    assert (package.source, package.scope, package.device) == ("counter", "package", str(folder))
    assert package.end is not None
    assert (package.end.unit, package.end.raw) == ("uJ", int((folder / "energy_uj").read_text()))


@given(st.integers(1, RANGE - 1), st.floats(1, 900), st.floats(0.05, 60))
def test_a_wrap_does_not_show(
    tmp_path_factory: pytest.TempPathFactory, start: int, watts: float, seconds: float
) -> None:
    powercap, clock = Powercap(tmp_path_factory.mktemp("powercap")), VirtualClock()
    powercap.zone("intel-rapl:0", "package-0", start, RANGE)
    powercap.follow(clock, "intel-rapl:0", watts)
    assert measure(powercap, clock, seconds).joules == pytest.approx(watts * seconds, abs=1e-5)


def test_two_wraps_in_one_window_are_unknown_and_not_guessed(powercap: Powercap, clock: VirtualClock) -> None:
    powercap.zone("intel-rapl:0", "package-0", range_=RANGE)
    powercap.follow(clock, "intel-rapl:0", 300)
    package = measure(powercap, clock, 500)["rapl:package-0"]
    assert (package.joules, package.source, package.flags) == (None, None, (Flag.WRAP_UNKNOWN,))
    assert "wraps every 65533 J and was not read for 500 s" in (package.reason or "")


def test_unless_the_counter_is_read_in_between(powercap: Powercap, clock: VirtualClock) -> None:
    powercap.zone("intel-rapl:0", "package-0", range_=RANGE)
    powercap.follow(clock, "intel-rapl:0", 300)
    with meter(powercap, clock) as open_meter:
        for _ in range(17):
            clock.sleep(30)
            open_meter.read_wrapping()
    assert open_meter.reading.joules == pytest.approx(300 * 17 * 30, rel=1e-4)


def test_a_wrap_between_windows_spoils_none(powercap: Powercap, clock: VirtualClock) -> None:
    powercap.zone("intel-rapl:0", "package-0", range_=RANGE)
    powercap.follow(clock, "intel-rapl:0", 300)
    with meter(powercap, clock).opened() as open_meter:
        for _ in range(2):
            clock.sleep(500)
            open_meter.start()
            clock.sleep(5)
            assert open_meter.stop().joules == pytest.approx(1500)


@pytest.mark.parametrize("range_", [262_143_328_850, None])
def test_a_reset_is_no_wrap(powercap: Powercap, clock: VirtualClock, range_: int | None) -> None:
    powercap.zone("intel-rapl:0", "package-0", 9_000_000_000, range_)
    stop = clock.follow(lambda _: powercap.set("intel-rapl:0", 9_000_000_000 + round(1e6 * clock.now())))
    with meter(powercap, clock) as open_meter:
        clock.sleep(5)
        stop()
        powercap.set("intel-rapl:0", 17)
    package = open_meter.reading["rapl:package-0"]
    assert (package.joules, package.flags) == (None, (Flag.COUNTER_BACKWARDS,))
    assert "ran backwards" in (package.reason or "")


def test_a_frozen_counter_is_not_zero(powercap: Powercap, clock: VirtualClock) -> None:
    powercap.zone("intel-rapl:0", "package-0")
    stop = powercap.follow(clock, "intel-rapl:0", 50)
    with meter(powercap, clock) as open_meter:
        stop()
        clock.sleep(5)
    assert open_meter.reading.joules is None
    assert open_meter.reading.flags == (Flag.COUNTER_FROZEN,)
    assert "stood at" in open_meter.reading.reasons["rapl:package-0"]


def test_a_counter_that_vanishes_is_not_zero(powercap: Powercap, clock: VirtualClock) -> None:
    folder = powercap.zone("intel-rapl:0", "package-0")
    stop = powercap.follow(clock, "intel-rapl:0", 50)
    with meter(powercap, clock) as open_meter:
        stop()
        (folder / "energy_uj").unlink()
    assert open_meter.reading["rapl:package-0"].flags == (Flag.COUNTER_FAILED,)
    assert open_meter.reading.joules is None
    assert "cannot be read: No such file" in open_meter.reading.reasons["rapl:package-0"]


def test_what_lies_in_another_domain_is_measured_but_not_added(powercap: Powercap, clock: VirtualClock) -> None:
    watts = {
        "intel-rapl:0": ("package-0", 60),
        "intel-rapl:0:0": ("core", 40),
        "intel-rapl:0:1": ("uncore", 5),
        "intel-rapl:0:2": ("dram", 7),
        "intel-rapl:1": ("package-1", 30),
        "intel-rapl:1:0": ("dram", 3),
        "intel-rapl:2": ("psys", 150),
        "intel-rapl-mmio:0": ("package-0", 60),
    }
    for folder, (name, power) in watts.items():
        powercap.zone(folder, name)
        powercap.follow(clock, folder, power)
    reading = measure(powercap, clock, 10)
    assert {row.domain: row.joules for row in reading.domains} == pytest.approx(
        {
            "rapl:package-0": 600,
            "rapl:core-0": 400,
            "rapl:uncore-0": 50,
            "rapl:dram-0": 70,
            "rapl:package-1": 300,
            "rapl:dram-1": 30,
            "rapl:psys": 1500,
        }
    )
    assert reading.joules == pytest.approx(1000)


def test_packages_of_several_dies(powercap: Powercap, clock: VirtualClock) -> None:
    for folder, name in {"intel-rapl:0": "package-0-die-1", "intel-rapl:0:0": "dram"}.items():
        powercap.zone(folder, name)
        powercap.follow(clock, folder, 10)
    assert [row.domain for row in measure(powercap, clock, 1).domains] == [
        "rapl:package-0-die-1",
        "rapl:dram-0-die-1",
    ]


def test_the_twin_serves_where_the_first_is_missing(powercap: Powercap, clock: VirtualClock) -> None:
    powercap.zone("intel-rapl-mmio:0", "package-0")
    powercap.follow(clock, "intel-rapl-mmio:0", 20)
    assert measure(powercap, clock, 10).joules == pytest.approx(200)


def test_a_counter_for_root_only_is_left_out_with_the_mend(
    powercap: Powercap, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = powercap.zone("intel-rapl:0", "package-0") / "energy_uj"
    powercap.zone("intel-rapl:1", "package-1")
    powercap.follow(clock, "intel-rapl:1", 20)
    read_text = Path.read_text

    def guarded(path: Path, *args: Any, **kwargs: Any) -> str:
        if path == counter:
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", guarded)
    reading = measure(powercap, clock, 10)
    assert reading.joules == pytest.approx(200)
    assert [row.domain for row in reading.unavailable] == ["rapl:package-0"]
    assert reading.unavailable[0].fix == f"sudo chmod a+r {counter}"
    assert "readable by root only" in reading.reasons["rapl:package-0"]


@pytest.mark.parametrize(
    ("content", "why"), [("0\n", "stands still at 0 uJ"), ("77\n", "stands still"), ("", "no number")]
)
def test_a_masked_counter_is_left_out(powercap: Powercap, clock: VirtualClock, content: str, why: str) -> None:
    (powercap.zone("intel-rapl:0", "package-0") / "energy_uj").write_text(content)
    reading = measure(powercap, clock, 1)
    assert reading.joules is None
    assert reading.domains == ()
    assert why in reading.reasons["rapl:package-0"]


def test_a_zone_of_an_unknown_kind_is_named(powercap: Powercap, clock: VirtualClock) -> None:
    powercap.zone("intel-rapl:0", "gadget")
    assert "unknown kind" in measure(powercap, clock, 1).reasons["rapl:gadget"]


def test_no_tree_is_explained(powercap: Powercap, clock: VirtualClock) -> None:
    (row,) = measure(powercap, clock, 1).unavailable
    assert (row.domain, str(powercap.root) in row.reason) == ("rapl", True)
    assert "virtual machines and containers" in row.reason
    assert "bare metal" in (row.fix or "")


def test_another_system_is_explained(powercap: Powercap, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    (row,) = measure(powercap, clock, 1).unavailable
    assert "this is Darwin" in row.reason


def test_the_environment_names_another_tree(
    powercap: Powercap, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    powercap.zone("intel-rapl:0", "package-0")
    powercap.follow(clock, "intel-rapl:0", 20)
    monkeypatch.setenv("CET_POWERCAP_ROOT", str(powercap.root))
    with EnergyMeter(["cpu"], clock=clock) as open_meter:
        pass
    assert [domain.name for domain in open_meter.domains] == ["rapl:package-0"]


def test_the_cpu_can_be_left_out(powercap: Powercap, clock: VirtualClock) -> None:
    powercap.zone("intel-rapl:0", "package-0")
    with EnergyMeter([], rapl=False, clock=clock, powercap=powercap.root) as open_meter:
        clock.sleep(1)
    assert open_meter.domains == ()
    assert open_meter.reading.joules is None
    assert open_meter.reading.reasons == {"cpu": "it is left out, and no GPU is asked for"}
