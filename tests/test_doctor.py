"""`cet doctor`: what is found, and for all that is missing the reason and the mend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pynvml
import pytest

from cet import machine
from cet.cli import main


class FakeNvml:
    """Stands in for the functions of pynvml that a probe calls; a device is its name, or the error of its counter."""

    def __init__(self, *devices: str | Exception, init: Exception | None = None) -> None:
        self.devices = devices
        self.init = init
        self.is_open = False

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
        for name in ("Init", "Shutdown", "DeviceGetCount", "DeviceGetHandleByIndex", "DeviceGetName"):
            monkeypatch.setattr(pynvml, f"nvml{name}", getattr(self, name))
        monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", self.energy)
        return self

    def Init(self) -> None:  # noqa: N802
        if self.init is not None:
            raise self.init
        self.is_open = True

    def Shutdown(self) -> None:  # noqa: N802
        self.is_open = False

    def DeviceGetCount(self) -> int:  # noqa: N802
        return len(self.devices)

    def DeviceGetHandleByIndex(self, index: int) -> Any:  # noqa: N802
        return self.devices[index]

    def DeviceGetName(self, handle: Any) -> str:  # noqa: N802
        return str(handle) if isinstance(handle, str) else "NVIDIA Old"

    def energy(self, handle: Any) -> int:
        if isinstance(handle, Exception):
            raise handle
        return 123


def nvml_error(code: int) -> Exception:
    error: Exception = pynvml.NVMLError(code)
    return error


def rapl(root: Path, domain: str, name: str, energy: str = "42\n") -> Path:
    folder = root / domain
    folder.mkdir()
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(energy)
    return folder


@pytest.fixture(autouse=True)
def _no_counters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without counters, whatever this one has."""
    FakeNvml(init=nvml_error(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)).install(monkeypatch)
    monkeypatch.setattr(machine, "POWERCAP", tmp_path / "powercap")


def doctor(*args: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["doctor", *args])
    return int(stop.value.code or 0)


def by_name(findings: list[machine.Finding]) -> dict[str, machine.Finding]:
    return {finding.name: finding for finding in findings}


def test_json_reports_every_section_and_the_core_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("--format", "json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema_version"] == 1
    assert document["works"] is True
    assert [row["name"] for row in document["backends"]] == ["reference", "cpp", "triton", "cuda"]
    assert [row["name"] for row in document["counters"]] == ["nvml", "rapl"]
    assert [row["name"] for row in document["extras"]] == ["train", "demo", "onnx", "ray", "dev"]
    for section in ("backends", "counters", "extras"):
        for row in document[section]:
            assert set(row) == {"name", "available", "detail", "mend"}
            assert row["detail"]


def test_table_says_why_and_what_mends_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor() == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "reference yes PyTorch" in out
    assert "libnvidia-ml.so.1 was not found" in out
    assert "no intel-rapl domain" in out
    assert "\x1b" not in out


def test_core_that_fails_is_reported_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr("cet.early_exit.EarlyExit.predict", broken)
    assert doctor("--format", "json") == 1
    document = json.loads(capsys.readouterr().out)
    assert document["works"] is False
    assert "RuntimeError: no such operator" in document["backends"][0]["detail"]


@pytest.mark.parametrize(
    ("code", "mend"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "install the NVIDIA driver"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "load the NVIDIA kernel module"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "restart the machine"),
        (pynvml.NVML_ERROR_NO_PERMISSION, "/dev/nvidiactl"),
    ],
)
def test_nvml_that_does_not_start_is_explained(monkeypatch: pytest.MonkeyPatch, code: int, mend: str) -> None:
    FakeNvml(init=nvml_error(code)).install(monkeypatch)
    finding = by_name(machine.counters())["nvml"]
    assert not finding.available
    assert finding.detail == str(nvml_error(code))
    assert mend in (finding.mend or "")


def test_each_gpu_is_asked_for_its_energy_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = nvml_error(pynvml.NVML_ERROR_GPU_IS_LOST)
    fake = FakeNvml("NVIDIA New", nvml_error(pynvml.NVML_ERROR_NOT_SUPPORTED), lost).install(monkeypatch)
    found = by_name(machine.counters())
    assert found["nvml:0"].available
    assert "NVIDIA New: total-energy counter" in found["nvml:0"].detail
    assert not found["nvml:1"].available
    assert "NVIDIA Old has no total-energy counter" in found["nvml:1"].detail
    assert not found["nvml:2"].available
    assert found["nvml:2"].detail == str(lost)
    assert not fake.is_open


def test_driver_without_a_gpu_is_not_a_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeNvml().install(monkeypatch)
    assert not by_name(machine.counters())["nvml"].available


def test_rapl_domains_are_read_one_by_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "POWERCAP", tmp_path)
    rapl(tmp_path, "intel-rapl:0", "package-0")
    rapl(tmp_path, "intel-rapl:0:0", "core", energy="")
    found = by_name(machine.counters())
    assert found["rapl:0"].available
    assert found["rapl:0"].detail.startswith("package-0")
    assert not found["rapl:0:0"].available
    assert "cannot be read" in found["rapl:0:0"].detail


def test_rapl_for_root_only_names_the_mend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    counter = rapl(tmp_path, "intel-rapl:0", "package-0") / "energy_uj"
    monkeypatch.setattr(machine, "POWERCAP", tmp_path)
    read_text = Path.read_text

    def guarded(path: Path, *args: Any, **kwargs: Any) -> str:
        if path == counter:
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", guarded)
    finding = by_name(machine.counters())["rapl:0"]
    assert not finding.available
    assert finding.mend == f"sudo chmod a+r {counter}"


def test_missing_extra_names_packages_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "installed_version", lambda package: None if package == "lightning" else "1.0")
    found = by_name(machine.extras())
    assert found["train"].detail == "not installed: lightning"
    assert found["demo"].mend == "pip install 'cet[demo]'"
    assert found["ray"] == machine.Finding("ray", True, "ray 1.0")
