"""`cet demo` from end to end on every eighth window: its report, its plots, its timing, and going on after a stop."""

from __future__ import annotations

import copy
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, get_args, get_origin, get_type_hints, is_typeddict

import pytest
import torch

import cet
from cet.calibration.cost import exit_costs
from cet.cli import main
from cet.data.smartwatch import Split, find_dataset, load_windows, split_by_person
from cet.demo import run
from cet.energy import MonotonicClock
from cet.report.energy import measure_energy
from cet.report.figures import made_with
from cet.report.folder import RunFolder
from cet.report.markdown import SCOPE, calibration_verdict, energy_verdict, time_verdict
from cet.report.schema import Report, at
from cet.report.timing import Speed, Speedup
from cet.training import JOINT, build
from commands import ctrl_c_once_there_is
from powercap import Powercap

TINY = replace(
    run.QUICK,
    epochs=3,
    threads=1,
    test_windows=64,
    timed_batches=4,
    timed_windows=12,
    energy_rounds=1,
    energy_window=0.1,
)
SPARSE = partial(load_windows, stride=256)
PATHS = [str(folder) for folder in Path(__file__).parents[:2]]
BY_SUBPROCESS = f"import sys; sys.path[:0] = {PATHS!r}; import test_demo; test_demo."


class Recorder:
    """Keeps what a run shows: each stage with its notes."""

    def __init__(self) -> None:
        self.notes: dict[str, list[str]] = {}

    @contextmanager
    def stage(self, title: str) -> Iterator[_Recorded]:
        yield _Recorded(self.notes.setdefault(title, []))


class _Recorded:
    def __init__(self, notes: list[str]) -> None:
        self.notes = notes

    def advance(self, done: int, total: int) -> None:
        assert 0 <= done <= total

    def note(self, text: str) -> None:
        self.notes.append(text)


def start_tiny(output: str) -> None:
    """In a process of its own, which a test stops."""
    run.load_windows = SPARSE
    run.start(RunFolder(Path(output)), TINY, Recorder())


@pytest.fixture(scope="module", autouse=True)
def _sparse() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_windows", SPARSE)
        patch.setattr(run, "QUICK", TINY)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, str]:
    """The folder of a finished run, and what the command printed."""
    path = tmp_path_factory.mktemp("demo")
    with redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as stop:
        main(["demo", "--quick", "--threads", "1", "--output", str(path)])
    assert not stop.value.code
    return RunFolder(path), out.getvalue()


@pytest.fixture(scope="module")
def folder(finished: tuple[RunFolder, str]) -> RunFolder:
    return finished[0]


@pytest.fixture(scope="module")
def report(folder: RunFolder) -> Report:
    report: Report = json.loads((folder / "report.json").read_text())
    return report


@pytest.fixture(scope="module")
def split() -> Split:
    return split_by_person(SPARSE(), seed=0)


def without_timing(report: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in report.items() if key != "timing"}


def check_type(value: Any, expected: Any, where: str) -> None:
    """A JSON value against the type hints of the report."""
    if is_typeddict(expected):
        hints = get_type_hints(expected)
        assert value.keys() == hints.keys(), where
        for key, hint in hints.items():
            check_type(value[key], hint, f"{where}.{key}")
    elif get_origin(expected) is dict:
        key_type, value_type = get_args(expected)
        for key, item in value.items():
            check_type(key, key_type, where)
            check_type(item, value_type, f"{where}.{key}")
    elif get_origin(expected) is list:
        assert isinstance(value, list), where
        assert value, where
        for index, item in enumerate(value):
            check_type(item, get_args(expected)[0], f"{where}[{index}]")
    elif get_origin(expected) is Literal:
        assert value in get_args(expected), where
    elif expected is not Any:
        assert isinstance(value, expected), where


def test_report_is_what_its_types_say(report: Report) -> None:
    check_type(report, Report, "report")
    assert report["schema_version"] == 2
    assert list(report["recipes"]) == ["joint", "consistent"]
    assert report["settings"] == {**asdict(TINY), "data": None}
    persons = report["data"]["persons"]
    assert sorted(person for part in persons.values() for person in part) == list(range(1, 11))
    assert report["data"]["windows"]["test"] == TINY.test_windows


def test_report_holds_together(report: Report) -> None:
    for recipe in report["recipes"].values():
        full = recipe["flops"]["full"]
        assert [row["severity"] for row in recipe["severities"]] == list(run.SEVERITIES)
        for row in recipe["severities"]:
            assert sum(row["early"]["exit_shares"]) == pytest.approx(1)
            assert 0 < row["early"]["mean_flops"] <= recipe["calibration"]["exits"][-1]["cost"]
        for condition, severity in report["conditions"].items():
            curve, exits = recipe["curves"][condition], at(recipe, severity)["exits"]
            assert (curve[0]["accuracy"], curve[0]["mean_flops"]) == (exits[-1]["accuracy"], full)
            flops = [point["mean_flops"] for point in curve[1:]]
            assert flops == sorted(flops, reverse=True)


def test_report_agrees_with_the_models_it_stands_beside(folder: RunFolder, report: Report, split: Split) -> None:
    test = run._some(split.test, TINY.test_windows, 0)
    for name, recipe in report["recipes"].items():
        model = cet.load(folder / f"{name}.safetensors", build(JOINT, split, 0).backbone)
        assert model.policy == cet.ExitPolicy(**recipe["policy"])
        assert recipe["flops"]["full"] == exit_costs(model).full
        clean = at(recipe, 0.0)
        with torch.no_grad():
            full = (model.backbone(test.x).argmax(1) == test.y).double().mean().item()
        rows = [model.predict(row[None]) for row in test.x]  # one by one: no batch, no compaction
        labels = torch.cat([row.labels for row in rows])
        exits = torch.cat([row.exit_index for row in rows]).bincount(minlength=4)
        assert clean["exits"][-1]["accuracy"] == full
        assert clean["early"]["accuracy"] == (labels == test.y).double().mean().item()
        assert clean["early"]["exit_shares"] == pytest.approx((exits / len(test)).tolist())


def test_the_promise_is_checked_on_the_test_persons(
    finished: tuple[RunFolder, str], report: Report, split: Split
) -> None:
    folder, out = finished
    verdict = calibration_verdict(report)
    assert verdict in (folder / "report.md").read_text()
    assert verdict in " ".join(out.split())
    assert "accuracy has 2 groups to test on, and even without any loss at least 347 are needed" in verdict
    assert "So the thresholds are fitted instead, which promises nothing" in verdict
    test = run._some(split.test, TINY.test_windows, 0)
    for name, recipe in report["recipes"].items():
        model = cet.load(folder / f"{name}.safetensors", build(JOINT, split, 0).backbone)
        with torch.no_grad():
            full = model.backbone(test.x).argmax(1) == test.y
        early = model.predict(test.x).labels == test.y
        people = [test.person == person for person in report["data"]["persons"]["test"]]
        expected = [(full[own].double().mean() - early[own].double().mean()).item() for own in people]
        assert at(recipe, 0.0)["group_losses"] == pytest.approx(expected)
        worse = max(fmean(at(recipe, severity)["group_losses"]) for severity in report["conditions"].values())
        assert f"{100 * worse:.1f} points with {name}" in verdict
        assert f"with {name} (within it)" in verdict if worse <= 0.01 else f"with {name} (more)" in verdict


def test_a_promise_that_is_made_is_printed_beside_what_became_of_it(report: Report) -> None:
    made = copy.deepcopy(report)
    for recipe in made["recipes"].values():
        recipe["certificate"] |= {"certified": True, "promise": "certified: as it is"}
        recipe["calibration"]["certificate"] = recipe["certificate"]
        for row in recipe["severities"]:
            row["group_losses"] = [0.03, -0.01]
    verdict = calibration_verdict(made)
    assert verdict.startswith("The promise for joint: certified: as it is. The promise for consistent: certified")
    assert verdict.endswith(
        "On the 2 test persons, who count alike, on the worse of clean and perturbed input, accuracy loses 1.0 points "
        "with joint (within it) and 1.0 points with consistent (within it)."
    )
    for recipe in made["recipes"].values():
        recipe["severities"][2]["group_losses"] = [0.03, 0.01]
    assert calibration_verdict(made).count("2.0 points with") == calibration_verdict(made).count("(more)") == 2


def test_markdown_says_what_the_figures_are_and_are_not(folder: RunFolder, report: Report) -> None:
    text = (folder / "report.md").read_text()
    assert SCOPE in text
    assert "not a reproduction of its tables" in SCOPE
    assert energy_verdict(report) in text
    assert time_verdict(report) in text
    early = at(report["recipes"]["consistent"], 1.0)["early"]
    assert f"{100 * early['accuracy']:.1f} %" in text


def test_folder_holds_the_results_and_no_leftovers(folder: RunFolder) -> None:
    assert {path.name for path in folder.path.iterdir()} == {*folder.results(), "run.json"}
    for name in ("accuracy.png", "exits.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_command_prints_plain_lines_with_the_figures_of_the_report(
    finished: tuple[RunFolder, str], report: Report
) -> None:
    folder, out = finished
    assert re.fullmatch(r"[\x20-\x7e\n]*", out)
    assert "Train joint: epoch 3/3" in out
    assert SCOPE in " ".join(out.split())
    assert out.endswith(f"In {folder.path}: {', '.join(folder.results())}\n")
    for name, recipe in report["recipes"].items():
        clean = at(recipe, 0.0)
        assert re.search(
            rf"{name} +clean +{clean['exits'][-1]['accuracy']:.1%} +{clean['early']['accuracy']:.1%} ", out
        )


def test_with_wrong_labels_two_other_recipes_compete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "QUICK", replace(TINY, epochs=1))
        with pytest.raises(SystemExit) as stop:
            main(["demo", "--quick", "--threads", "1", "--wrong-labels", "0.3", "--output", str(tmp_path)])
    assert not stop.value.code
    out = capsys.readouterr().out
    assert "30 % of the training windows have a wrong label" in " ".join(out.split())
    files = {path.name for path in tmp_path.iterdir()}
    assert {"augmentation.safetensors", "noisy-labels.safetensors", "report.md"} <= files
    assert files == {*RunFolder(tmp_path).results(), "run.json"}
    RunFolder(tmp_path).clear()
    assert not list(tmp_path.iterdir())


def test_finished_run_is_read_again_by_resume(folder: RunFolder, report: Report) -> None:
    recorder = Recorder()
    assert run.resume(folder, recorder) == report
    assert recorder.notes == {}


@pytest.mark.slow
def test_killed_run_goes_on_and_ends_with_the_same_figures(folder: RunFolder, report: Report, tmp_path: Path) -> None:
    code = f"{BY_SUBPROCESS}start_tiny({str(tmp_path)!r})"
    with subprocess.Popen([sys.executable, "-c", code], env=single_threaded()) as process:
        wait_for(tmp_path / "checkpoints" / "consistent" / "last.ckpt", process)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    notes = check_resumed(tmp_path, folder, report)
    assert notes["Train joint"] == []
    assert not any(note.startswith("epoch 1/3") for note in notes["Train consistent"])


def test_ctrl_c_says_how_to_go_on_and_loses_nothing(
    folder: RunFolder, report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["demo", "--quick", "--threads", "1", "--output", str(tmp_path)]
    with ctrl_c_once_there_is(tmp_path / "checkpoints" / "joint" / "last.ckpt"), pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 130
    assert capsys.readouterr().err == f"Interrupted; go on with: cet demo --resume --output {tmp_path}\n"
    notes = check_resumed(tmp_path, folder, report)
    assert not any(note.startswith("epoch 1/3") for note in notes["Train joint"])


def check_resumed(stopped: Path, folder: RunFolder, report: Report) -> dict[str, list[str]]:
    """Go on with a stopped run, compare it with one that was never stopped, and return what it showed."""
    assert not (stopped / "report.json").exists()
    recorder = Recorder()
    run.resume(RunFolder(stopped), recorder)
    assert without_timing(json.loads((stopped / "report.json").read_text())) == without_timing(report)
    for name in ("joint.safetensors", "consistent.safetensors"):
        assert (stopped / name).read_bytes() == (folder / name).read_bytes()
    return recorder.notes


def single_threaded() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def wait_for(path: Path, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, f"the run ended before {path} appeared"
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["cet", "torch", "recordings_sha256"])
def test_resume_refuses_another_version_or_other_recordings(tmp_path: Path, name: str) -> None:
    folder = RunFolder(tmp_path)
    other = {**made_with(find_dataset()), name: "other"}
    folder.write_json("run.json", {"settings": asdict(TINY), "made_with": other})
    with pytest.raises(ValueError, match=f"{name} other"):
        run.resume(folder, Recorder())


def test_overwrite_replaces_the_run_and_spares_everything_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for name in ("run.json", "report.json", "joint.safetensors", ".report.json.half", "notes.txt"):
        (folder / name).write_text("old")
    (folder / "checkpoints" / "joint").mkdir(parents=True)
    folder.check_free(overwrite=True)
    folder.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_joules_are_measured_where_there_is_a_counter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: RunFolder, report: Report, split: Split
) -> None:
    powercap = Powercap(tmp_path)
    powercap.zone("intel-rapl:0", "package-0")
    monkeypatch.setenv("CET_POWERCAP_ROOT", str(tmp_path))
    model = cet.load(folder / "consistent.safetensors", build(JOINT, split, 0).backbone)
    stop = powercap.follow(MonotonicClock(), "intel-rapl:0", 25)
    try:
        joules = measure_energy(model, "consistent", split.test.x, batch_size=16, rounds=1, window=0.1, seed=0)
    finally:
        stop()
    assert joules["ratio"] == pytest.approx((joules["early"] or 0) / (joules["full"] or 1))
    assert joules["source"] == "counter"
    assert joules["reason"] == "an interval needs 3 rounds, and this is of 1"
    assert "short-window" in (joules["flags"] or "")
    text = energy_verdict({**report, "timing": {**report["timing"], "joules": joules}})
    assert text.startswith(f"Early exit of consistent takes {joules['ratio']:.2f}x the full network's energy: ")
    assert "by the CPU's counter; flagged: " in text


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (1.1, 1.2, ["Early exit was faster in every case measured."]),
        (0.8, 0.9, ["does not pay on this machine for", "faster in no case"]),
        (0.9, 1.1, ["no clear difference for", "faster in no case"]),
    ],
)
def test_report_says_plainly_whether_it_pays(report: Report, low: float, high: float, says: Sequence[str]) -> None:
    speed = Speed(
        batch_size=1,
        batches=1,
        unit="ms",
        full={"p50": 1.0},
        early={"p50": 1.0},
        speedup=Speedup(value=(low + high) / 2, low=low, high=high),
    )
    speeds: Any = {name: dict.fromkeys(report["conditions"], speed) for name in report["recipes"]}
    text = time_verdict({**report, "timing": {**report["timing"], "throughput": speeds, "latency": speeds}})
    for part in says:
        assert part in text


def test_where_nobody_leaves_early_no_time_is_called_its_merit(report: Report) -> None:
    recipes: Any = copy.deepcopy(report["recipes"])
    for recipe in recipes.values():
        for row in recipe["severities"]:
            row["early"]["exit_shares"] = [0.0] * (len(row["early"]["exit_shares"]) - 1) + [1.0]
    assert time_verdict({**report, "recipes": recipes}).startswith("No sample leaves early: ")
