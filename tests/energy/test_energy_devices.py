"""Which GPUs are measured: torch devices and CUDA_VISIBLE_DEVICES, told by UUID."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from types import SimpleNamespace

import pytest
import torch

from cet.energy import DeviceLostError, DeviceSelectionError, EnergyMeter, MigError
from cet.energy import nvml as energy_nvml
from cet.energy.devices import gpu_of, visible_gpus
from nvml.simulation import Simulation

UUIDS = ("GPU-aaaa0000-1", "GPU-aaaa1111-2", "GPU-bbbb0000-3", "GPU-cccc0000-4")


@pytest.fixture
def gpus(simulation: Simulation) -> Iterator[list[energy_nvml.Gpu]]:
    simulation.reset(gpus=len(UUIDS))
    for index, uuid in enumerate(UUIDS):
        simulation.gpu(index, uuid=uuid)
    with energy_nvml.opened(simulation.clock) as (found, _):
        yield found


def visible(gpus: Sequence[energy_nvml.Gpu], value: str | None, order: str | None = None) -> list[int]:
    environ = {"CUDA_VISIBLE_DEVICES": value, "CUDA_DEVICE_ORDER": order}
    seen, _ = visible_gpus(gpus, {key: text for key, text in environ.items() if text is not None})
    return [gpu.index for gpu in seen]


class TorchCuda:
    """Stands in for ``torch.cuda`` of a build with CUDA, whose order of GPUs is not NVML's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, uuids: Sequence[str], *, initialized: bool = True) -> None:
        self.synchronized: list[object] = []
        self.reserved = [0] * len(uuids)
        replaced = {
            "is_available": lambda: True,
            "is_initialized": lambda: initialized,
            "device_count": lambda: len(uuids),
            "current_device": lambda: 1,
            "get_device_properties": lambda index: SimpleNamespace(uuid=uuids[index]),
            "memory_reserved": lambda index: self.reserved[index],
            "synchronize": self.synchronized.append,
        }
        for name, function in replaced.items():
            monkeypatch.setattr(torch.cuda, name, function)


@pytest.mark.parametrize(
    ("value", "indices"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("  ", []),
        ("-1", []),
        ("0", [0]),
        ("3,1", [3, 1]),
        (" 2 , 0 ", [2, 0]),
        ("1,-1,0", [1]),
        ("GPU-bbbb0000-3", [2]),
        ("GPU-c,GPU-aaaa1", [3, 1]),
        ("1,-1,1", [1]),
        ("+1,2 of 4", [1, 2]),
    ],
)
def test_visible_gpus(gpus: list[energy_nvml.Gpu], value: str | None, indices: list[int]) -> None:
    assert visible(gpus, value) == indices


@pytest.mark.parametrize(
    ("value", "indices", "why"),
    [
        ("NoDevFiles", [], "ends for CUDA before 'NoDevFiles', which names no GPU"),  # SLURM, where none is granted
        ("0,7", [0], "ends for CUDA before '7', which names no GPU"),
        ("4,0", [], "before '4'"),
        ("0,one,1", [0], "before 'one'"),
        ("0,,1", [0], "before ''"),
        ("cuda:0", [], "before 'cuda:0'"),
        ("GPU-dddd,GPU-c", [], "before 'GPU-dddd', which names no GPU"),
        ("GPU-c,GPU-aaaa", [3], "before 'GPU-aaaa', which names more than one GPU"),
        ("GPU-c,0", [3], "before '0'"),
        ("0,GPU-c", [0], "before 'GPU-c'"),
        ("0,1,0", [], "names gpu:0 twice, and CUDA then shows no GPU"),
        ("0,00", [], "names gpu:0 twice"),
        ("GPU-c,GPU-cccc0000-4", [], "names gpu:3 twice"),
    ],
)
def test_the_list_is_read_as_cuda_reads_it(
    gpus: list[energy_nvml.Gpu], value: str, indices: list[int], why: str
) -> None:
    seen, ignored = visible_gpus(gpus, {"CUDA_VISIBLE_DEVICES": value})
    assert [gpu.index for gpu in seen] == indices
    assert ignored is not None
    assert ignored.startswith(f"CUDA_VISIBLE_DEVICES={value} ")
    assert why in ignored


@pytest.mark.parametrize(
    "value", ["0,7", "NoDevFiles", "1,1", "GPU-aaaa", "0,one", "3,-1,0", "", "2,,1", "+1,2 of 4", "0,GPU-c"]
)
def test_and_as_torch_reads_it(gpus: list[energy_nvml.Gpu], monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    parsed: list[int | str] = torch.cuda._parse_visible_devices()
    if parsed and isinstance(parsed[0], str):
        parsed = torch.cuda._transform_uuid_to_ordinals(parsed, list(UUIDS))
    assert visible(gpus, value) == list(takewhile(lambda index: index < len(UUIDS), parsed))


@pytest.mark.parametrize("value", ["MIG-11111111-2222-3333-4444-555555555555", "0,MIG-GPU-aaaa0000-1/1/0"])
def test_mig_instances_are_refused(gpus: list[energy_nvml.Gpu], value: str) -> None:
    with pytest.raises(MigError, match="joules of the whole GPU only"):
        visible(gpus, value)


def test_indices_of_gpus_of_different_kinds_are_ambiguous(simulation: Simulation) -> None:
    simulation.reset(gpus=2)
    simulation.gpu(1, name="NVIDIA Other GPU")
    with energy_nvml.opened(simulation.clock) as (gpus, _):
        with pytest.raises(DeviceSelectionError, match="CUDA_DEVICE_ORDER=PCI_BUS_ID"):
            visible(gpus, "0")
        assert visible(gpus, "0", order="PCI_BUS_ID") == [0]
        assert visible(gpus, gpus[1].uuid) == [1]
        assert visible(gpus, None) == [0, 1]


def test_unless_torch_tells_them_apart(simulation: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    simulation.reset(gpus=2)
    simulation.gpu(1, name="NVIDIA Other GPU")
    with energy_nvml.opened(simulation.clock) as (gpus, _):
        TorchCuda(monkeypatch, [gpus[1].uuid.removeprefix("GPU-")])
        assert visible(gpus, "0") == [1]


def test_torch_devices_are_found_by_uuid(gpus: list[energy_nvml.Gpu], monkeypatch: pytest.MonkeyPatch) -> None:
    TorchCuda(monkeypatch, ["cccc0000-4", "aaaa0000-1"])
    assert gpu_of(torch.device("cuda:0"), gpus, {}).index == 3
    assert gpu_of(torch.device("cuda:1"), gpus, {}).index == 0
    assert gpu_of(torch.device("cuda"), gpus, {}).index == 0  # the current device
    with pytest.raises(DeviceSelectionError, match="torch sees 2 GPU"):
        gpu_of(torch.device("cuda:2"), gpus, {})


def test_torch_device_that_nvml_does_not_show(
    simulation: Simulation, gpus: list[energy_nvml.Gpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    TorchCuda(monkeypatch, ["99999999-9"])
    with pytest.raises(DeviceSelectionError, match="GPU-99999999-9, which NVML does not show"):
        gpu_of(torch.device("cuda:0"), gpus, {})
    simulation.gpu(2, mig=1)
    with pytest.raises(MigError, match="'cuda:0'"):
        gpu_of(torch.device("cuda:0"), gpus, {})


def test_without_cuda_in_torch_by_what_is_visible(gpus: list[energy_nvml.Gpu]) -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "2,0"}
    assert [gpu_of(torch.device(name), gpus, environ).index for name in ("cuda", "cuda:0", "cuda:1")] == [2, 2, 0]
    with pytest.raises(DeviceSelectionError, match="'cuda:2' does not exist; 2 GPU"):
        gpu_of(torch.device("cuda:2"), gpus, environ)


@pytest.mark.parametrize(("value", "domains"), [("GPU-bbbb,GPU-c", ["gpu:2", "gpu:3"]), ("3", ["gpu:3"])])
def test_a_meter_measures_what_is_visible(
    simulation: Simulation,
    gpus: list[energy_nvml.Gpu],
    monkeypatch: pytest.MonkeyPatch,
    value: str,
    domains: list[str],
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    with EnergyMeter(rapl=False, clock=simulation.clock).opened() as meter:
        assert [domain.name for domain in meter.domains] == domains
        assert meter.unavailable == ()


def test_what_cuda_ignores_is_told(
    simulation: Simulation, gpus: list[energy_nvml.Gpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,7")
    with EnergyMeter(rapl=False, clock=simulation.clock).opened() as meter:
        assert [domain.name for domain in meter.domains] == ["gpu:2"]
        (row,) = meter.unavailable
    assert (row.domain, row.reason) == ("gpu", "CUDA_VISIBLE_DEVICES=2,7 ends for CUDA before '7', which names no GPU")


def test_hidden_gpus_leave_the_cpu_and_the_reason(simulation: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with EnergyMeter(rapl=False, clock=simulation.clock).opened() as meter:
        assert meter.domains == ()
        (row,) = meter.unavailable
    assert (row.domain, row.reason) == ("gpu", "CUDA_VISIBLE_DEVICES= hides all GPUs")
    assert row.fix == "unset CUDA_VISIBLE_DEVICES"


def test_a_driver_without_gpus_is_a_reason(simulation: Simulation) -> None:
    simulation.reset(gpus=0)
    with EnergyMeter(rapl=False, clock=simulation.clock).opened() as meter:
        (row,) = meter.unavailable
    assert (row.domain, row.reason) == ("gpu", "the NVIDIA driver is loaded but shows no GPU")


def test_devices_choose_the_gpus(simulation: Simulation, gpus: list[energy_nvml.Gpu]) -> None:
    devices = ["cuda:2", torch.device("cuda", 1), "cuda:2", "cpu"]
    with EnergyMeter(devices, rapl=False, clock=simulation.clock).opened() as meter:
        assert [domain.name for domain in meter.domains] == ["gpu:2", "gpu:1"]


def test_without_a_cuda_device_nvml_is_left_alone(simulation: Simulation) -> None:
    with EnergyMeter(["cpu"], rapl=False, clock=simulation.clock).opened() as meter:
        assert simulation.references == 0
        assert meter.domains == ()
        meter.start()
        assert meter.stop().reasons == {"cpu": "it is left out, and no GPU is asked for"}


def test_bad_devices_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="'mps' has no energy counter"):
        EnergyMeter(["mps"])
    with pytest.raises(ValueError, match=r"devices is \['bananas'\], which torch does not know"):
        EnergyMeter(["bananas"])
    with pytest.raises(TypeError, match=r"give a sequence of devices, such as \['cuda:0'\]"):
        EnergyMeter("cuda:0")


@pytest.mark.parametrize("how", ["device", "environment"])
def test_a_gpu_in_mig_mode_that_was_asked_for_is_refused(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    simulation.gpu(mig=1)
    if how == "environment":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    meter = EnergyMeter(["cuda"] if how == "device" else None, clock=simulation.clock)
    with pytest.raises(MigError, match=r"gpu:0 is in MIG mode.*measure on a GPU without MIG"):
        meter.__enter__()
    assert simulation.references == 0


def test_and_one_that_is_merely_there_is_left_out(simulation: Simulation) -> None:
    simulation.reset(gpus=2)
    simulation.gpu(0, mig=1)
    with EnergyMeter(rapl=False, clock=simulation.clock).opened() as meter:
        assert [domain.name for domain in meter.domains] == ["gpu:1"]
        assert "MIG mode" in meter.unavailable[0].reason


@pytest.mark.parametrize("asked", [False, True])
def test_a_gpu_that_is_lost_from_the_start(simulation: Simulation, asked: bool) -> None:
    simulation.fault("nvmlDeviceGetMigMode", 15)
    meter = EnergyMeter(["cuda"] if asked else None, rapl=False, clock=simulation.clock)
    if asked:
        with pytest.raises(DeviceLostError, match="GPU is lost"):
            meter.__enter__()
    else:
        with meter.opened():
            assert "GPU is lost" in meter.unavailable[0].reason
            assert meter.unavailable[0].lost


@pytest.mark.parametrize("how", ["device", "index", "uuid"])
def test_a_gpu_that_was_asked_for_and_does_not_tell_its_name_any_more(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    simulation.fault("nvmlDeviceGetHandleByIndex_v2", 15)
    if how != "device":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0" if how == "index" else "GPU-1234")
    meter = EnergyMeter(["cuda"] if how == "device" else None, rapl=False, clock=simulation.clock)
    with pytest.raises(DeviceLostError, match="GPU is lost"):
        meter.__enter__()


def test_devices_are_synchronised_at_the_edges_only(
    simulation: Simulation, gpus: list[energy_nvml.Gpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = TorchCuda(monkeypatch, [uuid.removeprefix("GPU-") for uuid in UUIDS])
    cuda.reserved[2] = 1024
    with EnergyMeter(rapl=False, integral=True, clock=simulation.clock):
        assert cuda.synchronized == [2]  # the one that torch holds memory of
        simulation.clock.sleep(2)
        assert cuda.synchronized == [2]
    assert cuda.synchronized == [2, 2]
    cuda.synchronized.clear()
    with EnergyMeter(["cuda:3", "cuda:0", "cpu"], rapl=False, clock=simulation.clock):
        pass
    assert cuda.synchronized == [torch.device("cuda:3"), torch.device("cuda:0")] * 2


def test_cuda_is_not_begun_for_it(simulation: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = TorchCuda(monkeypatch, ["00000000-0000-4000-8000-000000000000"], initialized=False)
    with EnergyMeter(rapl=False, clock=simulation.clock):
        pass
    assert cuda.synchronized == []
