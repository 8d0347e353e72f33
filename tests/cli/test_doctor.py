"""`cet doctor`: what is found, and for all that is missing the reason and the mend."""

from __future__ import annotations

import json
from pathlib import Path

import pynvml
import pytest
import torch

from cet.cli import main
from cet.cli.doctor import findings as doctor_findings
from nvml.simulation import Simulation


@pytest.fixture(autouse=True)
def _one_gpu(simulation: Simulation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with one simulated GPU and no RAPL, whatever this one has."""
    monkeypatch.setenv("CET_POWERCAP_ROOT", str(tmp_path / "no-powercap"))


def doctor(*args: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["doctor", *args])
    return int(stop.value.code or 0)


def by_name(findings: list[doctor_findings.Finding]) -> dict[str, doctor_findings.Finding]:
    return {finding.name: finding for finding in findings}


def test_json_reports_every_section_and_the_core_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("--format", "json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema_version"] == 1
    assert document["works"] is True
    assert [row["name"] for row in document["backends"]] == ["reference", "cpp", "triton"]
    assert [row["name"] for row in document["runners"]] == ["eager", "graphs", "device"]
    assert [row["name"] for row in document["counters"]] == ["gpu:0", "rapl"]
    assert [row["name"] for row in document["extras"]] == ["train", "demo", "onnx", "ray", "dev"]
    for section in ("backends", "runners", "counters", "extras"):
        for row in document[section]:
            assert set(row) == {"name", "available", "detail", "mend"}
            assert row["detail"]


def test_table_says_why_and_what_mends_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor() == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "reference yes PyTorch" in out
    assert "gpu:0 yes NVIDIA Simulated GPU" in out
    assert "rapl no there is no RAPL zone" in out
    assert "mend: run on bare metal" in out
    assert "\x1b" not in out


def test_core_that_fails_is_reported_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr("cet.model.early_exit.EarlyExit.predict", broken)
    assert doctor("--format", "json") == 1
    document = json.loads(capsys.readouterr().out)
    assert document["works"] is False
    assert "RuntimeError: no such operator" in document["backends"][0]["detail"]


def test_each_counter_is_a_finding(simulation: Simulation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulation.reset(gpus=3)
    simulation.fault("nvmlDeviceGetTotalEnergyConsumption", pynvml.NVML_ERROR_NOT_SUPPORTED, gpu=1)
    simulation.fault("*", pynvml.NVML_ERROR_GPU_IS_LOST, gpu=2)
    found = by_name(doctor_findings.counters())
    assert found["gpu:0"].available
    assert found["gpu:0"].detail.startswith("NVIDIA Simulated GPU (GPU-00000000-")
    assert found["gpu:0"].detail.endswith("energy counter, scope: board")
    assert found["gpu:1"].available
    assert "power only (gpu:1: nvmlDeviceGetTotalEnergyConsumption failed" in found["gpu:1"].detail
    assert not found["gpu:2"].available
    assert "NVML error 15" in found["gpu:2"].detail
    assert not found["rapl"].available


def test_nvml_that_does_not_start_is_explained(simulation: Simulation) -> None:
    simulation.fault("nvmlInitWithFlags", pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    finding = by_name(doctor_findings.counters())["gpu"]
    assert not finding.available
    assert "NVML error 9" in finding.detail
    assert "load the NVIDIA kernel module" in (finding.mend or "")


def test_a_choice_of_gpus_that_cannot_be_honoured_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-8f2a")
    (finding,) = doctor_findings.counters()
    assert (finding.name, finding.available) == ("gpu", False)
    assert "MIG-8f2a" in finding.detail


def test_runners_on_a_gpu_and_why_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    found = by_name(doctor_findings.runners())
    if not torch.cuda.is_available():
        assert not found["graphs"].available
        assert found["graphs"].mend == doctor_findings.GPU_MEND
        assert "its CUDA extension" in found["device"].detail
    monkeypatch.setattr(doctor_findings, "_no_cuda_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _index: "NVIDIA Simulated GPU")
    for reason in (None, "the driver is old; install a newer one"):
        monkeypatch.setattr(doctor_findings, "why_no_switch", lambda reason=reason: reason)
        eager, graphs, device = doctor_findings.runners()
        assert eager.available
        assert graphs == doctor_findings.Finding("graphs", True, "NVIDIA Simulated GPU; where asked for")
        if reason is None:
            assert device == doctor_findings.Finding("device", True, graphs.detail)
        else:
            assert device == doctor_findings.Finding("device", False, "the driver is old", "install a newer one")


def test_missing_extra_names_packages_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_findings, "installed_version", lambda package: None if package == "lightning" else "1.0")
    found = by_name(doctor_findings.extras())
    assert found["train"].detail == "not installed: lightning"
    assert found["demo"].mend == "pip install 'cet[demo]'"
    assert found["ray"] == doctor_findings.Finding("ray", True, "ray 1.0")
