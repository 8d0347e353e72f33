"""NVML's error codes: what each makes of a call, of a GPU, and of NVML as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pynvml
import pytest

from cet.energy import DeviceLostError, DeviceState
from cet.energy import nvml as energy_nvml
from cet.energy.domains import ReadingError
from nvml.simulation import Simulation

COUNTER = "nvmlDeviceGetTotalEnergyConsumption"
GONE = (pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED)
PASSING = (pynvml.NVML_ERROR_UNKNOWN, pynvml.NVML_ERROR_TIMEOUT)
LASTING = (
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_NO_PERMISSION,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    4321,  # a code that no version knows
)


@pytest.fixture
def gpu(simulation: Simulation) -> Iterator[energy_nvml.Gpu]:
    with energy_nvml.opened(simulation.clock) as (gpus, _):
        yield gpus[0]


@pytest.mark.parametrize("code", PASSING)
def test_what_may_pass_is_tried_again(simulation: Simulation, gpu: energy_nvml.Gpu, code: int) -> None:
    simulation.fault(COUNTER, code, count=energy_nvml.ATTEMPTS - 1)
    assert gpu.read().raw > 0
    assert simulation.time == pytest.approx((energy_nvml.ATTEMPTS - 1) * energy_nvml.PAUSE)


@pytest.mark.parametrize("code", PASSING)
def test_but_not_for_ever(simulation: Simulation, gpu: energy_nvml.Gpu, code: int) -> None:
    simulation.fault(COUNTER, code)
    with pytest.raises(ReadingError, match=f"failed 3 times: .* \\(NVML error {code}\\)"):
        gpu.read()
    assert simulation.time == pytest.approx((energy_nvml.ATTEMPTS - 1) * energy_nvml.PAUSE)


@pytest.mark.parametrize("code", LASTING)
def test_what_lasts_is_not_tried_again(simulation: Simulation, gpu: energy_nvml.Gpu, code: int) -> None:
    simulation.fault(COUNTER, code, count=1)
    with pytest.raises(ReadingError, match=rf"gpu:0: {COUNTER} failed: .*\(NVML error {code}\)") as caught:
        gpu.read()
    assert {caught.value}, "it can be hashed, as pynvml's own errors cannot"
    assert caught.value.__context__ is None
    assert gpu.read().raw > 0


@pytest.mark.parametrize("code", GONE)
def test_a_lost_gpu_is_an_error_of_its_own(simulation: Simulation, gpu: energy_nvml.Gpu, code: int) -> None:
    simulation.fault("*", code)
    for question in (gpu.read, gpu.state, gpu.facts, gpu.in_mig_mode, lambda: gpu.power):
        with pytest.raises(DeviceLostError, match=rf"gpu:0: .*\(NVML error {code}\); reset it by nvidia-smi"):
            question()


@pytest.mark.parametrize(
    ("code", "mend"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "install the NVIDIA driver, whose libnvidia-ml.so.1 was not found"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "load the NVIDIA kernel module, or start the container with --gpus all"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "restart the machine: library and loaded driver differ in version"),
        (pynvml.NVML_ERROR_NO_PERMISSION, "run as a user who may open /dev/nvidiactl"),
        (pynvml.NVML_ERROR_UNKNOWN, None),
    ],
)
def test_nvml_that_does_not_start_says_why_and_what_mends_it(
    simulation: Simulation, code: int, mend: str | None
) -> None:
    simulation.fault("nvmlInitWithFlags", code)
    with pytest.raises(ReadingError, match=rf"NVML: nvmlInit failed.*\(NVML error {code}\)") as caught:
        energy_nvml.opened(simulation.clock).__enter__()
    assert caught.value.fix == mend


def test_a_gpu_that_does_not_answer_leaves_the_others(simulation: Simulation) -> None:
    simulation.reset(gpus=3)
    simulation.fault("nvmlDeviceGetHandleByIndex_v2", pynvml.NVML_ERROR_GPU_IS_LOST, gpu=0)
    simulation.fault("nvmlDeviceGetUUID", pynvml.NVML_ERROR_NO_PERMISSION, gpu=1)
    with energy_nvml.opened(simulation.clock) as (gpus, silent):
        assert [gpu.index for gpu in gpus] == [2]
    assert [row.domain for row in silent] == ["gpu:0", "gpu:1"]
    assert "GPU is lost" in silent[0].reason
    assert silent[1].fix == "run as a user who may open /dev/nvidiactl"


def test_it_is_shut_down_whatever_happens(simulation: Simulation) -> None:
    with suppress(ZeroDivisionError), energy_nvml.opened(simulation.clock):
        assert simulation.references == 1
        raise ZeroDivisionError
    assert simulation.references == 0
    simulation.fault("nvmlDeviceGetCount_v2", pynvml.NVML_ERROR_NO_PERMISSION)
    with pytest.raises(ReadingError):
        energy_nvml.opened(simulation.clock).__enter__()
    assert simulation.references == 0
    simulation.heal()
    simulation.fault("nvmlShutdown", pynvml.NVML_ERROR_UNKNOWN)
    with energy_nvml.opened(simulation.clock):
        pass
    simulation.heal()
    pynvml.nvmlShutdown()


def test_joules_come_from_the_counter(gpu: energy_nvml.Gpu) -> None:
    assert (gpu.domain.name, gpu.domain.source, gpu.domain.scope) == ("gpu:0", "counter", "board")
    assert gpu.domain.reason is None
    assert gpu.uuid in gpu.domain.device
    assert gpu.read().joules == gpu.read().raw / 1e3


@pytest.mark.parametrize("code", LASTING)
def test_without_a_counter_from_power(simulation: Simulation, gpu: energy_nvml.Gpu, code: int) -> None:
    simulation.fault(COUNTER, code)
    assert gpu.domain.source == "integral"
    assert f"NVML error {code}" in (gpu.domain.reason or "")


def test_a_counter_at_zero_is_none(simulation: Simulation, gpu: energy_nvml.Gpu) -> None:
    simulation.gpu(frozen=1, counter=0)
    assert gpu.domain.source == "integral"
    assert "stands at 0" in (gpu.domain.reason or "")


def test_with_neither_there_is_no_domain(simulation: Simulation, gpu: energy_nvml.Gpu) -> None:
    simulation.fault(COUNTER, pynvml.NVML_ERROR_NOT_SUPPORTED)
    simulation.fault("nvmlDeviceGetFieldValues", pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
    simulation.fault("nvmlDeviceGetPowerUsage", pynvml.NVML_ERROR_NO_PERMISSION)
    with pytest.raises(ReadingError, match=f"{COUNTER} failed.*; gpu:0: nvmlDeviceGetPowerUsage failed") as caught:
        _ = gpu.domain
    assert caught.value.fix == "run as a user who may open /dev/nvidiactl"


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND])
@pytest.mark.parametrize(
    ("missing", "kind"),
    [
        ((), "instant"),
        (("field:186",), "average"),
        (("field:186", "field:185"), "usage"),
        (("nvmlDeviceGetFieldValues",), "usage"),
    ],
)
def test_power_is_asked_for_by_name_first(
    simulation: Simulation, gpu: energy_nvml.Gpu, code: int, missing: tuple[str, ...], kind: str
) -> None:
    for name in missing:
        simulation.fault(name, code)
    simulation.gpu(idle=100, leakage=0)
    simulation.clock.sleep(2)
    assert gpu.power.kind == kind
    assert gpu.power.watts() == pytest.approx(100, abs=0.1)


def test_no_watts_are_no_answer(simulation: Simulation, gpu: energy_nvml.Gpu) -> None:
    simulation.gpu(power_gain=0)
    with pytest.raises(ReadingError, match="reports a power of 0 mW"):
        gpu.power.watts()
    assert gpu.state().watts is None


def test_the_counter_of_a_grace_module_covers_the_module(simulation: Simulation) -> None:
    simulation.gpu(name="NVIDIA GH200 480GB", idle=100, leakage=0, module=80)
    simulation.clock.sleep(2)
    with energy_nvml.opened(simulation.clock) as (gpus, _):
        assert gpus[0].domain.scope == "module"
        before = gpus[0].read().joules
        simulation.clock.sleep(1)
        assert gpus[0].power.watts() == pytest.approx(gpus[0].read().joules - before, rel=1e-3)


def test_state_and_facts(simulation: Simulation, gpu: energy_nvml.Gpu) -> None:
    simulation.gpu(idle=100, leakage=0, sm_clock=1500, memory_clock=2000, throttle=0x40 | 0x4 | 0x1)
    simulation.gpu(limit=500, persistence=0)
    simulation.clock.sleep(0.1)
    simulation.gpu(temperature=60)
    simulation.gpu(process=11)
    simulation.gpu(process=12)
    assert gpu.state() == DeviceState(60, 1500, 2000, pytest.approx(100), ("SwPowerCap", "HwThermalSlowdown"))
    facts = gpu.facts()
    assert (facts.name, facts.uuid, facts.driver) == (gpu.name, gpu.uuid, "580.00.simulated")
    assert (facts.power_limit, facts.persistence, facts.processes) == (500, False, (11, 12))


@pytest.mark.parametrize("code", LASTING)
@pytest.mark.parametrize(
    ("function", "unknown"),
    [
        ("nvmlDeviceGetTemperature", {"temperature"}),
        ("nvmlDeviceGetClockInfo", {"sm_clock", "memory_clock"}),
        ("nvmlDeviceGetCurrentClocksEventReasons", {"throttle"}),
        ("nvmlDeviceGetEnforcedPowerLimit", {"power_limit"}),
        ("nvmlDeviceGetPersistenceMode", {"persistence"}),
        ("nvmlDeviceGetComputeRunningProcesses_v3", {"processes"}),
        ("nvmlSystemGetDriverVersion", {"driver"}),
    ],
)
def test_what_one_call_does_not_tell_is_none_and_the_rest_is_there(
    simulation: Simulation, gpu: energy_nvml.Gpu, function: str, unknown: set[str], code: int
) -> None:
    simulation.fault(function, code)
    told = {**vars(gpu.state()), **vars(gpu.facts())}
    assert {name for name, value in told.items() if value is None} == unknown


def test_a_gpu_or_driver_that_does_not_know_mig_is_not_split(simulation: Simulation, gpu: energy_nvml.Gpu) -> None:
    assert not gpu.in_mig_mode()
    simulation.gpu(mig=1)
    assert gpu.in_mig_mode()
    simulation.fault("nvmlDeviceGetMigMode", pynvml.NVML_ERROR_NOT_SUPPORTED)
    assert not gpu.in_mig_mode()
