"""`make gpu` and `make gpu-report` without a GPU: that no step is lost, and that the tables say what was measured."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import gpu_report
import gpu_session
from gpu_session import Step


def test_the_steps_fit_their_time_and_name_what_exists(tmp_path: Path) -> None:
    steps = gpu_session.steps(tmp_path)
    assert sum(step.limit for step in steps) < 9 * 60
    assert len({step.name for step in steps}) == len(steps)
    for argument in (argument for step in steps for argument in step.command):
        assert not argument.endswith(".py") or (gpu_session.ROOT / argument).is_file()


def test_a_step_that_fails_keeps_no_other_from_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [
        Step("fails", ["-c", "print('why'); raise SystemExit(3)"], 20),
        Step("hangs", ["-c", "import time; print('here', flush=True); time.sleep(60)"], 1),
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
    assert "stopped after 1 s; here" in lines[1]
    assert "no-such-tool is not installed" in lines[2]
    outcomes = json.loads((tmp_path / "out/steps.json").read_text())
    assert [outcome["passed"] for outcome in outcomes] == [False, False, False, True]


DOCUMENT = "# GPU\n" + "".join(f"<!-- {name} -->\nold\n<!-- end -->\n" for name in ("origin", "measures", "times"))


def report(tmp_path: Path) -> str:
    document = tmp_path / "gpu.md"
    document.write_text(DOCUMENT)
    options = ["--results", str(tmp_path / "results"), "--document", str(document)]
    result = CliRunner().invoke(gpu_report.main, options)
    assert result.exit_code == 0, result.output
    return document.read_text()


def write(folder: Path, name: str, rows: list[dict[str, Any]], description: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / f"{name}.json").write_text(json.dumps(description))


def test_without_results_everything_is_not_measured(tmp_path: Path) -> None:
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
            {**point, "quantity": "predict", "unit": "s", "median": 0.00123},
            {**point, "quantity": "predict", "unit": "J/sample", "median": 0.5},
            {**point, "quantity": "ideal", "unit": "s", "median": ""},
        ],
        {
            "device": "NVIDIA Some GPU",
            "torch": "2.13",
            "commit": "abc",
            "date": "today",
            "gpu": {"driver": "580"},
            "ceilings": {"copy_bytes_per_s": 2e12},
            "measures": [{"measure": "predict/ideal <= 1.1", "worst": 1.07}],
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
