"""The energy meter on a real GPU: what must hold of any, and zeus over the same window where it is installed."""

from __future__ import annotations

import importlib.util
import time

import pytest
import torch

from cet.energy import EnergyMeter, Flag


def work(seconds: float) -> None:
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(20):
            a = (a @ a).clamp(-1, 1)
        torch.cuda.synchronize()


@pytest.mark.parametrize("integral", [False, True])
def test_work_takes_more_than_idling_and_less_than_the_limit(integral: bool) -> None:
    work(1.0)
    with EnergyMeter(["cuda"], integral=integral, rapl=False).opened() as meter:
        (domain,) = meter.domains
        facts = meter.facts(domain.name)
        watts = {}
        for name, task in (("work", work), ("idle", time.sleep)):
            meter.start()
            task(3.0)
            reading = meter.stop()
            assert reading.joules is not None, reading.reasons
            watts[name] = reading.joules / reading.seconds
    assert 0 < watts["idle"] < watts["work"]
    assert facts is not None
    if facts.power_limit is not None:
        assert watts["work"] < 1.1 * facts.power_limit


def test_counter_and_integral_are_both_reported_or_flagged() -> None:
    with EnergyMeter(["cuda"], integral=True, rapl=False) as meter:
        work(5.0)
    (domain,) = meter.reading.domains
    if domain.counter_joules is None or domain.integral_joules is None:
        assert domain.flags
    elif abs(domain.counter_joules - domain.integral_joules) > 0.05 * domain.counter_joules:
        assert Flag.COUNTER_DISAGREES in domain.flags


if importlib.util.find_spec("zeus") is not None:

    def test_zeus_reads_the_same(record_property: pytest.RecordProperty) -> None:
        from zeus.monitor import ZeusMonitor

        monitor = ZeusMonitor(gpu_indices=[torch.cuda.current_device()])
        with EnergyMeter(["cuda"], rapl=False) as meter:
            monitor.begin_window("window")
            work(5.0)
            measurement = monitor.end_window("window")
        assert meter.reading.joules is not None
        difference = meter.reading.joules / measurement.total_energy - 1
        record_property("relative_difference", difference)
        print(f"cet reads {difference:+.2%} beside zeus")
        assert abs(difference) < 0.1
