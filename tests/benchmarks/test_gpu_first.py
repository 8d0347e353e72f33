"""`make gpu` without a GPU: every stage is rehearsed, killing any loses nothing, and the archive is read."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path
from typing import Any

import pynvml
import pytest
import torch
from click.testing import CliRunner

from benchmarks import compact, end_to_end, gpu, gpu_first, gpu_read
from benchmarks.gpu_first import Contact, Stage
from benchmarks.harness import NO_TIME, provenance


def archive_of(folder: Path) -> gpu_read.Archive:
    return gpu_read.Archive(folder / gpu_first.ARCHIVE)


def contact(tmp_path: Path, *stages: Stage) -> gpu_read.Archive:
    work, output = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    output.mkdir()
    Contact(work, output).run(list(stages))
    assert [path.name for path in output.iterdir()] == [gpu_first.ARCHIVE]
    return archive_of(output)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_stages_fit_a_loan_and_name_what_exists(tmp_path: Path, device: str) -> None:
    stages = gpu_first.stages(tmp_path, device)
    one_after_the_other = sum(stage.limit for stage in stages if not stage.beside)
    assert one_after_the_other + max(stage.limit for stage in stages if stage.beside) < 13 * 60
    first = [stage for stage in stages if stage.group in "0A"]
    builds = max(stage.limit for stage in first if stage.name.endswith("_part"))
    assert builds + sum(stage.limit for stage in first if not stage.name.endswith("_part")) <= 280
    assert len({stage.name for stage in stages}) == len(stages)
    assert [stage.group for stage in stages] == sorted(stage.group for stage in stages)
    timed = "ACD" if device == "cuda" else "A"
    assert not [stage.name for stage in stages if stage.beside and stage.group in timed], "timed beside another"
    for argument in (argument for stage in stages for argument in stage.command):
        assert not argument.endswith(".py") or (gpu_first.ROOT / argument).is_file()
        assert not re.fullmatch(r"benchmarks\.\w+", argument) or importlib.util.find_spec(argument)


def test_the_sanitizers_are_told_every_kernel() -> None:
    sources = "".join(path.read_text() for path in (gpu_first.ROOT / "kernels").glob("*.py"))
    assert {*re.findall(r"def (\w+)_kernel\(", sources)} == {*gpu_first.KERNELS}


def test_what_the_sanitizers_watch_launches_every_kernel(tmp_path: Path) -> None:
    script = f"""
        import os
        from pathlib import Path
        os.environ["TRITON_INTERPRET"] = "1"
        from cet.kernels import launch
        names, original = set(), launch.launch
        def noting(kernel, *args, **options):
            names.add(kernel.__name__)
            original(kernel, *args, **options)
        launch.launch = noting
        from benchmarks import smoke
        smoke.main(Path({str(tmp_path / "checks.jsonl")!r}), {[*gpu_first.SANITIZED]!r}, 100, None, [])
        print(*names)
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=gpu_first.ROOT, check=True)
    assert {*done.stdout.splitlines()[-1].split()} == {f"{name}_kernel" for name in gpu_first.KERNELS}


def is_running(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().split()[2] != "Z"


def test_a_stage_that_fails_keeps_no_other_from_running(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hangs = "import os; print(os.fork(), flush=True); import time; time.sleep(60)"
    archive = contact(
        tmp_path,
        Stage("fails", "0", ["-c", "print('why'); raise SystemExit(3)"], 20),
        Stage("hangs", "0", ["-c", hangs], 1),
        Stage("lacks", "0", ["-c", ""], 20, tool=("no-such-tool",)),
        Stage("beside", "0", ["-c", "print('both')"], 20, beside=True),
        Stage("works", "0", ["-c", "print('fine')"], 20),
    )
    outcomes = {outcome["name"]: outcome for outcome in archive.json("stages.json")}
    assert [outcome["passed"] for outcome in outcomes.values()] == [False, False, False, True, True]
    assert outcomes["fails"]["last_line"] == "exit status 3; why"
    assert "stopped after 1 s" in outcomes["hangs"]["last_line"]
    assert "no-such-tool is not installed" in outcomes["lacks"]["last_line"]
    assert archive.text("works.log") == "fine\n"
    children = {int(line) for line in archive.text("hangs.log").split()} - {0}
    assert not [child for child in children if is_running(child)]
    assert len(gpu_read.failures(archive)) == 3
    assert "works                 passed" in capsys.readouterr().out


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_stage_or_all_that_is_killed_loses_nothing_found_before(tmp_path: Path, how: signal.Signals) -> None:
    """The first check of the second stage is done, and the second under way."""
    checks, output = tmp_path / "checks.jsonl", tmp_path / "out"
    output.mkdir()
    writes = f"""
import time
with open({str(checks)!r}, "a") as file:
    file.write('{{"check": "one", "ok": true}}' + chr(10) + '{{"che')
time.sleep(60)
"""
    program = f"""
import signal, sys
from pathlib import Path
from benchmarks.gpu_first import Contact, Stage
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
stages = [Stage("first", "0", ["-c", ""], 9), Stage("second", "0", ["-c", {writes!r}], 60)]
Contact(Path({str(tmp_path)!r}), Path({str(output)!r})).run(stages)
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=gpu_first.ROOT, start_new_session=True)
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "checks.jsonl").exists() and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(how)
        process.wait(20)
    finally:
        for stray in subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout.split():
            os.kill(int(stray), signal.SIGKILL)
    archive = archive_of(tmp_path / "out")
    assert [stage["name"] for stage in archive.json("stages.json")] == ["first"]
    if how is signal.SIGTERM:  # after SIGKILL it holds what there was after the first stage
        assert archive.lines("checks.jsonl") == [{"check": "one", "ok": True}]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("rehearsal")
    command = [sys.executable, "-m", "benchmarks.gpu_first", str(output), "--device", "cpu"]
    done = subprocess.run(command, cwd=gpu_first.ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    return output


def test_every_stage_is_rehearsed_to_its_end(rehearsed: Path) -> None:
    archive = archive_of(rehearsed)
    outcomes = {outcome["name"]: outcome for outcome in archive.json("stages.json")}
    assert outcomes.keys() == {stage.name for stage in gpu_first.stages(rehearsed, "cpu")}
    # Here the CUDA part may have no compiler, and nothing else may fail.
    assert {name for name, outcome in outcomes.items() if not outcome["passed"]} <= {"cuda_part"}
    checks = {line["check"]: line for line in archive.lines("checks.jsonl")}
    assert all(line["ok"] for line in checks.values())
    for name in ("machine", "places_under_load", "every_way", "counts_are_fresh", "runner_device_triton"):
        assert name in checks
    assert {line["check"] for line in archive.lines("racecheck.jsonl")} == {*gpu_first.SANITIZED}
    for name in gpu_read.BENCHMARKS:
        assert f"results/{name}.csv" in archive.files


def test_the_archive_becomes_tables(rehearsed: Path) -> None:
    text = CliRunner().invoke(gpu_read.main, [str(rehearsed / gpu_first.ARCHIVE)]).output
    assert "| places_under_load | yes |" in text
    assert "## The exit step, and the loss, against a copy" in text
    assert re.search(r"\| 1_128_32_7_float32 \| [\d.]+ \| [\d.]+ \| [\d.]+ \| [\d.]+ \|", text)


def test_a_check_that_does_not_end_is_noted_and_those_behind_it_run(tmp_path: Path) -> None:
    checks = tmp_path / "checks.jsonl"
    command = [sys.executable, "-m", "benchmarks.smoke", str(checks), "cpu", "machine", "every_way", "--limit", "0.001"]
    assert subprocess.run(command, cwd=gpu_first.ROOT, capture_output=True).returncode == 1
    lines = [json.loads(line) for line in checks.read_text().splitlines()]
    assert [(line["check"], line["ok"], line["error"]) for line in lines] == [
        (name, False, "no end after 0.001 s") for name in ("machine", "every_way")
    ]


def packed(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"gpu-1/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


def test_what_failed_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = [{"name": "smoke", "passed": False, "seconds": 3.0, "last_line": "exit status 1"}]
    checks = [
        {"check": "machine", "ok": True, "name": "NVIDIA Some GPU"},
        {"check": "every_way", "ok": False, "error": "RuntimeError: no"},
        {"check": "runner_graphs_None", "ok": False, "same": 3},
    ]
    results = "rows,quantity,unit,median,note\n1,cet,s,0.5,\n2,cet,s,,not timed: wrong\n"
    files = {
        "stages.json": json.dumps(stages),
        "checks.jsonl": "\n".join(map(json.dumps, checks)) + '\n{"check": "cut o',
        "results/exit_gate.csv": results,
        "smoke.log": "",
    }
    monkeypatch.setattr(gpu_read, "RESULTS", tmp_path / "results")
    output = tmp_path / "report.md"
    path = str(packed(tmp_path / "gpu.tar.gz", files))
    assert CliRunner().invoke(gpu_read.main, [path, "--output", str(output)]).exit_code == 1
    text = output.read_text()
    assert "NVIDIA Some GPU" in text
    failed = text[: text.index("## Stages")]
    assert "- stage smoke: exit status 1" in failed
    assert "- checks: every_way: RuntimeError: no" in failed
    assert "- checks: runner_graphs_None: {'same': 3}" in failed
    assert "- benchmark exit_gate: 2: not timed: wrong" in failed
    assert "| 1 | cet | 0.5 | s |" in text
    assert (tmp_path / "results/exit_gate.csv").read_text() == results


@pytest.mark.parametrize(("files", "message"), [({}, "holds no logs"), (None, "cannot be read")])
def test_what_is_no_archive_is_refused(tmp_path: Path, files: dict[str, str] | None, message: str) -> None:
    path = tmp_path / "gpu.tar.gz"
    if files is None:
        path.write_text("no")
    else:
        packed(path, files)
    assert message in CliRunner().invoke(gpu_read.main, [str(path)]).output


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        gpu_first.main([str(tmp_path / "file/out")])
    assert "cannot be written (Not a directory); give another folder" in capsys.readouterr().err


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


def test_a_provider_that_is_not_there_cannot_be_skipped(tmp_path: Path) -> None:
    result = CliRunner().invoke(compact.main, ["--quick", "--skip", "nosuch", "--output", str(tmp_path)])
    assert result.exit_code == 2
    assert "nosuch is none of cet, index_select" in result.output


def test_joules_of_a_cpu_are_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(end_to_end.main, ["--joules", "1", "--output", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "give --device cuda" in result.output
    assert not (tmp_path / "out").exists()
