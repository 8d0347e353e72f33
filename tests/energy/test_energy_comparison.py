"""Comparing two workloads, on simulated GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cet.energy.comparison import Comparison, Contrast, compare
from cet.energy.measurement import Quantity, Settings
from cet.energy.meter import EnergyMeter
from cet.energy.statistics import Estimate
from nvml.simulation import Simulation
from simulated_work import work

QUICK = Settings(warmup=0.5)


@pytest.fixture
def meter(simulation: Simulation) -> Iterator[EnergyMeter]:
    simulation.gpu(leakage=0, idle=100, tick=0.02)
    with EnergyMeter(rapl=False, clock=simulation.clock).opened() as meter:
        yield meter


def of(comparison: Comparison, quantity: Quantity, domain: str | None = None) -> Contrast:
    (found,) = [each for each in comparison.contrasts if (each.quantity, each.domain) == (quantity, domain)]
    return found


def test_ratio_and_verdict_per_quantity(simulation: Simulation, meter: EnergyMeter) -> None:
    fast = work(simulation, "fast", 300, seconds=0.05, items=10)
    frugal = work(simulation, "frugal", 100, seconds=0.08, items=10)
    found = compare(fast, frugal, meter, QUICK)
    seconds, joules, net = (of(found, quantity) for quantity in ("seconds", "joules", "net_joules"))
    assert (seconds.verdict, joules.verdict, net.verdict) == ("less", "more", "more")
    assert seconds.ratio.value == pytest.approx(5 / 8)
    assert joules.ratio.value == pytest.approx(400 * 5 / (200 * 8), rel=5e-3)
    assert net.ratio.value == pytest.approx(300 * 5 / (100 * 8), rel=1e-2)
    assert joules.a.value == pytest.approx(2.0, rel=5e-3)
    assert joules.b.value == pytest.approx(1.6, rel=5e-3)
    assert (found.a, found.b) == ("fast", "frugal")
    assert found.measurement.workloads == ("fast", "frugal")


def test_equal_workloads_are_not_distinguishable(simulation: Simulation, meter: EnergyMeter) -> None:
    found = compare(work(simulation, "a", 200), work(simulation, "b", 200), meter, QUICK)
    assert of(found, "joules").verdict == "not distinguishable"
    assert of(found, "joules").ratio.value == pytest.approx(1, abs=5e-3)


def test_a_ratio_above_idle_needs_energy_above_idle(simulation: Simulation, meter: EnergyMeter) -> None:
    found = compare(work(simulation, "a", 200), work(simulation, "asleep", 0), meter, QUICK)
    assert of(found, "joules").verdict == "more"
    net = of(found, "net_joules")
    assert net.verdict == "unknown"
    assert net.ratio.value is None
    assert "not above zero" in net.ratio.reason
    assert net.b.value == pytest.approx(0, abs=0.05)


def test_each_domain_is_compared_where_the_total_is_of_several(simulation: Simulation) -> None:
    simulation.reset(gpus=2)
    for gpu in (0, 1):
        simulation.gpu(gpu, leakage=0, tick=0.02)
    with EnergyMeter(rapl=False, clock=simulation.clock).opened() as meter:
        found = compare(work(simulation, "a", 230), work(simulation, "b", 30), meter, QUICK)
    assert of(found, "joules").ratio.value == pytest.approx(370 / 170, rel=5e-3)
    assert of(found, "joules", "gpu:0").ratio.value == pytest.approx(300 / 100, rel=5e-3)
    assert of(found, "joules", "gpu:1").verdict == "not distinguishable"


def test_without_a_counter_time_is_compared(simulation: Simulation, tmp_path: Path) -> None:
    with EnergyMeter(["cpu"], clock=simulation.clock, powercap=tmp_path).opened() as meter:
        found = compare(work(simulation, "a", 0), work(simulation, "b", 0, seconds=0.04), meter, QUICK)
    assert of(found, "seconds").verdict == "more"
    assert of(found, "joules").verdict == "unknown"
    assert "rapl" in of(found, "joules").ratio.reason


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.9, 0.99, "less"),
        (1.01, 1.2, "more"),
        (0.9, 1.1, "not distinguishable"),
        (1.0, 1.1, "not distinguishable"),
        (None, None, "unknown"),
    ],
)
def test_a_verdict_needs_an_interval_without_one(low: float | None, high: float | None, verdict: str) -> None:
    estimate = Estimate(1.0, low, high, "1", 10)
    assert Contrast("joules", None, estimate, estimate, estimate).verdict == verdict
