"""The simulated NVML is faithful: nvidia-ml-py loads it, and what it shows of a known power is what a GPU shows."""

from __future__ import annotations

import ctypes
import math
import subprocess
import sys
from pathlib import Path

import pynvml
import pytest

from nvml.simulation import LIBRARY, Simulation, environment

SYMBOLS = """
nvmlInitWithFlags nvmlShutdown nvmlErrorString nvmlSystemGetDriverVersion
nvmlDeviceGetCount_v2 nvmlDeviceGetHandleByIndex_v2 nvmlDeviceGetHandleByUUID nvmlDeviceGetName nvmlDeviceGetUUID
nvmlDeviceGetTotalEnergyConsumption nvmlDeviceGetPowerUsage nvmlDeviceGetEnforcedPowerLimit nvmlDeviceGetFieldValues
nvmlDeviceGetTemperature nvmlDeviceGetClockInfo nvmlDeviceGetCurrentClocksEventReasons nvmlDeviceGetPersistenceMode
nvmlDeviceGetMigMode nvmlDeviceGetComputeRunningProcesses_v3
"""


@pytest.fixture
def handle(simulation: Simulation) -> object:
    pynvml.nvmlInit()
    yield pynvml.nvmlDeviceGetHandleByIndex(0)
    pynvml.nvmlShutdown()


def field(handle: object, number: int, scope: int = 0) -> tuple[int, float]:
    """Return code and watts."""
    entry = pynvml.nvmlDeviceGetFieldValues(handle, [(number, scope)])[0]
    return entry.nvmlReturn, entry.value.uiVal / 1e3


def joules(handle: object) -> float:
    return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3


def test_library_has_the_symbols_that_are_loaded_and_no_others(nvml_library: Path) -> None:
    lines = subprocess.run(["nm", "-D", "--defined-only", nvml_library], capture_output=True, text=True, check=True)
    found = {line.split()[2] for line in lines.stdout.splitlines()}
    assert {name for name in found if name.startswith("nvml")} == set(SYMBOLS.split())
    assert not hasattr(ctypes.CDLL(str(nvml_library)), "nvmlInit")  # torch's CUDA build would call it


def test_field_value_has_forty_bytes() -> None:
    layout = pynvml.c_nvmlFieldValue_t
    assert ctypes.sizeof(layout) == 40
    assert [getattr(layout, name).offset for name, _ in layout._fields_] == [0, 4, 8, 16, 24, 28, 32]


def test_another_process_finds_it_by_its_name_and_carries_out_the_script(nvml_library: Path, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(
        "# two GPUs\nclock real\ngpus 2\ngpu 1 name NVIDIA GH200 480GB\n\nfault nvmlDeviceGetName 0 999 0 1\n"
    )
    code = """
import ctypes, time, pynvml
pynvml.nvmlInit()
print(pynvml.nvmlDeviceGetCount(), pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(1)))
try:
    pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
except pynvml.NVMLError_Unknown:
    print("unknown error")
gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
simulation = ctypes.CDLL("libnvidia-ml.so.1")
simulation.simulation_load(0, ctypes.c_double(300))
before = pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
time.sleep(0.3)
print(pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) - before > 0.15 * 370e3)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=environment(nvml_library, script), capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines() == ["2 NVIDIA GH200 480GB", "unknown error", "True"]


def test_a_wrong_script_is_not_passed_over(nvml_library: Path, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("gpu 0 colour green\n")
    command = [sys.executable, "-c", f"import ctypes; ctypes.CDLL({LIBRARY!r})"]
    done = subprocess.run(command, env=environment(nvml_library, script), capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "unknown parameter: colour" in done.stderr


def test_a_gpu_tells_everything_about_itself(simulation: Simulation, handle: object) -> None:
    simulation.gpu(limit=650, sm_clock=1755, memory_clock=2619, throttle=4, persistence=0, mig=1, process=4711)
    uuid = pynvml.nvmlDeviceGetUUID(handle)
    assert pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByUUID(uuid)) == "NVIDIA Simulated GPU"
    assert "simulated" in pynvml.nvmlSystemGetDriverVersion()
    assert pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) == 650_000
    assert pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM) == 1755
    assert pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM) == 2619
    assert pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle) == pynvml.nvmlClocksEventReasonSwPowerCap
    assert pynvml.nvmlDeviceGetPersistenceMode(handle) == 0
    assert pynvml.nvmlDeviceGetMigMode(handle) == [1, 1]
    assert [process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses_v3(handle)] == [4711]


def test_it_answers_only_between_init_and_shutdown(simulation: Simulation) -> None:
    pynvml.nvmlInit()
    assert simulation.references == 1
    pynvml.nvmlShutdown()
    with pytest.raises(pynvml.NVMLError_Uninitialized):
        pynvml.nvmlDeviceGetCount()


def test_the_counter_moves_on_its_ticks_only(simulation: Simulation, handle: object) -> None:
    simulation.gpu(tick=0.1, phase=0.03, idle=100, leakage=0)
    moved = []
    last = joules(handle)
    for step in range(1, 1001):
        simulation.clock.sleep(0.001)
        if joules(handle) != last:
            last = joules(handle)
            moved.append(step)
    assert moved == list(range(30, 1001, 100))
    assert last - 123456.789 == pytest.approx(100 * 0.93, abs=2e-3)


@pytest.mark.parametrize("gain", [0.95, 1.0, 1.05])
def test_the_counter_has_the_true_energy_up_to_its_gain(simulation: Simulation, handle: object, gain: float) -> None:
    simulation.gpu(gain=gain, tick=0.02)
    simulation.load(200)
    before, truth = joules(handle), simulation.energy()
    simulation.clock.sleep(10)
    assert joules(handle) - before == pytest.approx(gain * (simulation.energy() - truth), rel=1e-6)


def test_power_follows_the_load_with_a_ramp(simulation: Simulation) -> None:
    simulation.gpu(idle=50, ramp=0.5, leakage=0)
    simulation.load(100)
    simulation.clock.sleep(2)
    missing = 100 * 0.5 * (1 - math.exp(-2 / 0.5))  # integral of what an exponential approach lacks
    assert simulation.energy() == pytest.approx(2 * 150 - missing, rel=1e-3)


def test_a_hot_gpu_leaks(simulation: Simulation) -> None:
    simulation.gpu(idle=50, ambient=30, heating=0.1, leakage=0.5, inertia=5)
    simulation.load(250)
    simulation.clock.sleep(100)
    before = simulation.energy()
    simulation.clock.sleep(1)
    watts = 300 / (1 - 0.1 * 0.5)  # P = 300 + leakage * heating * P
    assert simulation.energy() - before == pytest.approx(watts, rel=1e-4)


def test_the_instant_sampler_sees_a_quarter_of_the_time(simulation: Simulation, handle: object) -> None:
    """Work with the sampler's period is seen as all or nothing."""
    simulation.gpu(idle=100, ramp=0, leakage=0)
    seen = []
    for _ in range(20):
        for load, seconds in ((200, 0.025), (0, 0.075)):
            simulation.load(load)
            simulation.clock.sleep(seconds)
        seen.append(field(handle, 186)[1])
    assert seen[1:] == pytest.approx([300] * 19, rel=0.05)
    assert simulation.energy() / 2 == pytest.approx(150, rel=0.01)


def test_a_counter_that_adds_up_samples_is_wrong_with_them(simulation: Simulation, handle: object) -> None:
    simulation.gpu(idle=100, ramp=0, leakage=0, sampled=1)
    before = joules(handle)
    for _ in range(50):
        for load, seconds in ((200, 0.025), (0, 0.075)):
            simulation.load(load)
            simulation.clock.sleep(seconds)
    assert (joules(handle) - before) / 5 == pytest.approx(300, rel=0.05)


def test_average_power_is_of_the_last_second(simulation: Simulation, handle: object) -> None:
    simulation.gpu(idle=100, ramp=0, leakage=0)
    simulation.clock.sleep(3)
    simulation.load(200)
    steps = []
    for _ in range(11):
        simulation.clock.sleep(0.1)
        assert field(handle, 185)[1] == pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3
        steps.append(field(handle, 185)[1])
    assert steps == pytest.approx([120, 140, 160, 180, 200, 220, 240, 260, 280, 300, 300], abs=1)


def test_a_module_draws_more_than_its_gpu(simulation: Simulation, handle: object) -> None:
    assert field(handle, 186, pynvml.NVML_POWER_SCOPE_MODULE)[0] == pynvml.NVML_ERROR_NOT_SUPPORTED
    simulation.gpu(idle=100, leakage=0, module=80)
    simulation.clock.sleep(1)
    assert field(handle, 186, pynvml.NVML_POWER_SCOPE_GPU)[1] == pytest.approx(100)
    assert field(handle, 186, pynvml.NVML_POWER_SCOPE_MODULE)[1] == pytest.approx(180)


def test_faults_by_call_count(simulation: Simulation, handle: object) -> None:
    simulation.fault("nvmlDeviceGetTotalEnergyConsumption", pynvml.NVML_ERROR_TIMEOUT, first=1, count=2)
    codes = []
    for _ in range(4):
        try:
            joules(handle)
            codes.append(0)
        except pynvml.NVMLError as error:
            codes.append(error.value)
    assert codes == [0, pynvml.NVML_ERROR_TIMEOUT, pynvml.NVML_ERROR_TIMEOUT, 0]


def test_faults_by_time_and_their_end(simulation: Simulation, handle: object) -> None:
    simulation.at(1.5, "fault * 0 15 0 1000000")
    simulation.at(2.5, "heal")
    simulation.clock.sleep(1)
    assert joules(handle) > 0
    simulation.clock.sleep(1)
    for call in (pynvml.nvmlDeviceGetTotalEnergyConsumption, pynvml.nvmlDeviceGetName, pynvml.nvmlDeviceGetPowerUsage):
        with pytest.raises(pynvml.NVMLError_GpuIsLost):
            call(handle)
    assert pynvml.nvmlDeviceGetCount() == 1
    simulation.clock.sleep(1)
    assert joules(handle) > 0


def test_a_fault_of_one_field_leaves_the_others(simulation: Simulation, handle: object) -> None:
    simulation.fault("field:186", pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
    assert field(handle, 186)[0] == pynvml.NVML_ERROR_FUNCTION_NOT_FOUND
    assert field(handle, 185)[0] == 0


def test_a_fault_of_one_gpu_leaves_the_others(simulation: Simulation) -> None:
    simulation.reset(gpus=2)
    simulation.fault("nvmlDeviceGetName", pynvml.NVML_ERROR_NO_PERMISSION, gpu=1)
    pynvml.nvmlInit()
    try:
        assert pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
        with pytest.raises(pynvml.NVMLError_NoPermission):
            pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(1))
    finally:
        pynvml.nvmlShutdown()


def test_the_counter_freezes_and_is_set_back(simulation: Simulation, handle: object) -> None:
    simulation.at(1, "gpu 0 frozen 1")
    simulation.at(2, "gpu 0 frozen 0")
    simulation.at(3.05, "gpu 0 counter 5000")
    simulation.clock.sleep(1.5)
    stood = joules(handle)
    simulation.clock.sleep(0.4)
    assert joules(handle) == stood
    simulation.clock.sleep(0.6)
    assert joules(handle) > stood
    simulation.clock.sleep(0.57)
    assert joules(handle) == 5
    simulation.clock.sleep(1)
    assert 5 < joules(handle) < 100


def test_background_calls_of_the_virtual_clock_come_in_time(simulation: Simulation) -> None:
    times: list[float] = []
    stop = simulation.clock.every(0.3, lambda: times.append(simulation.time))
    simulation.clock.sleep(1)
    stop()
    simulation.clock.sleep(1)
    assert times == pytest.approx([0.3, 0.6, 0.9])
    assert simulation.time == pytest.approx(2)
    assert not simulation.clock.busy
