"""`make gpu` and `make gpu-report` without a GPU: that no step is lost, and that the tables say what was measured."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import tarfile
from pathlib import Path
from typing import Any

import pynvml
import pytest
import torch
from click.testing import CliRunner

from benchmarks import compact, end_to_end, gpu, gpu_report, gpu_session
from benchmarks.gpu_session import Step
from benchmarks.harness import NO_TIME, provenance


@pytest.fixture
def any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_session, "check_machine", lambda: None)


def test_the_steps_fit_their_time_and_name_what_exists(tmp_path: Path) -> None:
    steps = gpu_session.steps(tmp_path)
    assert sum(step.limit for step in steps) < 9 * 60
    assert len({step.name for step in steps}) == len(steps)
    for argument in (argument for step in steps for argument in step.command):
        assert not argument.endswith(".py") or (gpu_session.ROOT / argument).is_file()
        assert not argument.startswith("benchmarks.") or importlib.util.find_spec(argument)


def is_running(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().split()[2] != "Z"


@pytest.mark.usefixtures("any_machine")
def test_a_step_that_fails_keeps_no_other_from_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [
        Step("fails", ["-c", "print('why'); raise SystemExit(3)"], 20),
        Step("hangs", ["-c", "import os; print(os.fork(), flush=True); import time; time.sleep(60)"], 1),
        Step("lacks", ["-c", ""], 20, tool=("no-such-tool",)),
        Step("works", ["-c", "print('fine')"], 20),
    ]
    monkeypatch.setattr(gpu_session, "steps", lambda output: steps)
    result = CliRunner().invoke(gpu_session.main, [str(tmp_path / "out")])
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert [line.split()[:2] for line in lines[:4]] == [
        ["fails", "FAILED"],
        ["hangs", "FAILED"],
        ["lacks", "FAILED"],
        ["works", "passed"],
    ]
    assert "exit status 3; why" in lines[0]
    assert re.search(r"stopped after 1 s; \d+", lines[1])
    children = {int(line) for line in (tmp_path / "out/hangs.log").read_text().split()} - {0}
    assert not [child for child in children if is_running(child)]
    assert "no-such-tool is not installed" in lines[2]
    outcomes = json.loads((tmp_path / "out/steps.json").read_text())
    assert [outcome["passed"] for outcome in outcomes] == [False, False, False, True]
    with tarfile.open(tmp_path / "out.tar.gz") as packed:
        names = packed.getnames()
    assert {f"out/{name}" for name in ("steps.json", "fails.log", "hangs.log", "works.log", "results")} <= {*names}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.tar.gz"]


@pytest.mark.usefixtures("any_machine")
def test_a_build_that_fails_is_tried_again_without_what_may_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = "import os; print(os.environ['PYTHONPATH']); raise SystemExit(int(os.environ['CET_BUILD_CUDA']))"
    build = Step("build", ["-c", program], 20, fallback={"CET_BUILD_CUDA": "0"})
    monkeypatch.setattr(gpu_session, "steps", lambda output: [build, Step("next", ["-c", "print('fine')"], 20)])
    monkeypatch.setenv("PYTHONPATH", "wheels")
    result = CliRunner().invoke(gpu_session.main, [str(tmp_path / "out")])
    assert [line.split()[:2] for line in result.output.splitlines()[:3]] == [
        ["build", "FAILED"],
        ["build_again", "passed"],
        ["next", "passed"],
    ]
    assert (tmp_path / "out/build.log").read_text().split() == [f"{gpu_session.BUILD}{os.pathsep}wheels"]


@pytest.mark.usefixtures("any_machine")
def test_what_others_leave_of_their_time_goes_to_the_step_that_stretches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [
        Step("quick", ["-c", ""], 100),
        Step("long", ["-c", "print('{within}')"], 30, stretches=True),
        Step("last", ["-c", "print('{within}')"], 40),
    ]
    monkeypatch.setattr(gpu_session, "steps", lambda output: steps)
    result = CliRunner().invoke(gpu_session.main, [str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert 80 < int((tmp_path / "long.log").read_text()) <= 130 * 0.8
    assert int((tmp_path / "last.log").read_text()) == 40 * 0.8


@pytest.mark.parametrize(
    ("benchmark", "options", "measured"), [(end_to_end, ["--models", "sensor_cnn"], 0), (compact, [], 1)]
)
def test_points_for_which_no_time_is_left_say_so(
    benchmark: Any, options: list[str], measured: int, tmp_path: Path
) -> None:
    result = CliRunner().invoke(benchmark.main, ["--quick", "--within", "0", "--output", str(tmp_path), *options])
    assert result.exit_code == 0, result.output
    (table,) = tmp_path.glob("*.csv")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    notes = [row["note"] for row in rows if not row["median"]]
    assert set(notes) == {NO_TIME}
    assert len({tuple(row.values())[:3] for row in rows if row["median"]}) == measured


def test_a_copy_without_history_can_be_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CET_COMMIT", "abc")
    assert provenance(torch.device("cpu"), "benchmark")["commit"] == "abc"


def test_what_nvml_does_not_tell_is_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(gpu, "_handle", lambda device: None)
    for name, told in {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.1",
        "nvmlDeviceGetEnforcedPowerLimit": refuse,
        "nvmlDeviceGetClockInfo": lambda _, clock: 1000 + clock,
        "nvmlDeviceGetTemperature": refuse,
    }.items():
        monkeypatch.setattr(pynvml, name, told)
    state = gpu.state(torch.device("cuda", 0))
    assert (state["driver"], state["power_limit_w"], state["temperature_c"]) == ("580.1", None, None)
    assert state["sm_clock_mhz"] == 1000 + pynvml.NVML_CLOCK_SM


def test_a_machine_without_a_gpu_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(gpu_session.main, [str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "sees no CUDA device" in result.output
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else True)
    assert "lacks triton; give PYTHON" in CliRunner().invoke(gpu_session.main, [str(tmp_path / "out")]).output
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(gpu_session.metadata, "version", lambda name: "76.1.0")
    assert "setuptools 76.1.0" in CliRunner().invoke(gpu_session.main, [str(tmp_path / "out")]).output


@pytest.mark.usefixtures("any_machine")
def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(gpu_session.main, [str(tmp_path / "file/out")])
    assert result.exit_code == 1
    assert "cannot be written (Not a directory); give another OUT" in result.output


def test_a_provider_that_is_not_there_cannot_be_skipped(tmp_path: Path) -> None:
    result = CliRunner().invoke(compact.main, ["--quick", "--skip", "nosuch", "--output", str(tmp_path)])
    assert result.exit_code == 2
    assert "nosuch is none of cet, index_select" in result.output


def test_joules_of_a_cpu_are_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(end_to_end.main, ["--joules", "1", "--output", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "give --device cuda" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no results; give the folder"),
        ({"end_to_end.json": "{"}, "is no JSON"),
        ({"end_to_end.json": '{"device": "EPYC", "ceilings": {}}'}, "was measured on EPYC, no GPU"),
    ],
)
def test_what_is_no_result_of_a_gpu_is_not_reported(tmp_path: Path, files: dict[str, str], message: str) -> None:
    document, results = tmp_path / "gpu.md", tmp_path / "results"
    document.write_text(DOCUMENT)
    results.mkdir()
    for name, text in files.items():
        (results / name).write_text(text)
    result = CliRunner().invoke(gpu_report.main, ["--results", str(results), "--document", str(document)])
    assert result.exit_code == 1
    assert message in result.output
    assert document.read_text() == DOCUMENT


DOCUMENT = "# GPU\n" + "".join(f"<!-- {name} -->\nold\n<!-- end -->\n" for name in ("origin", "measures", "times"))


def report(tmp_path: Path) -> str:
    document = tmp_path / "gpu.md"
    document.write_text(DOCUMENT)
    results = tmp_path / "results"
    options = ["--results", str(results)] if results.exists() else []
    result = CliRunner().invoke(gpu_report.main, ["--document", str(document), *options])
    assert result.exit_code == 0, result.output
    return document.read_text()


def write(folder: Path, name: str, rows: list[dict[str, Any]], description: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / f"{name}.json").write_text(json.dumps(description))


def test_without_results_everything_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "ROOT", tmp_path)
    text = report(tmp_path)
    assert "old" not in text
    assert text.count("not measured") == len(gpu_report.MEASURES) + 2
    assert not [line for line in text.splitlines() if line.startswith("| End to end") and "not measured" not in line]


def test_the_committed_page_has_its_places_and_is_what_the_results_say(tmp_path: Path) -> None:
    committed = (gpu_report.ROOT / "docs/gpu.md").read_text()
    copy = tmp_path / "gpu.md"
    copy.write_text(committed)
    result = CliRunner().invoke(gpu_report.main, ["--document", str(copy)])
    assert result.exit_code == 0, result.output
    assert copy.read_text() == committed


def test_results_fill_the_tables(tmp_path: Path) -> None:
    results = tmp_path / "results"
    loss = {"dtype": "bfloat16", "target": "soft"}
    write(
        results,
        "consistent_exit_loss",
        [
            # 4 exits, 256 rows, 1000 classes, logits of two inputs and their gradients, 2 bytes: 8,192,000 bytes
            {**loss, "classes": 1000, "quantity": "cet", "median": 8.192e-6},
            {**loss, "classes": 7, "quantity": "eager/cet", "median": 6.5},
            {**loss, "classes": 1000, "quantity": "eager/cet", "median": 2.5},
        ],
        {"ceilings": {"copy_bytes_per_s": 2e12}},
    )
    point = {"net": "vit_base", "batch": 64, "scenario": "closed"}
    write(
        results,
        "end_to_end",
        [
            {**point, "quantity": "predict_device", "unit": "s", "median": 0.00123},
            {**point, "quantity": "predict_device", "unit": "J/sample", "median": 0.5},
            {**point, "quantity": "ideal", "unit": "s", "median": ""},
        ],
        {
            "device": "NVIDIA Some GPU",
            "torch": "2.13",
            "commit": "abc",
            "date": "today",
            "gpu": {"driver": "580"},
            "ceilings": {"copy_bytes_per_s": 2e12},
            "measures": [{"measure": "predict_device/ideal <= 1.1", "worst": 1.07}],
        },
    )
    text = report(tmp_path)
    assert "| Loss, of the copy's bandwidth, 1000 classes and more | at least 0.8 | 0.5 |" in text
    assert "| Loss, times faster than eager, 7 classes, 4 exits | at least 5 | 6.5 |" in text
    assert "| End to end over the ideal, batch 64 and up | at most 1.10 | 1.07 |" in text
    assert "| vit_base | 64 | closed | 1.23 |  |  |  |  |  |  | 0.5 |" in text
    assert "NVIDIA Some GPU (driver 580); torch 2.13, commit abc, today; copy_bytes_per_s 2e+12" in text


def test_a_page_without_its_places_is_refused(tmp_path: Path) -> None:
    document = tmp_path / "gpu.md"
    document.write_text("# GPU\n")
    result = CliRunner().invoke(gpu_report.main, ["--document", str(document)])
    assert result.exit_code == 1
    assert "has no place for origin" in result.output
