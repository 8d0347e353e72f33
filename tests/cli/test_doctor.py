"""`cet doctor`: what is found, and for all that is missing the reason and the fix."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from cet.cli import main
from cet.cli.doctor import findings as doctor_findings
from cet.cli.doctor.finding import Finding
from commands import CET
from nvml.simulation import Simulation
from thinned import slow


@pytest.fixture(autouse=True)
def _one_gpu(simulation: Simulation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with one simulated GPU and no RAPL, whatever this one has."""
    simulation.reset(real_time=True)
    simulation.gpu(0, tick=0.004)
    monkeypatch.setenv("CET_POWERCAP_ROOT", str(tmp_path / "no-powercap"))


def doctor(*args: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["doctor", *args])
    return int(stop.value.code or 0)


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_json_reports_every_section_and_the_core_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("--format", "json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema_version"] == 2
    assert document["works"] is True
    assert [row["name"] for row in document["backends"]] == ["reference", "cpp", "triton"]
    assert [row["name"] for row in document["runners"]] == ["eager", "graphs", "device"]
    assert [row["name"] for row in document["extras"]] == [
        *("train", "demo", "onnx", "executorch", "litert", "tflite-micro", "ray", "docs", "dev")
    ]
    for section in ("backends", "runners", "extras"):
        for row in document[section]:
            assert set(row) == {"name", "available", "detail", "fix"}
            assert row["detail"]
    energy = document["energy"]
    assert [row["domain"]["name"] for row in energy["measurable"]] == ["gpu:0"]
    assert [row["domain"] for row in energy["unavailable"]] == ["rapl"]
    for row in energy["unavailable"]:
        assert set(row) == {"domain", "reason", "fix", "lost"}
        assert row["reason"]


def test_table_says_why_and_how_to_fix_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor() == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "reference yes PyTorch" in out
    assert "Energy that can be measured gpu:0 NVIDIA Simulated GPU" in out
    assert "Energy that cannot be measured rapl there is no RAPL zone" in out
    assert "fix: run on bare metal" in out
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


@pytest.mark.parametrize("section", ["backends", "runners", "extras"])
def test_a_section_that_fails_says_so_and_the_others_answer(
    section: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise KeyError("spam")

    monkeypatch.setattr(doctor_findings, section, broken)
    code = doctor("--format", "json")
    document = json.loads(capsys.readouterr().out)
    assert code == (1 if section == "backends" else 0)
    assert document[section][0]["detail"] == "unexpected KeyError: 'spam'; --debug shows where"
    assert all(document[other] for other in ("backends", "runners", "extras", "energy"))


@pytest.mark.parametrize(
    "environment",
    [
        {"TORCH_LOGS": "garbage"},  # importing torch fails
        slow({"CET_CPU_CAPABILITY": "garbage", "TRITON_INTERPRET": "garbage", "OMP_NUM_THREADS": "garbage"}),
        slow({"CUDA_VISIBLE_DEVICES": "MIG-8f2a", "CUDA_DEVICE_ORDER": "garbage", "CET_POWERCAP_ROOT": "\udcff"}),
        slow({"LANG": "garbage", "TERM": "garbage", "COLUMNS": "garbage", "HOME": "/missing", "TMPDIR": "/missing"}),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("form", [slow("table"), "json"])
def test_it_answers_whatever_the_environment_holds(nvml_library: Path, environment: dict[str, str], form: str) -> None:
    env = {**os.environ, "LD_LIBRARY_PATH": str(nvml_library.parent), **environment}
    done = subprocess.run([CET, "doctor", "--format", form], env=env, capture_output=True, text=True)
    assert done.returncode == int("TORCH_LOGS" in environment or "CET_CPU_CAPABILITY" in environment), done.stderr
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr
    if form == "json":
        document = json.loads(done.stdout)
        assert document["works"] is (done.returncode == 0)
        assert document["energy"]["unavailable"]
    else:
        assert "Energy that cannot be measured" in done.stdout


def test_runners_on_a_gpu_and_why_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    found = by_name(doctor_findings.runners())
    if not torch.cuda.is_available():
        assert not found["graphs"].available
        assert found["graphs"].fix == doctor_findings.GPU_FIX
        assert "its CUDA extension" in found["device"].detail
    monkeypatch.setattr(doctor_findings, "_no_cuda_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _index: "NVIDIA Simulated GPU")
    for reason in (None, "the driver is old; install a newer one"):
        monkeypatch.setattr(doctor_findings, "why_no_switch", lambda reason=reason: reason)
        eager, graphs, device = doctor_findings.runners()
        assert eager.available
        assert graphs == Finding("graphs", True, "NVIDIA Simulated GPU; where asked for")
        if reason is None:
            assert device == Finding("device", True, graphs.detail)
        else:
            assert device == Finding("device", False, "the driver is old", "install a newer one")


def test_missing_extra_names_packages_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_findings, "installed_version", lambda package: None if package == "lightning" else "1.0")
    found = by_name(doctor_findings.extras())
    assert found["train"].detail == "not installed: lightning"
    assert found["demo"].fix == "pip install 'cet[demo]'"
    assert found["ray"] == Finding("ray", True, "ray 1.0")
