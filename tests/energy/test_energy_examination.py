"""What a machine can measure: every counter is tried, and whatever fails becomes a reason."""

from __future__ import annotations

from pathlib import Path

import pynvml
import pytest

from cet.energy import NoCounterError
from cet.energy.examination import Examination, examine
from nvml.simulation import Simulation
from powercap import Powercap


@pytest.fixture(autouse=True)
def _no_rapl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CET_POWERCAP_ROOT", str(tmp_path / "powercap"))


def reason(examination: Examination, domain: str) -> str:
    (row,) = (row for row in examination.unavailable if row.domain == domain)
    return row.reason


def test_each_domain_is_tried(simulation: Simulation) -> None:
    simulation.reset(gpus=3)
    simulation.gpu(0, tick=0.04)
    simulation.fault("nvmlDeviceGetTotalEnergyConsumption", pynvml.NVML_ERROR_NOT_SUPPORTED, gpu=1)
    simulation.fault("*", pynvml.NVML_ERROR_GPU_IS_LOST, gpu=2)
    found = examine(clock=simulation.clock)
    counter, power = found.measurable
    assert counter.domain.device.startswith("NVIDIA Simulated GPU (GPU-00000000-")
    assert (counter.source, counter.reason) == ("counter", None)
    assert counter.update_period == pytest.approx(0.04, abs=0.001)
    assert (power.domain.name, power.source, power.update_period) == ("gpu:1", "integral", None)
    assert (power.reason or "").startswith("gpu:1: nvmlDeviceGetTotalEnergyConsumption failed")
    assert "NVML error 15" in reason(found, "gpu:2")
    assert "there is no RAPL zone" in reason(found, "rapl")
    found.require_gpu()


def test_nvml_that_does_not_start_is_explained(simulation: Simulation) -> None:
    simulation.fault("nvmlInitWithFlags", pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    found = examine(rapl=False, clock=simulation.clock)
    (row,) = found.unavailable
    assert (row.domain, found.measurable) == ("gpu", ())
    assert "NVML error 9" in row.reason
    assert "load the NVIDIA kernel module" in (row.fix or "")
    with pytest.raises(NoCounterError, match=r"no GPU's joules can be measured \(gpu: NVML: nvmlInit failed"):
        found.require_gpu()


@pytest.mark.parametrize("fault", ["choice", "lost", "unforeseen"])
def test_where_gpus_fail_the_cpu_is_examined(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str
) -> None:
    powercap = Powercap(tmp_path / "powercap")
    powercap.zone("intel-rapl:0", "package-0")
    if fault == "choice":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-8f2a")
    elif fault == "lost":
        simulation.fault("nvmlDeviceGetTemperature", pynvml.NVML_ERROR_GPU_IS_LOST)  # after it was opened
    else:
        monkeypatch.setattr("cet.energy.nvml.Gpu.facts", lambda _: 1 / 0)
    stop = powercap.follow(simulation.clock, "intel-rapl:0", 25)
    found = examine(clock=simulation.clock)
    stop()
    assert [row.domain.name for row in found.measurable] == ["rapl:package-0"]
    assert {"choice": "MIG-8f2a", "lost": "GPU is lost", "unforeseen": "division"}[fault] in reason(found, "gpu")
    assert examine(rapl=False, clock=simulation.clock).measurable == ()
